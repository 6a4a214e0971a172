"""A replica of the process host: follows one shell's events, output and end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from adapter.errors import Timeout
from adapter.hosts import Deployment, EventSink, ReplicaState
from adapter.hosts.replica_log import ReplicaLog
from adapter.hosts.shell import Shell
from adapter.records import Event, EventName
from adapter.replica import Command

logger = logging.getLogger(__name__)

_EVENT_LIMIT_BYTES = 2**20
_LAST_OUTPUT_S = 5.0
"""How long to read on after the end, where something else still holds the output."""
_KILL_LIMIT_S = 30.0
_START_SLACK_S = 40.0
"""An entrypoint ends a start that takes too long itself, and says so; here is for one that does not. It may
lose half a minute on a restore that hangs before it begins the start that has a limit."""
_FLOOD_PAUSE_S = 0.01
"""Between two looks at the output of a replica that prints too much: everybody else comes first."""


class ProcessReplica:
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
        self.id = identity
        self.deployment = deployment
        self.host = "127.0.0.1"
        self.port = port
        self.state = ReplicaState.STARTING
        self.building_snapshot = False
        self._shell = shell
        self._log = log
        self._sink = sink
        self._on_ended = on_ended
        self._events_rest = b""
        self._open = {shell.events_fd, shell.output_fd, shell.exit_fd}
        self._gone = asyncio.Event()
        self._last_call: asyncio.TimerHandle | None = None
        self._flood_pause: asyncio.TimerHandle | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._given_up: dict[str, str] = {}

    @property
    def pid(self) -> int:
        """Of the outermost process; killing it ends the replica."""
        return self._shell.pid

    def watch(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._shell.events_fd, self._read_events)
        loop.add_reader(self._shell.output_fd, self._read_output)
        loop.add_reader(self._shell.exit_fd, self._exited)
        limit_s = self.deployment.spec.start_timeout_s + _START_SLACK_S
        self._patience = loop.call_later(limit_s, self._give_up, limit_s)

    def park(self) -> None:
        self._shell.say(Command.PARK)

    def resume(self, devices: Sequence[str]) -> None:
        self._shell.say(Command.resume(devices))

    async def stop(self, grace_s: float) -> None:
        """Raises `Timeout` where the kernel does not end a killed process."""
        if self.state is not ReplicaState.GONE:
            self.state = ReplicaState.STOPPING
            self._shell.say(Command.STOP)
        with suppress(asyncio.TimeoutError):
            await self._wait_gone(grace_s)
            return
        self.kill()
        try:
            await self._wait_gone(_KILL_LIMIT_S)
        except asyncio.TimeoutError as exc:
            raise Timeout(
                f"The replica {self.id} does not end.",
                why=f"Process {self.pid} was killed {_KILL_LIMIT_S:g} s ago and is still there: it waits inside the kernel.",
                hint=f"See what for: cat /proc/{self.pid}/stack",
                code="unkillable",
            ) from exc

    async def _wait_gone(self, limit_s: float) -> None:
        await asyncio.wait_for(self._gone.wait(), limit_s)
        await self._log.flush()

    def kill(self) -> None:
        """At once, without a drain: for replicas that do not answer, and for tests."""
        if self.state is not ReplicaState.GONE:
            self._shell.kill()

    def _give_up(self, limit_s: float) -> None:
        self._given_up = {"code": "start-timeout", "reason": f"did not come up within {limit_s:g} s and was killed"}
        logger.warning("a replica hangs and is killed", extra={"fields": {"replica": self.id, "limit_s": limit_s}})
        self.kill()

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
        *lines, self._events_rest = (self._events_rest + data).split(b"\n")
        if len(self._events_rest) > _EVENT_LIMIT_BYTES:
            lines.append(self._events_rest)
            self._events_rest = b""
        for line in lines:
            try:
                event = Event.from_line(line)
            except ValueError:
                logger.warning("a replica said something else than an event", extra={"fields": {"replica": self.id}})
                continue
            self._take(event)

    def _take(self, event: Event) -> None:
        if event.name is EventName.STOPPED:
            return  # said once, by us, when nothing of it is left
        if event.name in (EventName.SERVING, EventName.FAILED) and self._patience is not None:
            self._patience.cancel()
        if event.name is EventName.SNAPSHOT:
            self.building_snapshot = event.fields.get("state") == "building"
        elif self.state is not ReplicaState.STOPPING:
            if event.name is EventName.SERVING:
                self.state = ReplicaState.SERVING
            elif event.name is EventName.PARKED:
                self.state = ReplicaState.PARKED
            elif event.name in (EventName.FAILED, EventName.MODEL_EXITED):
                self.state = ReplicaState.STARTING
        self._tell(event)

    def _tell(self, event: Event) -> None:
        try:
            self._sink(self, event)
        except Exception:  # boundary: what a listener does wrong must not end the reading of events
            logger.exception("an event was not taken", extra={"fields": {"replica": self.id, "name": event.name.value}})

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
        for timer in (self._last_call, self._flood_pause, self._patience):
            if timer is not None:
                timer.cancel()
        self._log.close()
        self.state = ReplicaState.GONE
        self.building_snapshot = False
        code = self._shell.close()
        self._on_ended(self)
        self._gone.set()
        self._tell(
            Event(EventName.STOPPED, time.time_ns(), {"exit_code": code, "reason": _reason(code), **self._given_up})
        )


def _read(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return None


def _reason(code: int) -> str:
    if code >= 0:
        return "drained" if code == 0 else f"ended with code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
