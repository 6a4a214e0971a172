"""CRIU alone on a published process snapshot: what of a restored wake is not gpufn's own.

    unshare --pid --fork --kill-child --mount --mount-proc python -m benchmarks.bare_restore SNAPSHOT < REQUEST

Runs `criu restore` as a hand would, gives the restored process one connection on which REQUEST (an HTTP
request as it goes over the wire) has been sent already, and prints as JSON the seconds until CRIU had ended
(`criu_s`), until the first byte of the answer's body (`first_s`) and until its last (`answer_s`), all from before
CRIU was started, and the answer.
No gateway, no entrypoint, no ladder, no checks. The process ends with the namespace.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path

from adapter.runtime.channel import Channel, listen
from adapter.runtime.orders import Orders
from adapter.snapshot.process import PIPE_DESCRIPTORS, open_memory, restore_command, restore_environment
from adapter.snapshot.store import read_snapshot
from benchmarks.session import Answer

NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc")


@dataclass(frozen=True, slots=True)
class Restored:
    """One bare restore: seconds of CRIU itself, and the answer, its seconds counted from before CRIU's start."""

    criu_s: float
    answer: Answer


def restore(snapshot: Path, body: bytes, headers: Mapping[str, str]) -> Restored:
    """One bare restore and one POST of `body`, in a namespace of its own. Raises `RuntimeError` where it fails."""
    lines = {"Host": "bench", **headers, "Connection": "close", "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    command = [*NAMESPACE, sys.executable, "-m", "benchmarks.bare_restore", str(snapshot)]
    request = f"POST / HTTP/1.1\r\n{head}\r\n".encode() + body
    done = subprocess.run(command, input=request, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the bare restore failed: {done.stderr.decode()}")
    said = json.loads(done.stdout)
    answer = Answer(said["status"], said["body"].encode(), HTTPMessage(), said["answer_s"], said["first_s"])
    return Restored(said["criu_s"], answer)


def main() -> int:
    snapshot = read_snapshot(Path(sys.argv[1]))
    images = snapshot.path / "images"
    memory = open_memory(images)
    pipes = [os.pipe() for _ in range(PIPE_DESCRIPTORS)]
    (orders_r, orders_w), *others = pipes
    ends = [orders_r, *(write_end for _, write_end in others)]
    inherited = [*ends, *([memory] if memory >= 0 else [])]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "restore.log"
        command = restore_command(snapshot.facts["criu"], images, snapshot.facts["pipes"], ends, memory, log=log)
        listener = listen(f"{folder}/c")
        listener.setblocking(True)
        port = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(port.getsockname())
        client.sendall(sys.stdin.buffer.read())
        connection, _ = port.accept()
        os.write(orders_w, _orders(f"{folder}/c").to_line())
        began = time.perf_counter()
        criu = subprocess.Popen(command, pass_fds=inherited, env=restore_environment(os.environ, images))
        if criu.wait():
            print(log.read_text(), file=sys.stderr)
            return 1
        criu_s = time.perf_counter() - began
        channel = Channel(listener.accept()[0])
        channel.receive()  # hello
        channel.send({"op": "serve", "listener": True}, [port.fileno(), connection.fileno()])
        connection.close()
        response = HTTPResponse(client)
        response.begin()
        body = response.read(1)
        first_s = time.perf_counter() - began
        body += response.read()
        answer_s = time.perf_counter() - began
    said = {"criu_s": criu_s, "first_s": first_s, "answer_s": answer_s}
    print(json.dumps({**said, "status": response.status, "body": body.decode()}))
    return 0


def _orders(channel: str) -> Orders:
    return Orders(
        channel=channel,
        restored=True,
        weights="",
        environment={},
        secrets_dir="",
        hostname="bench",
        in_flight=1,
        queue=0,
        exec_timeout_s=0,
        drain_timeout_s=1,
        ready_path="",
        log_call_id=False,
    )


if __name__ == "__main__":
    sys.exit(main())
