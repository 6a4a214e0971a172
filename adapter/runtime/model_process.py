"""The model process as its entrypoint has it: its launch, its status lines, its channel, and its end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapter.runtime import launch
from adapter.runtime.channel import Channel
from adapter.runtime.loop import Loop
from adapter.runtime.orders import Orders
from adapter.snapshot.process import ProcessFacts, error_lines
from adapter.snapshot.store import Snapshot

_LINE_LIMIT_BYTES = 2**20


class ModelProcess:
    """One at a time. `on_status` gets its status lines; `pid` is 0 while there is none."""

    def __init__(self, loop: Loop, runtime_dir: Path, on_status: Callable[[dict[str, Any]], object]) -> None:
        self.pid = 0
        self.channel: Channel | None = None
        self._loop = loop
        self._runtime_dir = runtime_dir
        self._on_status = on_status
        self._launched: launch.Launched | None = None
        self._rest = b""

    def start(self, python: str, environment: Mapping[str, str], orders: Orders) -> None:
        """From nothing. Raises `OSError`."""
        launched = launch.start_model(python, environment)
        self._begin(launched, launched.pid, orders)

    def restore(self, snapshot: Snapshot, environ: Mapping[str, str], orders: Orders) -> None:
        """From a process snapshot. Raises `OSError` and `SnapshotError`."""
        pid = ProcessFacts.of(snapshot.facts).pid
        self._begin(launch.restore_model(snapshot, self._runtime_dir, environ), pid, orders)

    def _begin(self, launched: launch.Launched, pid: int, orders: Orders) -> None:
        self._launched, self.pid, self._rest = launched, pid, b""
        os.set_blocking(launched.orders_fd, False)
        os.set_blocking(launched.status_fd, False)
        with suppress(OSError):  # read when the process gets to its snapshot point; one that died is reaped
            os.write(launched.orders_fd, orders.to_line())
        self._loop.watch(launched.status_fd, self.read_status)

    def read_status(self) -> None:
        """What it has said; its end may be noticed before its last words."""
        if self._launched is None:
            return
        try:
            data = os.read(self._launched.status_fd, 65536)
        except BlockingIOError:
            return
        if not data:
            self._loop.forget(self._launched.status_fd)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_LINE_LIMIT_BYTES:]
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # user code may write to any descriptor
                self._on_status(json.loads(line))

    def meet(self, channel: Channel, hear: Callable[[], object]) -> None:
        self.channel = channel
        self._loop.watch(channel.fileno(), hear)

    def say(self, op: str, **fields: Any) -> bool:
        """False where it has no channel, or is gone."""
        return self.channel is not None and self.channel.send({"op": op, **fields})

    def is_restorer(self, pid: int) -> bool:
        """Whether `pid` is the CRIU that restores it."""
        return self._launched is not None and self._launched.criu and pid == self._launched.pid

    def restorer_said(self) -> str:
        return error_lines(self._launched.log) if self._launched is not None and self._launched.log else ""

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def ended(self) -> None:
        """It was reaped: its id may be another's from now on."""
        self.pid = 0

    def drop(self) -> None:
        """Nothing of it is left: its pipes, its channel, itself."""
        if self._launched is not None:
            self._loop.forget(self._launched.status_fd)
            if self._launched.criu:
                with suppress(ProcessLookupError):
                    os.kill(self._launched.pid, signal.SIGKILL)
            self._launched.close()
            self._launched = None
        if self.channel is not None:
            self._loop.forget(self.channel.fileno())
            self.channel.close()
            self.channel = None
        if self.pid:
            self.signal(signal.SIGKILL)
            self.pid = 0
