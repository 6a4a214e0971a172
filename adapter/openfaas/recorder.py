"""Who keeps leases and start records: a ledger of this machine, or nobody beyond what is shown.

A `LedgerRecorder` writes beside the event loop: no request waits for its disk. On a cluster, agents write leases from
what kubelets say and start records from what replicas log; a `RecentStarts` only remembers the last ones, and reads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from typing import Protocol

from adapter.errors import LedgerError
from adapter.ledger.held import Ask
from adapter.ledger.store import Ledger
from adapter.openfaas.members import Member
from adapter.policy.budget import held_gpu_s
from adapter.policy.leases import CPU_DEVICE, Holder, LeaseTracker
from adapter.records import LeaseInterval, LeasePhase, StartRecord

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
"""Open leases are written this often: what a crash can lose."""

_RETRY_S = 1.0
_FLUSH_LIMIT_S = 1.0
_LAST_TRIES = 3
"""For what is left when the gateway stops: a ledger that is broken must not keep it running."""


_RECENT = 1000


class Recorder(Protocol):
    """Methods but `close` and `starts` are immediate."""

    def start(self) -> None: ...

    def started(self, record: StartRecord) -> None: ...

    def observe(self, member: Member) -> None:
        """The member's phase may have changed. Called twice a request."""

    def ended(self, member: Member) -> None: ...

    async def starts(self, function: str | None, namespace: str | None, limit: int) -> list[StartRecord]:
        """Of one function, or of all; the latest first."""

    async def held(self, start_ns: int, end_ns: int) -> Mapping[str, float]:
        """GPU-seconds held in ``[start_ns, end_ns)`` up to now by ``name.namespace``. Raises `AdapterError` where that
        cannot be found out now."""

    async def close(self) -> None: ...


class RecentStarts:
    """See `Recorder`. The last starts of this life; `held` asks the cluster's ledger, which agents write."""

    def __init__(self, held: Ask) -> None:
        self._held = held
        self._records: deque[StartRecord] = deque(maxlen=_RECENT)

    def start(self) -> None:
        """Nothing runs."""

    def started(self, record: StartRecord) -> None:
        self._records.appendleft(record)

    def observe(self, member: Member) -> None:
        """An agent sees it."""

    def ended(self, member: Member) -> None:
        """An agent sees it."""

    async def starts(self, function: str | None, namespace: str | None, limit: int) -> list[StartRecord]:
        found = (r for r in self._records if function in (None, r.function) and namespace in (None, r.namespace))
        return list(islice(found, limit))

    async def held(self, start_ns: int, end_ns: int) -> Mapping[str, float]:
        return await self._held(start_ns, end_ns)

    async def close(self) -> None:
        """Nothing is left to write."""


class LedgerRecorder:
    """See `Recorder`. One ledger's only writer."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._leases = LeaseTracker(time.time_ns(), time.monotonic_ns())
        self._phases: dict[str, LeasePhase] = {}
        self._queue: asyncio.Queue[list[LeaseInterval] | StartRecord] = asyncio.Queue()
        self._closing = asyncio.Event()

    def start(self) -> None:
        self._writer = asyncio.create_task(self._write())
        self._heart = asyncio.create_task(self._beat())

    async def close(self) -> None:
        """Write what is left."""
        self._heart.cancel()
        self._keep(self._leases.heartbeat(time.monotonic_ns()))
        self._closing.set()
        self._queue.put_nowait([])
        await self._writer
        await asyncio.to_thread(self._ledger.close)

    async def starts(self, function: str | None, namespace: str | None, limit: int) -> list[StartRecord]:
        await self.flush()
        return await asyncio.to_thread(self._ledger.starts, function, namespace, limit)

    async def held(self, start_ns: int, end_ns: int) -> Mapping[str, float]:
        await self.flush()
        told = await asyncio.to_thread(self._ledger.summary, start_ns, end_ns)
        untold = self._leases.untold(time.monotonic_ns())  # what is told meanwhile the next look will find
        return held_gpu_s([*told, *untold], start_ns, end_ns)

    async def flush(self) -> None:
        """Wait, for a moment at most, until what was reported so far can be read."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._queue.join(), _FLUSH_LIMIT_S)

    def started(self, record: StartRecord) -> None:
        self._queue.put_nowait(record)

    def observe(self, member: Member) -> None:
        """The member's phase may have changed. Called twice a request."""
        phase = member.lease_phase
        if phase is not self._phases.get(member.replica.id):
            self._phases[member.replica.id] = phase
            self._keep(self._leases.observe(_holder(member), phase, time.monotonic_ns()))

    def ended(self, member: Member) -> None:
        self._phases.pop(member.replica.id, None)
        self._keep(self._leases.end(member.replica.id, time.monotonic_ns()))

    def _keep(self, intervals: list[LeaseInterval]) -> None:
        if intervals:
            self._queue.put_nowait(intervals)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._leases.set_calendar(time.time_ns(), time.monotonic_ns())
            self._keep(self._leases.heartbeat(time.monotonic_ns()))

    async def _write(self) -> None:
        failures = 0
        batch: list[list[LeaseInterval] | StartRecord] = []
        while True:
            batch.append(await self._queue.get())
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            while batch:
                try:
                    await asyncio.to_thread(self._append, batch)
                    for _ in batch:
                        self._queue.task_done()
                    failures, batch = 0, []
                except LedgerError as error:  # rows have ids: what did get in counts once
                    failures += 1
                    logger.error("the ledger refuses", extra={"fields": {"why": error.why, "hint": error.hint}})  # noqa: TRY400
                    if self._closing.is_set() and failures >= _LAST_TRIES:
                        return
                    await asyncio.sleep(_RETRY_S)
            if self._closing.is_set() and self._queue.empty():
                return

    def _append(self, batch: list[list[LeaseInterval] | StartRecord]) -> None:
        self._ledger.add_intervals(interval for item in batch if isinstance(item, list) for interval in item)
        for item in batch:
            if isinstance(item, StartRecord):
                self._ledger.add_start(item)


def _holder(member: Member) -> Holder:
    deployment, grant = member.replica.deployment, member.grant
    spec = deployment.spec
    return Holder(
        function=deployment.name,
        namespace=deployment.namespace,
        revision=deployment.revision,
        replica=member.replica.id,
        tenant=spec.tenant,
        price_class=spec.price_class,
        device=",".join(grant.uuids) if grant else CPU_DEVICE,
        share=grant.share if grant else 1.0,
        gpu_model=grant.devices[0].model if grant else "",
    )
