"""Knative's runtime contract, and what func deploys expect, of an entrypoint that is started by its environment alone."""

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

HANDLER = """
def load(device):
    return "warm"

def handle(event, context):
    return {"body": {"path": event.path, "probe": event.headers.get("K-Network-Probe"), "model": context.model}}
"""


class Replica:
    def __init__(self, process, port):
        self.process = process
        self.port = port

    def event(self, name):
        """The next event of that name, once it has come."""
        while line := self.process.stdout.readline():
            event = json.loads(line)
            if event["event"] == name:
                return event
        raise AssertionError(f"it ended before {name}")

    def ask(self, path="/", host="127.0.0.1", **headers):
        with closing(HTTPConnection(host, self.port, timeout=30)) as connection:
            connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()


@contextmanager
def replica(folder, port, handler=HANDLER, **environment):
    write_function(folder, "fn", handler)
    temporary = folder / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "adapter.runtime"],
        env={
            "PATH": os.environ["PATH"],
            "GPUFN_FOLDER": str(folder / "fn"),
            "GPUFN_METRICS_PORT": "0",
            "TMPDIR": str(temporary),
            **environment,
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Replica(process, port)
    finally:
        process.terminate()  # a model process that still loads ends with it
        process.communicate(timeout=60)


def test_it_listens_on_every_address_at_the_port_that_it_is_told(tmp_path, free_port):
    with replica(tmp_path, free_port, PORT=str(free_port)) as fn:
        fn.event("serving")
        assert fn.ask(host="127.0.0.2")[0] == 200


def test_func_tells_the_port_as_an_address(tmp_path, free_port):
    with replica(tmp_path, free_port, LISTEN_ADDRESS=f"[::]:{free_port}") as fn:
        assert fn.event("listening")["port"] == free_port


@pytest.mark.parametrize(("path", "status"), [("/health/liveness", 200), ("/health/readiness", 503)])
def test_while_the_model_loads_it_is_alive_and_not_ready(tmp_path, free_port, path, status):
    handler = "import time\ndef load(device):\n    time.sleep(1000)\ndef handle(event, context): ...\n"
    with replica(tmp_path, free_port, handler, PORT=str(free_port)) as fn:
        fn.event("listening")
        assert fn.ask(path, User_Agent="kube-probe/1.33")[0] == status


@pytest.mark.parametrize("path", ["/health/liveness", "/health/readiness"])
def test_once_it_serves_it_is_alive_and_ready(tmp_path, free_port, path):
    with replica(tmp_path, free_port, PORT=str(free_port)) as fn:
        fn.event("serving")
        assert fn.ask(path, User_Agent="kube-probe/1.33") == (200, "OK")


def test_probes_that_only_connect_take_no_requests_place(tmp_path, free_port):
    with replica(tmp_path, free_port, PORT=str(free_port), max_inflight="1") as fn:
        fn.event("serving")
        for _ in range(50):
            socket.create_connection(("127.0.0.1", free_port)).close()
            assert fn.ask()[0] == 200


def test_a_network_probe_is_the_proxys_to_answer_and_here_a_request_like_any(tmp_path, free_port):
    with replica(tmp_path, free_port, PORT=str(free_port)) as fn:
        fn.event("serving")
        status, body = fn.ask("/healthz", K_Network_Probe="queue")
        assert (status, json.loads(body)["probe"]) == (200, "queue")


def test_its_records_have_the_names_of_service_and_revision(tmp_path, free_port):
    names = {"K_SERVICE": "embed", "K_REVISION": "embed-00007", "K_CONFIGURATION": "embed"}
    with replica(tmp_path, free_port, PORT=str(free_port), **names) as fn:
        record = fn.event("started")["record"]
        assert (record["function"], record["revision"]) == ("embed", "embed-00007")


def test_sigterm_after_the_proxys_drain_ends_it_at_once_and_well(tmp_path, free_port):
    with replica(tmp_path, free_port, PORT=str(free_port)) as fn:
        fn.event("serving")
        fn.process.send_signal(signal.SIGTERM)
        assert fn.process.wait(timeout=30) == 0


def test_nothing_but_the_temporary_folder_is_written_to(tmp_path, free_port):
    with replica(tmp_path, free_port, PORT=str(free_port), PYTHONDONTWRITEBYTECODE="1") as fn:
        fn.event("serving")
        assert fn.ask()[0] == 200
        assert [path.name for path in (tmp_path / "fn").iterdir()] == ["handler.py"]
        assert {path.name for path in tmp_path.iterdir()} == {"fn", "tmp"}
