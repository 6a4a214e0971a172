"""Records what the real of-watchdog answers, scene by scene, as `conversations/<scene>.json`.

    OF_WATCHDOG=/path/to/of-watchdog python -m tests.contract.watchdog.record

Needs `waitress` beside the development environment: uv run --with waitress, or pip install waitress.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.contract.watchdog.scenario import HANDLER, LIMIT_S, SCENES, Program, Scene, open_gate, own_environment, play

FOLDER = Path(__file__).parent / "conversations"
METRICS_PORT = 8081
"""The watchdog has no setting for it."""


def conversation(scene: Scene) -> Path:
    return FOLDER / f"{scene.name.replace(' ', '-')}.json"


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def started(binary: str, scene: Scene, folder: Path) -> Program:
    port, upstream = free_ports(2)
    gate, path = open_gate(folder)
    function = [sys.executable, str(HANDLER.with_name("upstream.py")), str(HANDLER), str(upstream)]
    environment = {
        "port": str(port),
        "mode": "http",
        "upstream_url": f"http://127.0.0.1:{upstream}",
        "fprocess": " ".join(function) if scene.starts else "sleep 1000",
        "TMPDIR": str(folder),
        "GATE": path,
    }
    process = subprocess.Popen([binary], env=own_environment(environment, scene), text=True, stdout=subprocess.PIPE)
    program = Program(process, port, METRICS_PORT, folder, gate)
    answers(port if not scene.starts else upstream)
    answers(port)
    return program


def answers(port: int) -> None:
    """Until somebody answers there. A watchdog itself does not wait for its function. Metrics do not count it."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
        try:
            connection.request("GET", "/_/health")
            connection.getresponse().read()
        except OSError:
            time.sleep(0.05)
        else:
            return
        finally:
            connection.close()
    sys.exit(f"nobody answers at port {port}")


def record(binary: str) -> None:
    for old in FOLDER.glob("*.json"):
        old.unlink()
    FOLDER.mkdir(exist_ok=True)
    for scene in SCENES:
        with tempfile.TemporaryDirectory() as name:
            program = started(binary, scene, Path(name))
            try:
                heard = dict(play(scene, program))
            finally:
                program.close()
        data = {"environment": dict(scene.environment), "heard": heard}
        conversation(scene).write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    found = os.environ.get("OF_WATCHDOG") or shutil.which("of-watchdog") or shutil.which("fwatchdog")
    if found is None:
        sys.exit("no of-watchdog on the PATH; name it in OF_WATCHDOG")
    record(found)
