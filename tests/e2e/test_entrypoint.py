"""The entrypoint as a container engine starts it: by its environment alone, with no host beside it."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing, contextmanager
from http.client import HTTPConnection

import pytest

from tests.fakes.host import write_function

pytestmark = pytest.mark.e2e

HANDLER = "def load(device):\n    return 'warm'\ndef handle(event, context):\n    return context.model\n"


@contextmanager
def entrypoint(folder, temporary):
    """Its port, and its process. Events come line by line on its standard output."""
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-m", "adapter.runtime"],
            env={
                **os.environ,
                "GPUFN_FOLDER": str(folder),
                "GPUFN_LISTEN_FD": str(listener.fileno()),
                "GPUFN_METRICS_PORT": "0",
                "TMPDIR": str(temporary),
            },
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield listener.getsockname()[1], process
        finally:
            process.kill()
            process.communicate()


def ask(port, path="/"):
    with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_it_serves_and_ends_at_sigterm_with_nothing_left_behind(tmp_path):
    write_function(tmp_path, "fn", HANDLER)
    with entrypoint(tmp_path / "fn", tmp_path / "tmp") as (port, process):
        assert ask(port) == (200, "warm")
        assert ask(port, "/_/health")[0] == 200
        assert list((tmp_path / "tmp").iterdir())  # its channel to the model process
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert list((tmp_path / "tmp").iterdir()) == []
    events = [json.loads(line) for line in said.splitlines()]
    assert [event["event"] for event in events][-1] == "stopped"


def test_a_stop_that_comes_as_soon_as_it_listens_is_not_lost(tmp_path):
    write_function(tmp_path, "fn", HANDLER)
    with entrypoint(tmp_path / "fn", tmp_path / "tmp") as (_, process):
        assert json.loads(process.stdout.readline())["event"] == "listening"
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(said.splitlines()[-1])["event"] == "stopped"


def test_a_request_in_flight_is_answered_before_it_ends(tmp_path):
    write_function(tmp_path, "fn", "import time\ndef handle(event, context):\n    time.sleep(0.5)\n    return 'done'\n")
    with entrypoint(tmp_path / "fn", tmp_path / "tmp") as (port, process):
        with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("GET", "/")
            while json.loads(process.stdout.readline())["event"] != "serving":
                pass
            process.send_signal(signal.SIGTERM)
            assert connection.getresponse().read() == b"done"
        process.communicate(timeout=30)
    assert process.returncode == 0
