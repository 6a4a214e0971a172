import json
import os

import pytest

from adapter.cli import checks, doctor
from adapter.cli.checks import Verdict, failed, ok, warning
from adapter.cli.main import run
from adapter.errors import SnapshotError
from adapter.gpu.capabilities import Capabilities, Feature, Verdict as Tried
from adapter.hosts import Inventory, capabilities, inventory
from adapter.hosts.ports import listen
from adapter.hosts.shell import Isolation
from adapter.policy.grants import Device
from adapter.snapshot import process
from adapter.snapshot.store import Store


def use(monkeypatch, *findings):
    monkeypatch.setattr(doctor, "all_checks", lambda state, port: [lambda f=f: f for f in findings])


@pytest.mark.parametrize(
    ("findings", "code"),
    [([ok("a", "x")], 0), ([ok("a", "x"), warning("b", "y", "do")], 0), ([failed("c", "z"), ok("a", "x")], 1)],
)
def test_only_what_does_not_work_makes_it_fail(monkeypatch, findings, code, capsys):
    use(monkeypatch, *findings)
    assert run(["doctor"]) == code
    assert len([line for line in capsys.readouterr().out.splitlines() if line[0] in "✓!✗"]) == len(findings)


def test_a_line_says_what_to_do(monkeypatch, capsys):
    use(monkeypatch, warning("uv", "not found", "pip install uv"))
    run(["doctor"])
    assert capsys.readouterr().out.splitlines() == ["! uv          not found", "              → pip install uv"]


def test_json_has_every_finding(monkeypatch, capsys):
    use(monkeypatch, ok("a", "x"), warning("b", "y", "do"))
    run(["doctor", "-o", "json"])
    assert json.loads(capsys.readouterr().out) == [
        {"name": "a", "verdict": "ok", "reason": "x", "fix": ""},
        {"name": "b", "verdict": "warning", "reason": "y", "fix": "do"},
    ]


def test_a_check_that_cannot_try_is_a_finding_not_a_crash(monkeypatch, capsys):
    def check_thing():
        raise PermissionError("not allowed")

    monkeypatch.setattr(doctor, "all_checks", lambda state, port: [check_thing])
    assert run(["doctor"]) == 1
    assert "✗ thing       not allowed" in capsys.readouterr().out


def test_every_check_runs_here(tmp_path):
    with listen("127.0.0.1", 0) as sock:
        found = [check() for check in checks.all_checks(tmp_path / "state", sock.getsockname()[1])]
    findings = [f for some in found for f in (some if isinstance(some, list) else [some])]
    assert len({finding.name for finding in findings}) == len(findings)
    assert all(finding.reason for finding in findings)
    assert not (tmp_path / "state").exists()  # looking changes nothing


def test_a_missing_criu_says_how_to_get_one(monkeypatch):
    def find_criu():
        raise SnapshotError("No CRIU.", why="None is installed.", hint="make criu")

    monkeypatch.setattr(process, "find_criu", find_criu)
    finding = checks.check_restore()
    assert finding.verdict is Verdict.WARNING
    assert "no CRIU works here: none is installed;" in finding.reason
    assert "make criu" in finding.fix
    assert "GPUFN_CRIU" in finding.fix


def test_missing_namespaces_are_a_warning_with_the_reason(monkeypatch):
    monkeypatch.setattr(Isolation, "find", lambda: Isolation(why_not="Operation not permitted"))
    assert "Operation not permitted" in checks.check_namespaces().reason
    assert checks.check_namespaces().verdict is Verdict.WARNING
    assert checks.check_secrets_path().verdict is Verdict.WARNING


def test_no_gpu_is_a_warning_with_the_reason(monkeypatch):
    monkeypatch.setattr(inventory, "read_inventory", lambda: Inventory(why_not="No driver."))
    (finding,) = checks.check_gpus()
    assert (finding.verdict, finding.reason) == (Verdict.WARNING, "No driver: functions run on the CPU")


def test_each_gpu_has_a_line(monkeypatch, capsys):
    devices = (Device("GPU-1", "NVIDIA L4", 24 * 2**30), Device("MIG-2", "NVIDIA A100 MIG 1g.5gb", 5 * 2**30, True))
    monkeypatch.setattr(inventory, "read_inventory", lambda: Inventory(devices, "580.1"))
    monkeypatch.setattr(doctor, "all_checks", lambda state, port: [checks.check_gpus])
    assert run(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "✓ gpu 0       NVIDIA L4, 24.0Gi, GPU-1; driver 580.1",
        "✓ gpu 1       NVIDIA A100 MIG 1g.5gb, 5.0Gi, MIG-2; driver 580.1",
    ]


