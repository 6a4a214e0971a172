import csv
import io
import json
import time
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone

import pytest
import yaml

from adapter.cli.main import run
from adapter.cli.usage import merged
from adapter.ledger.store import Ledger, ledger_url
from adapter.records import LeaseInterval, LeasePhase, Rung, StartRecord

SECOND = 10**9


def lease(n, phase, began_ns, seconds, *, function="embed", device="cpu", share=1.0, price_class="standard"):
    return LeaseInterval(
        id=f"{function}-1:{n}", function=function, namespace="openfaas-fn", revision="1", replica=f"{function}-1",
        tenant="default", price_class=price_class, device=device, share=share, phase=phase, started_at_ns=began_ns,
        ended_at_ns=began_ns + round(seconds * SECOND),
    )  # fmt: skip


@pytest.fixture
def began_ns(state_dir, monkeypatch):
    """A ledger with an hour on it that ended a minute ago: two functions, one with half a GPU."""
    monkeypatch.setenv("GPUFN_HOME", str(state_dir))
    began_ns = time.time_ns() - 3660 * SECOND
    ledger = Ledger.open(ledger_url(state_dir))
    ledger.add_intervals(
        [
            lease(0, LeasePhase.RESTORING, began_ns, 0.5),
            lease(1, LeasePhase.RUNNING, began_ns + SECOND // 2, 1.5),
            lease(2, LeasePhase.IDLE, began_ns + 2 * SECOND, 8),
            lease(3, LeasePhase.PARKED, began_ns + 10 * SECOND, 90),
            lease(
                0, LeasePhase.RUNNING, began_ns, 3600, function="caption", device="GPU-1", share=0.5, price_class="spot"
            ),
        ]
    )
    ledger.add_start(StartRecord("embed", "openfaas-fn", "1", "embed-1", Rung.LOAD, began_ns, SECOND, ()))
    ledger.close()
    return began_ns


PLAN = "currency: EUR\nclasses:\n  standard: {per_replica_second: 0.01}\n  spot: {per_gpu_second: 0.001}\n"


def test_a_report_by_function(began_ns, capsys):
    assert run(["usage", "report", "--for", "2h"]) == 0
    out, err = capsys.readouterr()
    header, caption, embed = (line.split() for line in out.splitlines())
    assert header == [
        "FUNCTION",
        "NAMESPACE",
        "UNIT",
        "ALLOCATED",
        "RESTORING",
        "RUNNING",
        "IDLE",
        "PARKED",
        "DRAINING",
        "BUSY",
        "STARTS",
    ]
    assert caption == ["caption", "openfaas-fn", "GPU-seconds", "1,800.00", "–", "1,800.00", "–", "–", "–", "100%", "0"]
    assert embed == [
        "embed",
        "openfaas-fn",
        "replica-seconds",
        "10.00",
        "0.50",
        "1.50",
        "8.00",
        "90.00",
        "–",
        "15%",
        "1",
    ]
    assert "start included, end excluded" in err


def test_prices_turn_seconds_into_money(began_ns, tmp_path, capsys):
    (tmp_path / "prices.yaml").write_text(PLAN)
    assert run(["usage", "report", "--for", "2h", "--prices", str(tmp_path / "prices.yaml"), "--json"]) == 0
    caption, embed = json.loads(capsys.readouterr().out)
    assert (caption["cost"], embed["cost"], embed["currency"]) == ("1.8", "0.1", "EUR")
    assert (embed["allocated_ns"], embed["parked_ns"], embed["busy_ratio"]) == (10 * SECOND, 90 * SECOND, 0.15)


def test_without_a_plan_nothing_has_a_price(began_ns, capsys):
    assert run(["usage", "report", "--for", "2h", "--json"]) == 0
    assert {(row["cost"], row["currency"]) for row in json.loads(capsys.readouterr().out)} == {(None, None)}


def test_functions_of_one_name_are_kept_apart(began_ns, state_dir, capsys):
    ledger = Ledger.open(ledger_url(state_dir))
    twin = lease(9, LeasePhase.IDLE, began_ns, 1)
    ledger.add_intervals([replace(twin, namespace="team1", replica="embed-9")])
    ledger.close()
    assert run(["usage", "report", "--for", "2h", "--json"]) == 0
    rows = {(r["function"], r["namespace"]): r["idle_ns"] for r in json.loads(capsys.readouterr().out)}
    assert (rows["embed", "team1"], rows["embed", "openfaas-fn"]) == (SECOND, 8 * SECOND)
    assert run(["usage", "leases", "embed.team1", "--for", "2h", "--json"]) == 0
    assert [r["id"] for r in json.loads(capsys.readouterr().out)] == ["embed-1:9"]


def test_heartbeats_of_one_phase_are_one_line_unless_raw(state_dir, capsys):
    began_ns = time.time_ns() - 3600 * SECOND
    beats = [lease(n, LeasePhase.IDLE, began_ns + n * 10 * SECOND, 10) for n in range(3)]
    later = [
        lease(3, LeasePhase.RUNNING, began_ns + 30 * SECOND, 1),
        lease(4, LeasePhase.IDLE, began_ns + 31 * SECOND, 1),
    ]
    ledger = Ledger.open(ledger_url(state_dir))
    ledger.add_intervals([*beats, *later, lease(0, LeasePhase.IDLE, began_ns + 5 * SECOND, 40, function="other")])
    ledger.close()
    words = ["usage", "leases", "embed", "--for", "2h", "--json", "--state", str(state_dir)]
    assert run(words) == 0
    assert [(r["id"], r["phase"], r["held_ns"] // SECOND) for r in json.loads(capsys.readouterr().out)] == [
        ("embed-1:0", "idle", 30),
        ("embed-1:3", "running", 1),
        ("embed-1:4", "idle", 1),
    ]
    assert run([*words, "--raw"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 5


def test_a_gap_stays_a_gap():
    first, second = lease(0, LeasePhase.IDLE, 0, 10), lease(1, LeasePhase.IDLE, 11 * SECOND, 10)
    assert merged([first, second]) == [first, second]


def test_leases_of_an_unknown_function_are_an_error(began_ns, capsys):
    assert run(["usage", "leases", "absent", "--for", "2h"]) == 4
    assert "No function absent.openfaas-fn." in capsys.readouterr().err


def test_a_class_without_a_price_is_pointed_out(began_ns, tmp_path, capsys):
    prices = tmp_path / "prices.yaml"
    prices.write_text("classes: {standard: {per_replica_second: 1}}")
    assert run(["usage", "report", "--for", "2h", "--prices", str(prices)]) == 0
    assert "no price for spot: counted as standard." in capsys.readouterr().err
    prices.write_text("classes: {other: {per_replica_second: 1}}")
    assert run(["usage", "report", "--for", "2h", "--prices", str(prices)]) == 0
    assert "spot, standard: counted as nothing." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"), [("{", "flow"), ("classes: 5", ""), ("\x00", "special"), (None, "No such file")]
)
def test_a_price_plan_that_cannot_be_read(began_ns, tmp_path, capsys, text, why):
    path = tmp_path / "prices.yaml"
    if text is not None:
        path.write_text(text)
    assert run(["usage", "report", "--prices", str(path)]) == 3
    err = capsys.readouterr().err
    assert "prices.yaml" in err
    assert "[bad-prices]" in err
    assert why in err


def test_groups(began_ns, capsys):
    assert run(["usage", "report", "--for", "2h", "--by", "tenant,phase", "-o", "csv"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["phase"], r["unit"]) for r in found] == [
        ("idle", "replica-seconds"),
        ("parked", "replica-seconds"),
        ("restoring", "replica-seconds"),
        ("running", "GPU-seconds"),
        ("running", "replica-seconds"),
    ]
    assert sum(int(r["parked_ns"]) for r in found) == 90 * SECOND
    assert "starts" not in found[0]


def test_an_unknown_group_names_those_there_are(began_ns, capsys):
    assert run(["usage", "report", "--by", "weather"]) == 2
    assert "price_class" in capsys.readouterr().err


def test_ranges_include_their_start_and_exclude_their_end(began_ns, capsys):
    def at(seconds):
        return datetime.fromtimestamp((began_ns + seconds * SECOND) / SECOND, timezone.utc).isoformat()

    parts = []
    for start, end in ((0, 5), (5, 60), (60, 7200)):
        assert run(["usage", "report", "--start", at(start), "--end", at(end), "-o", "yaml"]) == 0
        parts += [row for row in yaml.safe_load(capsys.readouterr().out) if row["function"] == "embed"]
    assert abs(sum(p["allocated_ns"] + p["parked_ns"] for p in parts) - 100 * SECOND) <= 1000  # microseconds in `at`


def test_leases_are_the_rows_behind_a_report(began_ns, capsys):
    assert run(["usage", "leases", "embed", "--for", "2h", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["id"], r["phase"]) for r in found] == [
        ("embed-1:0", "restoring"), ("embed-1:1", "running"), ("embed-1:2", "idle"), ("embed-1:3", "parked"),
    ]  # fmt: skip
    assert found[0]["started_at_ns"] == began_ns
    assert sum(r["held_ns"] for r in found) == 100 * SECOND
    assert run(["usage", "leases", "embed", "--for", "2h"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["embed-1:0", "embed", "restoring", "cpu", "1"]


def test_nothing_held_says_what_to_try(began_ns, capsys):
    assert run(["usage", "report", "--start", "2001-01-01", "--end", "2001-01-02"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "--for 7d" in err
    assert run(["usage", "leases", "--start", "2001-01-01", "--end", "2001-01-02", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_folder_without_a_ledger_is_left_as_it_is(tmp_path, capsys):
    for words in (["usage", "report"], ["usage", "leases"], ["starts"]):
        assert run([*words, "--state", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()


def test_a_damaged_ledger_is_an_error_of_three_lines(state_dir, capsys):
    (state_dir / "ledger.sqlite").write_bytes(b"nonsense" * 1000)
    assert run(["usage", "report", "--state", str(state_dir)]) == 1
    first, why, hint = capsys.readouterr().err.splitlines()
    assert first == "✗ The ledger cannot be used.  [ledger-failed]"
    assert "ledger.sqlite" in why
    assert "move it away" in hint


def test_the_gpus_model_is_shown_where_it_is_known(began_ns, state_dir, capsys):
    one = replace(lease(9, LeasePhase.RUNNING, began_ns, 1, function="chat", device="GPU-2"), gpu_model="NVIDIA L4")
    with closing(Ledger.open(ledger_url(state_dir))) as ledger:
        ledger.add_intervals([one])
    assert run(["usage", "report", "--for", "2h"]) == 0
    header, caption, chat, _ = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["FUNCTION", "NAMESPACE", "GPU", "UNIT"]
    assert "NVIDIA L4" in chat
    assert caption.split()[2] == "–"
    for word in ("gpu-model", "gpu"):
        assert run(["usage", "report", "--for", "2h", "--by", word, "--json"]) == 0
        assert [row["gpu_model"] for row in json.loads(capsys.readouterr().out)] == ["", "", "NVIDIA L4"]
