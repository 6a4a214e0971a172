"""`gpufn snapshot create`: real CRIU, a first start that is restored, and nothing left when it is ended."""

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapter.cli.main import run
from adapter.hosts.shell import Isolation
from adapter.replica import RESULT_VARIABLE, TASK_SNAPSHOT, TASK_VARIABLE, ReplicaSettings
from adapter.snapshot.store import Store
from tests.fakes.host import Watched, session_of, write_function

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).parents[2]
WARM = "def load(device):\n    return 'warm'\ndef handle(event, context):\n    return context.model\n"
PRINTS = "def load(device):\n    print('hello', flush=True)\ndef handle(e, c): ...\n"
ENDLESS = (
    "import time\ndef load(device):\n    print('loading', flush=True)\n    time.sleep(1000)\ndef handle(e, c): ...\n"
)


@contextmanager
def gpufn(*words: str):
    process = subprocess.Popen(
        [sys.executable, "-m", "adapter.cli.main", *words, "--python", sys.executable],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def tell_thread(process: int, thread: int, number: signal.Signals) -> None:
    tgkill = {"x86_64": 234, "aarch64": 131}[platform.machine()]  # which Python has only for its own threads
    assert ctypes.CDLL(None).syscall(tgkill, process, thread, number) == 0


def create(folder: Path, state: Path):
    return run(["snapshot", "create", str(folder), "--state", str(state), "--python", sys.executable, "-o", "json"])


def drafts(state: Path) -> list[Path]:
    return [path for path in (state / "snapshots").glob("*/*/*") if path.name.startswith(".draft")]


@pytest.mark.criu
def test_the_first_start_is_restored_and_its_snapshot_is_in_use(tmp_path, capsys):
    folder, state = write_function(tmp_path, "fn", WARM), tmp_path / "state"
    assert create(folder, state) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["function"], made["namespace"]) == ("fn", "openfaas-fn")
    assert made["bytes"] > 0
    with gpufn("run", str(folder), "--port", "0", "--state", str(state)) as process:
        url = process.stdout.readline().strip()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert opener.open(url, timeout=60).read() == b"warm"
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("total "):
                break
        assert "RESTORE" in said
        assert run(["snapshot", "prune", "--all", "-y", "--state", str(state)]) == 0
        assert run(["snapshot", "list", "-o", "json", "--state", str(state)]) == 0
        assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["in-use"]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert run(["snapshot", "prune", "--all", "-y", "--state", str(state), "-o", "name"]) == 0
    assert run(["snapshot", "list", "-o", "name", "--state", str(state)]) == 0
    assert capsys.readouterr().out == f"{made['key']}\n"  # a key, which inspect takes


@pytest.mark.criu
def test_a_handler_that_raises_is_named_and_leaves_no_draft(tmp_path, capsys):
    folder = write_function(
        tmp_path, "fn", "def load(device):\n    raise ValueError('no weights')\ndef handle(e, c): ...\n"
    )
    assert create(folder, tmp_path / "state") == 1
    assert "no weights" in capsys.readouterr().err
    assert drafts(tmp_path / "state") == []


@pytest.mark.criu
def test_a_container_that_is_started_for_it_takes_a_snapshot_and_ends(tmp_path):
    """As a pod does: no host to talk to, a file for what came of it, and what the function prints is not in there."""
    folder, result = write_function(tmp_path, "fn", PRINTS), tmp_path / "result"
    settings = ReplicaSettings(function="fn", folder=str(folder), snapshot_dir=str(tmp_path / "store"))
    ended = subprocess.run(
        [*Isolation.find().wrapper, sys.executable, "-m", "adapter.runtime"],
        cwd=REPOSITORY,
        env={
            **os.environ,
            **settings.to_env({"function", "folder", "snapshot_dir"}),
            TASK_VARIABLE: TASK_SNAPSHOT,
            RESULT_VARIABLE: str(result),
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(result.read_text())["state"] == "published"
    assert "hello" in ended.stderr
    assert [snapshot.kind for snapshot in Store(tmp_path / "store").all()] == ["process"]


@pytest.mark.criu
def test_such_a_container_ends_at_once_when_it_is_told_to_though_it_is_its_first_process(tmp_path):
    """As a pod that another one preempts: who waits for its GPU waits for no grace to pass."""
    folder, result = write_function(tmp_path, "fn", ENDLESS), tmp_path / "result"
    settings = ReplicaSettings(function="fn", folder=str(folder), snapshot_dir=str(tmp_path / "store"))
    with subprocess.Popen(
        [*Isolation.find().wrapper, sys.executable, "-m", "adapter.runtime"],
        cwd=REPOSITORY,
        env={
            **os.environ,
            **settings.to_env({"function", "folder", "snapshot_dir"}),
            TASK_VARIABLE: TASK_SNAPSHOT,
            RESULT_VARIABLE: str(result),
        },
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as container:
        try:
            for line in container.stderr:
                if line == "loading\n":
                    break
            inside = Watched(session_of(container.pid))
            [first] = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
            os.kill(int(first), signal.SIGTERM)
            assert container.wait(60) == 128 + signal.SIGTERM
            assert inside.all_end(20)
        finally:
            container.kill()
    assert result.read_text() == ""


def test_a_function_that_would_not_start_from_it_gets_none(tmp_path, capsys):
    folder = write_function(tmp_path, "fn", "def handle(event, context): ...\n")
    assert create(folder, tmp_path / "state") == 3
    assert "load(device)" in capsys.readouterr().err


def test_without_namespaces_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Isolation, "find", lambda: Isolation(why_not="a test"))
    assert create(write_function(tmp_path, "fn", WARM), tmp_path / "state") == 6
    assert "a test" in capsys.readouterr().err


@pytest.mark.criu
def test_it_is_interrupted_whichever_of_its_threads_the_kernel_tells(tmp_path):
    folder = write_function(tmp_path, "fn", ENDLESS)
    with gpufn("snapshot", "create", str(folder), "--state", str(tmp_path / "state")) as process:
        for line in process.stderr:
            if line == "loading\n":
                break
        waits_for_children = max(int(name) for name in os.listdir(f"/proc/{process.pid}/task"))
        assert waits_for_children != process.pid
        tell_thread(process.pid, waits_for_children, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130


@pytest.mark.criu
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_nothing_is_left_running_when_it_is_ended(tmp_path, number, code):
    folder, state = write_function(tmp_path, "fn", ENDLESS), tmp_path / "state"
    with gpufn("snapshot", "create", str(folder), "--state", str(state)) as process:
        for line in process.stderr:
            if line == "loading\n":
                break
        processes = Watched(pid for pid in session_of(process.pid) if pid != process.pid)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code
        assert processes.all_end(20)
    (folder / "handler.py").write_text(WARM)
    assert create(folder, state) == 0
    assert drafts(state) == []
