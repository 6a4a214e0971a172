"""What replicas of every host have in common: their state, as their entrypoint's events tell it, and their end."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from adapter.errors import Timeout
from adapter.hosts import Deployment, EventSink, ReplicaState
from adapter.hosts.replica_log import ReplicaLog
from adapter.records import Event, EventName
from adapter.replica import Command

logger = logging.getLogger(__name__)

_EVENT_LIMIT_BYTES = 2**20
_KILL_LIMIT_S = 30.0
_START_SLACK_S = 40.0
"""An entrypoint ends a start that takes too long itself, and says so; here is for one that does not. It may
lose half a minute on a restore that hangs before it begins the start that has a limit."""


class FollowedReplica(ABC):
    """See `adapter.hosts.Replica`. A host's own kind says how it is spoken to, killed, and what it waits for."""

    host = "127.0.0.1"

    def __init__(self, identity: str, deployment: Deployment, port: int, log: ReplicaLog, sink: EventSink) -> None:
        self.id = identity
        self.deployment = deployment
        self.port = port
        self.state = ReplicaState.STARTING
        self.building_snapshot = False
        self._log = log
        self._sink = sink
        self._events_rest = b""
        self._gone = asyncio.Event()
        self._patience: asyncio.TimerHandle | None = None
        self._given_up: dict[str, str] = {}

    @abstractmethod
    def kill(self) -> None:
        """At once, without a drain: for replicas that do not answer, and for tests."""

    @abstractmethod
    def _command(self, line: bytes) -> None:
        """Say a line to its entrypoint. One that is gone is no error."""

    @abstractmethod
    def _why_unkillable(self) -> tuple[str, str]:
        """What stands in the way when it was killed and is still there, and how to look into it."""

    # What a host asks ---------------------------------------------------------------------------

    def be_patient(self) -> None:
        """From now on it has the time that its start may take; then it is killed."""
        limit_s = self.deployment.spec.start_timeout_s + _START_SLACK_S
        self._patience = asyncio.get_running_loop().call_later(limit_s, self._give_up, limit_s)

    def park(self) -> None:
        self._command(Command.PARK)

    def resume(self, devices: Sequence[str]) -> None:
        self._command(Command.resume(devices))

    async def stop(self, grace_s: float) -> None:
        """Raises `Timeout` where the kernel does not end a killed process."""
        if self.state is not ReplicaState.GONE:
            self.state = ReplicaState.STOPPING
            self._command(Command.STOP)
        with suppress(asyncio.TimeoutError):
            await self._wait_gone(grace_s)
            return
        self.kill()
        try:
            await self._wait_gone(_KILL_LIMIT_S)
        except asyncio.TimeoutError as exc:
            who, hint = self._why_unkillable()
            raise Timeout(
                f"The replica {self.id} does not end.",
                why=f"{who} was killed {_KILL_LIMIT_S:g} s ago and is still there: it waits inside the kernel.",
                hint=hint,
                code="unkillable",
            ) from exc

    async def _wait_gone(self, limit_s: float) -> None:
        await asyncio.wait_for(self._gone.wait(), limit_s)
        await self._log.flush()

    def _give_up(self, limit_s: float) -> None:
        self._given_up = {"code": "start-timeout", "reason": f"did not come up within {limit_s:g} s and was killed"}
        logger.warning("a replica hangs and is killed", extra={"fields": {"replica": self.id, "limit_s": limit_s}})
        self.kill()

    # What it says -------------------------------------------------------------------------------

    def hear(self, data: bytes) -> None:
        """Take a piece of its stream of events."""
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

    def _is_gone(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._log.close()
        self.state = ReplicaState.GONE
        self.building_snapshot = False
        self._gone.set()

    def _tell_end(self, code: int, why: Mapping[str, Any]) -> None:
        """`why` wins over what the code says."""
        fields = {"exit_code": code, "reason": _reason(code), **why, **self._given_up}
        self._tell(Event(EventName.STOPPED, time.time_ns(), fields))


def _reason(code: int) -> str:
    if code >= 0:
        return "drained" if code == 0 else f"ended with code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
