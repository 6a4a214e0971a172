"""A replica of the process host: follows one shell's events, output and end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from adapter.hosts import Deployment, EventSink, ReplicaState
from adapter.hosts.followed import FollowedReplica
from adapter.hosts.replica_log import ReplicaLog
from adapter.hosts.shell import Shell

_LAST_OUTPUT_S = 5.0
"""How long to read on after the end, where something else still holds the output."""
_FLOOD_PAUSE_S = 0.01
"""Between two looks at the output of a replica that prints too much: everybody else comes first."""


class ProcessReplica(FollowedReplica):
    """See `adapter.hosts.Replica`. `on_ended` is called once, before the last event."""

    def __init__(
        self,
        identity: str,
        deployment: Deployment,
        port: int,
        shell: Shell,
        log: ReplicaLog,
        *,
        sink: EventSink,
        on_ended: Callable[[ProcessReplica], None],
    ) -> None:
        super().__init__(identity, deployment, port, log, sink)
        self._shell = shell
        self._on_ended = on_ended
        self._open = {shell.events_fd, shell.output_fd, shell.exit_fd}
        self._last_call: asyncio.TimerHandle | None = None
        self._flood_pause: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int:
        """Of the outermost process; killing it ends the replica."""
        return self._shell.pid

    def watch(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._shell.events_fd, self._read_events)
        loop.add_reader(self._shell.output_fd, self._read_output)
        loop.add_reader(self._shell.exit_fd, self._exited)
        self.be_patient()

    def kill(self) -> None:
        if self.state is not ReplicaState.GONE:
            self._shell.kill()

    def _command(self, line: bytes) -> None:
        self._shell.say(line)

    def _why_unkillable(self) -> tuple[str, str]:
        return f"Process {self.pid}", f"See what for: cat /proc/{self.pid}/stack"

    # What the shell says ------------------------------------------------------------------------

    def _read_output(self) -> None:
        data = _read(self._shell.output_fd)
        if data:
            if not self._log.feed(data):
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._shell.output_fd)
                self._flood_pause = loop.call_later(_FLOOD_PAUSE_S, self._read_on)
        elif data is not None:
            self._ended(self._shell.output_fd)

    def _read_on(self) -> None:
        asyncio.get_running_loop().add_reader(self._shell.output_fd, self._read_output)

    def _read_events(self) -> None:
        data = _read(self._shell.events_fd)
        if data is None:
            return
        if not data:
            self._ended(self._shell.events_fd)
            return
        self.hear(data)

    # Its end ------------------------------------------------------------------------------------

    def _exited(self) -> None:
        """Its first process has ended. What it left running goes too, and what it said last is still read."""
        self._shell.kill()
        self._last_call = asyncio.get_running_loop().call_later(_LAST_OUTPUT_S, self._finish)
        self._ended(self._shell.exit_fd)

    def _ended(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        self._open.discard(descriptor)
        if not self._open:
            self._finish()

    def _finish(self) -> None:
        for descriptor in self._open:
            asyncio.get_running_loop().remove_reader(descriptor)
        for timer in (self._last_call, self._flood_pause):
            if timer is not None:
                timer.cancel()
        code = self._shell.close()
        self._on_ended(self)
        self._is_gone()
        self._tell_end(code, {})


def _read(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return None