def test_a_gpu_whose_driver_goes_to_sleep_says_how_to_keep_it_awake(monkeypatch):
    devices = (Device("GPU-1", "NVIDIA L4", 24 * 2**30),)
    monkeypatch.setattr(inventory, "read_inventory", lambda: Inventory(devices, "580.1", asleep=("GPU-1",)))
    (finding,) = checks.check_gpus()
    assert (finding.verdict, finding.fix) == (Verdict.WARNING, "nvidia-smi -pm 1")


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """What `check_parking` finds where the features' verdicts are these, and all others good."""

    def tried(gpus="NVIDIA L4", **verdicts):
        every = {feature: verdicts.get(feature.value, Tried(True)) for feature in Feature}
        said = Capabilities({"gpus": gpus}, every).to_json()
        monkeypatch.setattr(capabilities, "try_gpus", lambda folder: said)
        return checks.check_parking(tmp_path)[0]

    return tried


def test_what_works_on_the_gpus_is_said_with_its_limits(tried):
    assert tried().verdict is Verdict.OK
    finding = tried(managed=Tried(False, "gpu-checkpoint-unsupported"), virtual=Tried(False, "bytes-changed"))
    assert finding.verdict is Verdict.OK
    assert "not with managed memory" in finding.reason
    assert "not with torch's expandable segments" in finding.reason
    assert "own GPU only" not in finding.reason
    assert "first GPU" not in finding.reason
    assert "tried on the first GPU" in tried("NVIDIA L4, NVIDIA H100").reason


def test_an_old_driver_says_what_that_costs_and_what_to_do(tried):
    finding = tried(plain=Tried(False, "gpu-checkpoint-unsupported", "Too old.", "Update the driver."))
    assert (finding.verdict, finding.fix) == (Verdict.WARNING, "Update the driver.")
    assert "Too old. Idle functions keep their GPU" in finding.reason
    assert "no process snapshots" in finding.reason


def test_what_could_not_be_tried_is_not_said_to_fail(tried):
    finding = tried(plain=Tried(None, "canary-failed", "The GPU was full."))
    assert finding.verdict is Verdict.WARNING
    assert "could not be tried: The GPU was full." in finding.reason


def test_without_a_gpu_there_is_nothing_to_say_about_parking(monkeypatch, tmp_path):
    monkeypatch.setattr(capabilities, "try_gpus", lambda folder: '{"error": {"code": "no-gpu"}}')
    assert checks.check_parking(tmp_path) == []


@pytest.mark.parametrize("said", ["", "[]", "no json"])
def test_a_trial_that_says_nothing_is_a_finding(said, monkeypatch, tmp_path):
    monkeypatch.setattr(capabilities, "try_gpus", lambda folder: said)
    (finding,) = checks.check_parking(tmp_path)
    assert (finding.name, finding.verdict) == ("parking", Verdict.WARNING)


def test_the_port_says_who_has_it(tmp_path):
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        other = checks.check_port(port, tmp_path)
        assert (other.verdict, other.fix) == (Verdict.WARNING, f"gpufn up --port {port + 1}")
        assert str(os.getpid()) in other.reason
        (tmp_path / "lock").write_text(str(os.getpid()))
        assert "gpufn up runs there" in checks.check_port(port, tmp_path).reason
    assert checks.check_port(port, tmp_path).reason == "free"


def test_a_state_folder_that_others_can_read_is_a_warning(tmp_path):
    tmp_path.chmod(0o755)
    finding = checks.check_state(tmp_path)
    assert (finding.verdict, finding.fix) == (Verdict.WARNING, f"chmod 700 {tmp_path}")
    tmp_path.chmod(0o700)
    assert checks.check_state(tmp_path).verdict is Verdict.OK
    assert checks.check_state(tmp_path / "new" / "deep").reason.endswith("will be made")


@pytest.mark.parametrize(("free", "verdict"), [(0, Verdict.FAILED), (2**31, Verdict.WARNING), (2**40, Verdict.OK)])
def test_a_full_disk_is_noticed(free, verdict, tmp_path, monkeypatch):
    usage = type(checks.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage(2**41, 2**41 - free, free))
    assert checks.check_disk(tmp_path).verdict is verdict


def test_damaged_snapshots_are_a_warning_that_names_the_damage(tmp_path):
    assert checks.check_snapshots(tmp_path).reason == "none yet"
    with Store(tmp_path / "snapshots").building("default", "fn.openfaas-fn", {"code": "1"}, "process") as draft:
        (draft.path / "memory.img").write_bytes(b"memory")
        made = draft.publish({})
    assert checks.check_snapshots(tmp_path).verdict is Verdict.OK
    (made.path / "stranger").touch()
    finding = checks.check_snapshots(tmp_path)
    assert (finding.verdict, finding.fix) == (Verdict.WARNING, "gpufn snapshot prune -A")
    assert "stranger" in finding.reason
