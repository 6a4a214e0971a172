"""What tests of the process host share: a host over real or fake entrypoints, and somebody who listens to it."""

from __future__ import annotations

import asyncio
import os
import select
import sys
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path

from adapter.hosts import Deployment
from adapter.hosts.folders import FunctionFolders
from adapter.hosts.process import ProcessHost
from adapter.hosts.replica_log import LogWriter
from adapter.records import EventName
from adapter.spec import parse_spec

FAKES = Path(__file__).parent
LIMIT_S = 60.0


class Listener:
    """A sink that keeps events, and waits for them."""

    def __init__(self):
        self.events = []
        self._changed = asyncio.Event()

    def __call__(self, replica, event):
        self.events.append(event)
        self._changed.set()

    @property
    def names(self):
        return [event.name for event in self.events]

    async def heard(self, name: EventName, times: int = 1):
        """The event of that name, once there are as many of it."""

        async def wait():
            while self.names.count(name) < times:
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(wait(), LIMIT_S)
        return [event for event in self.events if event.name is name][times - 1]


class AtOnce(LogWriter):
    """Writes where it is asked to, on no thread of its own; `full`: nothing, because too much waits."""

    def __init__(self):
        self.full = False

    def give(self, work):
        if not self.full:
            work()
        return not self.full


def write_function(root: Path, name: str, handler: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "handler.py").write_text(handler)
    return folder


def deployment(name: str = "fn", *, secrets: tuple[str, ...] = (), annotations=None, **env: str) -> Deployment:
    spec = parse_spec({}, annotations or {})
    return Deployment(name, "openfaas-fn", "1", f"{name}:1", spec, tuple(env.items()), secrets)


@asynccontextmanager
async def running(state: Path, functions: Path, **options):
    host = ProcessHost(state, FunctionFolders([functions]), python=Path(sys.executable), **options)
    try:
        yield host
    finally:
        await host.close()


async def ask(replica, body: bytes = b"", path: str = "/") -> bytes:
    url = f"http://{replica.host}:{replica.port}{path}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post() -> bytes:
        with opener.open(url, data=body, timeout=LIMIT_S) as answer:
            data: bytes = answer.read()
            return data

    return await asyncio.to_thread(post)


def fake_shim(folder: Path) -> Path:
    """A folder whose package `adapter` has the real vocabulary and a fake entrypoint."""
    package = folder / "adapter"
    (package / "runtime").mkdir(parents=True)
    real = Path(sys.modules["adapter"].__file__ or "").parent
    for module in real.glob("*.py"):
        (package / module.name).symlink_to(module)
    (package / "runtime" / "__init__.py").touch()
    (package / "runtime" / "__main__.py").symlink_to(FAKES / "entrypoint.py")
    return folder


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:  # it has ended
        return []


def session_of(pid: int) -> list[int]:
    """A process and all its descendants."""
    return [pid, *(below for child in children(pid) for below in session_of(child))]


class Watched:
    """Processes, kept apart from later ones with their ids."""

    def __init__(self, pids):
        self.handles = {pid: os.pidfd_open(pid) for pid in pids}

    def all_end(self, limit_s: float = LIMIT_S) -> bool:
        """Wait until all have ended; closes the handles."""
        ended = []
        for handle in self.handles.values():
            ended.append(bool(select.select([handle], [], [], limit_s)[0]))
            os.close(handle)
        return all(ended)
