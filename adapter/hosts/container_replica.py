"""A replica in a container: its line to us, its output, and its end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError
from adapter.files import remove_tree
from adapter.hosts import Deployment, EventSink, ReplicaState
from adapter.hosts.engine import Engine
from adapter.hosts.followed import FollowedReplica
from adapter.hosts.replica_log import ReplicaLog
from adapter.records import Event, EventName

logger = logging.getLogger(__name__)

LINE = "host"
"""Name of the socket in a replica's folder: its entrypoint connects to it for its orders."""

_FLOOD_PAUSE_S = 0.01
_LAST_OUTPUT_S = 5.0
_AGAIN_S = 1.0
"""Between two questions to an engine that does not answer."""


class Line:
    """The socket that one container connects to. Its other end closes when we end, however we end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o777, parents=True)
        folder.chmod(0o777)  # whatever user the image runs as; a folder above is ours alone
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        here = os.open(folder, os.O_PATH | os.O_DIRECTORY)  # such paths are short, however deep the folder is
        try:
            self._listener.bind(f"/proc/self/fd/{here}/{LINE}")
        finally:
            os.close(here)
        (folder / LINE).chmod(0o666)
        self._listener.listen(1)
        self._connection: socket.socket | None = None

    async def give_orders(self, environment: Mapping[str, str], listener: socket.socket | None = None) -> None:
        """Once it has connected, which may take until its interpreter is up. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        self._connection, _ = await loop.sock_accept(self._listener)
        self._connection.setblocking(False)
        data = json.dumps(dict(environment)).encode() + b"\n"
        sent = socket.send_fds(self._connection, [data], [listener.fileno()] if listener else [])
        await loop.sock_sendall(self._connection, data[sent:])

    async def read(self) -> bytes:
        """What it says next; empty at its end."""
        assert self._connection is not None
        with suppress(OSError):
            return await asyncio.get_running_loop().sock_recv(self._connection, 65536)
        return b""

    def say(self, line: bytes) -> None:
        if self._connection is not None:
            with suppress(OSError):  # it is gone, or too stuck to listen: its end is noticed elsewhere
                self._connection.send(line, socket.MSG_DONTWAIT)

    def close(self) -> None:
        self._listener.close()
        if self._connection is not None:
            self._connection.close()


class ContainerReplica(FollowedReplica):
    """See `adapter.hosts.Replica`. `on_ended` is called once, before the last event; `on_due` when a snapshot is due."""

    def __init__(
        self,
        identity: str,
        deployment: Deployment,
        port: int,
        engine: Engine,
        container: str,
        home: Path,
        line: Line,
        log: ReplicaLog,
        *,
        sink: EventSink,
        on_ended: Callable[[ContainerReplica], None],
        on_due: Callable[[ContainerReplica], None],
    ) -> None:
        super().__init__(identity, deployment, port, log, sink)
        self.container = container
        self._engine = engine
        self._home = home
        self._line = line
        self._on_ended = on_ended
        self._on_due = on_due
        self._killing: asyncio.Task[None] | None = None
        self._life: asyncio.Task[None] | None = None

    def watch(self, environment: Mapping[str, str], listener: socket.socket) -> None:
        """Start the container, give it its orders, and follow it until nothing of it is left."""
        self.be_patient()
        self._life = asyncio.get_running_loop().create_task(self._live(environment, listener))

    def kill(self) -> None:
        if self.state is not ReplicaState.GONE and self._killing is None:
            self._killing = asyncio.get_running_loop().create_task(self._kill())

    async def _kill(self) -> None:
        with suppress(AdapterError):  # an engine that does not answer: its end is waited for all the same
            await self._engine.remove(self.container)

    def _command(self, line: bytes) -> None:
        self._line.say(line)

    def _why_unkillable(self) -> tuple[str, str]:
        return f"Its container {self.container[:12]}", f"See what the engine says: docker inspect {self.container[:12]}"

    def _take(self, event: Event) -> None:
        if event.name is EventName.SNAPSHOT and event.fields.get("state") == "due":
            self._on_due(self)
        else:
            super()._take(event)

    def tell_snapshot(self, fields: Mapping[str, Any], at_ns: int) -> None:
        """As if it had taken the snapshot itself."""
        if self.state is not ReplicaState.GONE:
            super()._take(Event(EventName.SNAPSHOT, at_ns, dict(fields)))

    # Its life -----------------------------------------------------------------------------------

    async def _live(self, environment: Mapping[str, str], listener: socket.socket) -> None:
        why: dict[str, Any] = {}
        code = -1
        try:
            code = await self._run(environment, listener)
        except AdapterError as error:
            why = {"code": error.code, "reason": f"{error.message} {error.why}".strip()}
            fields = {"replica": self.id, **why}
            logger.warning("a container cannot be followed", extra={"fields": fields})
        except OSError as error:
            why = {"code": "os-error", "reason": f"{error}"}
        finally:
            listener.close()
            self._line.close()
            with suppress(AdapterError):
                await self._engine.remove(self.container)
            remove_tree(self._home)
        self._on_ended(self)
        self._is_gone()
        self._tell_end(code, why)

    async def _run(self, environment: Mapping[str, str], listener: socket.socket) -> int:
        """Its exit code. Raises `AdapterError` where the engine does not do what it should."""
        async with self._engine.output(self.container) as output:
            printing = asyncio.ensure_future(self._keep_output(output))
            await self._engine.start(self.container)
            talking = asyncio.ensure_future(self._talk(environment, listener))
            try:
                code = await self._await_end(talking)
            finally:
                await asyncio.wait({printing}, timeout=_LAST_OUTPUT_S)
                for task in (printing, talking):
                    task.cancel()
                await asyncio.gather(printing, talking, return_exceptions=True)
            return code

    async def _await_end(self, talking: asyncio.Future[None]) -> int:
        """Without an engine the end of its line is its end: a container may live on while its engine is away."""
        while True:
            try:
                return await self._engine.wait(self.container)
            except AdapterError as error:
                if error.code != "no-engine" or talking.done():
                    raise
                logger.warning("the container engine is gone", extra={"fields": {"replica": self.id}})
                await asyncio.sleep(_AGAIN_S)

    async def _talk(self, environment: Mapping[str, str], listener: socket.socket) -> None:
        await self._line.give_orders(environment, listener)
        listener.close()
        if self.state is ReplicaState.STOPPING:
            self._line.close()
            return
        while data := await self._line.read():
            self.hear(data)

    async def _keep_output(self, output: Any) -> None:
        async for data in output:
            if not self._log.feed(data):
                await asyncio.sleep(_FLOOD_PAUSE_S)
