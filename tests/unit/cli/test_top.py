import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adapter.cli import top
from adapter.cli.main import run


def replica(name, function="embed", namespace="openfaas-fn", **changes):
    fields = {
        "function": function, "namespace": namespace, "replica": name, "revision": "1", "state": "serving",
        "in_flight": 2, "rung": "restore", "building_snapshot": False,
    }  # fmt: skip
    return fields | changes


@pytest.fixture
def gateway():
    """A gateway with three replicas."""
    rows = [
        replica("embed-2"),
        replica("embed-1", building_snapshot=True),
        replica("x-1", "x", "other", state="starting", rung=""),
    ]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/gpufn/v1/replicas":
                return self.answer(200, json.dumps(rows))
            assert self.path.startswith("/system/function/")
            if self.path.startswith("/system/function/sleeps?"):
                return self.answer(200, "{}")
            return self.answer(404, "No function absent.openfaas-fn.")

        def answer(self, status, text):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_replicas_in_order(gateway, state_dir, capsys):
    assert run(["top", "-g", gateway, "--state", str(state_dir)]) == 0
    header, first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["REPLICA", "FUNCTION", "STATE", "IN-FLIGHT", "RUNG"]
    assert first == ["embed-1", "embed", "serving", "2", "restore"]
    assert second[0] == "embed-2"


def test_replicas_of_every_namespace(gateway, state_dir, capsys):
    assert run(["top", "-A", "-g", gateway, "--state", str(state_dir)]) == 0
    header, *_, last = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[2] == "NAMESPACE"
    assert last == ["x-1", "x", "other", "starting", "2", "–"]


def test_a_function_at_zero_is_not_one_that_is_unknown(gateway, state_dir, capsys):
    assert run(["top", "sleeps", "-g", gateway, "--state", str(state_dir)]) == 0
    assert "No replicas of sleeps.openfaas-fn" in capsys.readouterr().err
    assert run(["top", "absent", "-g", gateway, "--state", str(state_dir)]) == 4


@pytest.mark.parametrize(
    ("name", "count"), [("embed", 2), ("embed.openfaas-fn", 2), ("sleeps.other", 0), ("x.other", 1)]
)
def test_replicas_of_one_function(gateway, state_dir, capsys, name, count):
    assert run(["top", name, "-g", gateway, "--state", str(state_dir), "-o", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == count


def test_wide_says_whose_snapshot_is_being_taken(gateway, state_dir, capsys):
    assert run(["top", "embed", "-g", gateway, "--state", str(state_dir), "-o", "wide"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["SNAPSHOT", "building", "–"]


def test_watching_goes_on_until_it_is_interrupted(gateway, state_dir, capsys, monkeypatch):
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    assert run(["top", "-A", "-w", "--every", "5", "-g", gateway, "--state", str(state_dir), "-o", "name"]) == 130
    assert capsys.readouterr().out.split() == ["embed-1", "embed-2", "x-1"] * 3
    assert waited == [5.0] * 3


def test_a_terminal_is_drawn_anew(gateway, state_dir, capsys, monkeypatch):
    cleared = []

    def sleep(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    monkeypatch.setattr(top.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(top.click, "clear", lambda: cleared.append(True))
    assert run(["top", "-A", "-w", "-g", gateway, "--state", str(state_dir)]) == 130
    assert cleared == [True]
    assert "3 replicas at" in capsys.readouterr().err


def test_no_gateway_is_said(state_dir, free_port, capsys):
    assert run(["top", "-g", f"http://127.0.0.1:{free_port}", "--state", str(state_dir)]) == 6
    assert "gpufn up" in capsys.readouterr().err
