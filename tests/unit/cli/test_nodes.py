import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from adapter.cli.main import run

GI = 2**30
HELD = {"replica": "embed-1", "function": "embed.openfaas-fn", "state": "running", "bytes": 16 * GI}
PARKED = {"replica": "chat-1", "function": "chat.openfaas-fn", "state": "parked", "bytes": 24 * GI}
DEVICE = {
    "uuid": "GPU-1", "model": "NVIDIA L4", "slice": False, "memory_bytes": 24 * GI, "free_bytes": 8 * GI,
    "holders": [HELD], "parked": [PARKED],
}  # fmt: skip
NODE = {"node": "box", "driver": "580.1", "why_not": "", "devices": [DEVICE], "waiting": ["chat.openfaas-fn"]}


@pytest.fixture
def nodes():
    return [NODE]


@pytest.fixture
def gateway(nodes):
    """A gateway that shows `nodes`."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/gpufn/v1/nodes"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(nodes).encode())

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_gpu_and_who_has_it(gateway, state_dir, capsys):
    assert run(["nodes", "-g", gateway, "--state", str(state_dir)]) == 0
    said = capsys.readouterr()
    header, row = said.out.splitlines()
    assert header.split("  ")[0] == "GPU"
    assert row.split() == ["GPU-1", "NVIDIA", "L4", "24.0Gi", "8.0Gi", "embed-1", "running", "16.0Gi", "chat-1"]
    assert "Waiting for one: chat.openfaas-fn" in said.err


@pytest.mark.parametrize(("form", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_all_of_it_for_programs(gateway, state_dir, capsys, form, read):
    assert run(["nodes", "-g", gateway, "--state", str(state_dir), "-o", form]) == 0
    assert read(capsys.readouterr().out) == [{"node": "box", "driver": "580.1", **DEVICE}]


@pytest.mark.parametrize("nodes", [[{**NODE, "devices": [], "waiting": [], "why_not": "No driver."}]])
def test_a_machine_without_a_gpu_says_why(gateway, state_dir, capsys):
    assert run(["nodes", "-g", gateway, "--state", str(state_dir)]) == 0
    assert capsys.readouterr().err.strip() == "box has no GPU. No driver."
