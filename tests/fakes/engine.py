"""A container engine on a Unix socket, as much of it as `adapter.hosts.engine` speaks to.

Its containers are processes of this machine: the real entrypoint, with what was mounted found where it lies. What an
image is, a test says: a folder with a handler, or a command that ends at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KNOWN_CAPABILITIES = ("CHECKPOINT_RESTORE",)
LINE_TARGET = "/run/gpufn"


@dataclass
class FakeImage:
    """`command` instead of the entrypoint, or the entrypoint of the function in `folder`."""

    folder: Path | None = None
    command: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    user: str = ""
    origins: tuple[str, ...] = ()


@dataclass
class FakeContainer:
    id: str
    config: dict[str, Any]
    image: FakeImage
    process: subprocess.Popen[bytes] | None = None
    output: tuple[int, int] = field(default_factory=os.pipe)


class FakeEngine:
    """`images` by reference; `containers` that are not removed; `created` keeps every configuration asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: dict[str, FakeImage] = {}
        self.pullable: dict[str, FakeImage] = {}
        self.name = "Engine"
        self.networks = ["host", "none", "bridge"]
        self.capabilities = KNOWN_CAPABILITIES
        self.containers: dict[str, FakeContainer] = {}
        self.created: list[dict[str, Any]] = []
        self.pulls: list[str] = []

    def create(self, config: dict[str, Any]) -> FakeContainer:
        image = next(image for name, image in self.images.items() if f"sha256:{name}" == config["Image"])
        container = FakeContainer(f"{len(self.created):064x}", config, image)
        self.created.append(config)
        self.containers[container.id] = container
        return container

    def start(self, container: FakeContainer) -> None:
        mounts = {mount["Target"]: mount["Source"] for mount in container.config["HostConfig"]["Mounts"]}
        own = dict(text.split("=", 1) for text in container.config["Env"])
        own = {name: value.replace(LINE_TARGET, mounts[LINE_TARGET]) for name, value in own.items()}
        repository = str(Path(__file__).parents[2])
        container.process = subprocess.Popen(
            container.image.command or (sys.executable, "-m", "adapter.runtime"),
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": repository,
                "GPUFN_FOLDER": str(container.image.folder),
                **own,
            },
            stdin=subprocess.DEVNULL,
            stdout=container.output[1],
            stderr=container.output[1],
            start_new_session=True,
        )
        os.close(container.output[1])

    def end(self, container: FakeContainer) -> None:
        if container.process is not None and container.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(container.process.pid, signal.SIGKILL)
            container.process.wait()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: FakeEngine

    def log_message(self, *args: object) -> None:
        pass

    def address_string(self) -> str:
        return "unix"

    def _answer(self, status: int, body: Any = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        with suppress(OSError):  # who asked has gone
            self.end_headers()
            self.wfile.write(data)

    def _serve(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        words = [unquote(word) for word in parts.path.split("/")[2:]]  # without the version
        try:
            self._route(words, query, body)
        except KeyError as error:
            self._answer(404, {"message": f"No such thing: {error}"})

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815

    def _route(self, words: list[str], query: dict[str, str], body: Any) -> None:
        engine = self.engine
        if words == ["version"]:
            self._answer(200, {"Version": "0.1", "Components": [{"Name": engine.name}]})
        elif words == ["networks"]:
            self._answer(200, [{"Name": name} for name in engine.networks])
        elif words[0] == "images":
            self._image(words[1:], query)
        elif words == ["containers", "json"]:
            label = json.loads(query["filters"])["label"][0].split("=")
            ids = [c.id for c in engine.containers.values() if c.config["Labels"].get(label[0]) == label[1]]
            self._answer(200, [{"Id": identity} for identity in ids])
        elif words == ["containers", "create"]:
            self._create(body)
        else:
            self._container(engine.containers[words[1]], words[2:])

    def _image(self, words: list[str], query: dict[str, str]) -> None:
        engine = self.engine
        if words == ["create"]:
            name = f"{query['fromImage']}:{query['tag']}"
            engine.pulls.append(name)
            if name in engine.pullable:
                engine.images[name] = engine.pullable[name]
                self._answer(200, {"status": "done"})
            else:
                self._answer(200, {"error": "manifest unknown"})
            return
        name = "/".join(words[:-1])
        image = engine.images[name]
        config = {"Labels": image.labels, "User": image.user, "Env": None}
        self._answer(200, {"Id": f"sha256:{name}", "Config": config, "RepoDigests": list(image.origins)})

    def _create(self, config: dict[str, Any]) -> None:
        unknown = [name for name in config["HostConfig"]["CapAdd"] if name not in self.engine.capabilities]
        if unknown:
            self._answer(400, {"message": f'invalid CapAdd: unknown capability: "CAP_{unknown[0]}"'})
        else:
            self._answer(201, {"Id": self.engine.create(config).id})

    def _container(self, container: FakeContainer, words: list[str]) -> None:
        if not words:  # DELETE
            self.engine.end(container)
            self.engine.containers.pop(container.id, None)
            self._answer(204)
        elif words == ["start"]:
            self.engine.start(container)
            self._answer(204)
        elif words == ["wait"]:
            assert container.process is not None
            code = container.process.wait()
            self._answer(200, {"StatusCode": code if code >= 0 else 128 - code})
        elif words == ["attach"]:
            self._attach(container)

    def _attach(self, container: FakeContainer) -> None:
        self.wfile.write(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        self.close_connection = True
        with suppress(OSError):
            while data := os.read(container.output[0], 65536):
                self.wfile.write(bytes([1, 0, 0, 0]) + len(data).to_bytes(4, "big") + data)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextmanager
def fake_engine(path: Path):
    """A `FakeEngine` that answers at `path`; nothing that it started is left."""
    engine = FakeEngine(path)
    handler = type("Handler", (_Handler,), {"engine": engine})
    server = _Server(str(path), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield engine
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        for container in list(engine.containers.values()):
            engine.end(container)
        shutil.rmtree(path, ignore_errors=True)
