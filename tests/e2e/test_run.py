"""`gpufn run` as a user starts it: a process, a URL, Ctrl-C."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapter.cli.templates import files_of
from adapter.hosts.ports import listen
from tests.fakes.host import Watched, session_of

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    for name, content in files_of("minimal", "hello").items():
        (tmp_path / "hello" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hello" / name).write_text(content)
    return tmp_path / "hello"


@contextmanager
def gpufn_run(folder: Path, *options: str, environment: Mapping[str, str] | None = None):
    command = [sys.executable, "-m", "adapter.cli.main", "run", str(folder), "--state", str(folder.parent / "state")]
    process = subprocess.Popen(
        [*command, "--python", sys.executable, *options],
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(url: str, body: bytes) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, data=body, timeout=60) as answer:
        text: str = answer.read().decode()
        return text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_serves_until_ctrl_c_and_leaves_nothing(folder, number, code):
    with gpufn_run(folder, "--port", "0") as process:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        assert ask(url, b"you") == "Hello, you!"
        processes = Watched(session_of(process.pid))
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code
        assert processes.all_end(5)
    assert not (folder.parent / "state" / "run").exists()
    assert "TOOK" in said
    assert "total" in said
    assert said.endswith("✓ stopped\n")


def test_a_second_run_starts_from_the_first_ones_snapshot(folder):
    from adapter.errors import SnapshotError
    from adapter.snapshot.process import find_criu

    try:
        find_criu()
    except SnapshotError as error:
        pytest.skip(error.message)
    for last_line, expected in (("  snapshot ", "snapshot of"), ("total ", "RESTORE")):
        with gpufn_run(folder, "--port", "0") as process:
            assert ask(process.stdout.readline().strip(), b"you") == "Hello, you!"
            said = ""
            for line in process.stderr:
                said += line
                if line.startswith(last_line):
                    break
            assert expected in said
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


def test_variables_and_prints_pass(folder):
    (folder / "handler.py").write_text(
        "import os\ndef handle(event, context):\n    print('called')\n    return os.environ['WHO']\n"
    )
    with gpufn_run(folder, "--port", "0", "-e", "WHO=me=you") as process:
        assert ask(process.stdout.readline().strip(), b"") == "me=you"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert "called\n" in said


def test_a_handler_that_fails_to_load_ends_it_with_the_users_own_frames(folder):
    (folder / "handler.py").write_text("def load(device):\n    raise ValueError('no weights')\ndef handle(e, c): ...\n")
    with gpufn_run(folder, "--port", "0") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ValueError: no weights at handler.py:2" in said
    assert "[handler-raised]" in said
    assert "adapter/" not in said


def test_a_folder_without_a_handler_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with gpufn_run(tmp_path / "empty", "--port", "0") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode in (1, 4)
    assert "gpufn init" in said


def test_a_folder_of_functions_names_them(folder):
    with gpufn_run(folder.parent, "--port", "0") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Folders in it that have one: hello." in said
    assert os.path.relpath(folder, REPOSITORY) in said


def test_a_snapshot_that_cannot_be_taken_says_why(folder):
    with gpufn_run(folder, "--port", "0", environment={"GPUFN_CRIU": "/nowhere/criu"}) as process:
        assert ask(process.stdout.readline().strip(), b"you") == "Hello, you!"
        said = next(line for line in process.stderr if "no snapshot" in line)
    assert "/nowhere/criu: does not run" in said
    assert said.endswith("[criu-missing]\n")


def test_a_port_in_use_says_by_whom(folder):
    with listen("127.0.0.1", 0) as taken, gpufn_run(folder, "--port", str(taken.getsockname()[1])) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 5
    assert f"Process {os.getpid()} " in said


def test_a_second_run_of_the_same_folder_is_refused(folder):
    with gpufn_run(folder, "--port", "0") as process:
        url = process.stdout.readline().strip()
        with gpufn_run(folder, "--port", "0") as second:
            _, said = second.communicate(timeout=60)
            assert second.returncode == 5
            assert str(process.pid) in said
        assert ask(url, b"you") == "Hello, you!"


def test_replicas_end_when_it_is_killed(folder):
    with gpufn_run(folder, "--port", "0") as process:
        url = process.stdout.readline().strip()
        assert ask(url, b"you") == "Hello, you!"
        processes = Watched(pid for pid in session_of(process.pid) if pid != process.pid)
        process.kill()
        assert processes.all_end()
        with pytest.raises(urllib.error.URLError):
            ask(url, b"you")
