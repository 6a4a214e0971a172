"""Runs reconcilers on the replica that leads.

A reconciler makes one object, named by a key, what it should be, from what is there now: it is told neither what
happened nor how often, so a change that is missed or told twice costs time and no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from adapter.cluster.api import NOT_LEADER
from adapter.cluster.queue import WorkQueue
from adapter.controller.metrics import ControllerMetrics
from adapter.errors import AdapterError

logger = logging.getLogger(__name__)

_WORKERS = 4
"""Of one reconciler: keys that wait for the API server do not hold up all others."""


class Reconciler(Protocol):
    """What it writes, it writes through an `Api` that is fenced by the election."""

    name: str
    """A metric label."""

    def start(self, changed: Callable[[str], None]) -> None:
        """Called once, before anything else: `changed` is to be called with each key that something happened to.
        While this replica does not lead, that does nothing."""

    def all_keys(self) -> Iterable[str]:
        """All that there are, for a replica that begins to lead."""

    async def reconcile(self, key: str) -> float | None:
        """Seconds until the key is wanted again though nothing happens; None: not before. Whatever it raises, the key
        comes again after a pause."""


class Reconcilers:
    """A set of reconcilers with a queue each. `lead` is for `Election.run`."""

    def __init__(self, reconcilers: Sequence[Reconciler], metrics: ControllerMetrics) -> None:
        self._reconcilers, self._metrics = reconcilers, metrics
        self._queues: dict[str, WorkQueue[str]] = {}
        """Empty while another leads."""
        for reconciler in reconcilers:
            reconciler.start(self._adder(reconciler.name))

    def _adder(self, name: str) -> Callable[[str], None]:
        def changed(key: str) -> None:
            if name in self._queues:
                self._queues[name].add(key)

        return changed

    async def lead(self) -> None:
        """Until it is cancelled."""
        self._queues = {reconciler.name: WorkQueue() for reconciler in self._reconcilers}
        self._metrics.leads(does=True)
        try:
            for reconciler in self._reconcilers:
                for key in reconciler.all_keys():
                    self._queues[reconciler.name].add(key)
            await asyncio.gather(*(self._work(r) for r in self._reconcilers for _ in range(_WORKERS)))
        finally:
            self._metrics.leads(does=False)
            for queue in self._queues.values():
                queue.close()
            self._queues = {}

    def waiting(self) -> dict[str, int]:
        """Keys that await work, by reconciler."""
        return {name: len(queue) for name, queue in self._queues.items()}

    async def _work(self, reconciler: Reconciler) -> None:
        queue = self._queues[reconciler.name]
        clock = asyncio.get_running_loop().time
        while True:
            key, waited_s = await queue.get()
            begun = clock()
            try:
                await self._reconcile(reconciler, key, queue)
            finally:
                queue.done(key)
            self._metrics.lag.labels(reconciler.name).observe(waited_s + clock() - begun)

    async def _reconcile(self, reconciler: Reconciler, key: str, queue: WorkQueue[str]) -> None:
        try:
            again_s = await reconciler.reconcile(key)
        except AdapterError as exc:
            self._failed(reconciler, key, exc.code, exc)
            queue.retry(key)
        except Exception as exc:  # one key that is odd must not stop the others
            logger.exception("a reconciler failed", extra={"fields": {"reconciler": reconciler.name, "key": key}})
            self._failed(reconciler, key, "failed", exc)
            queue.retry(key)
        else:
            queue.forget(key)
            if again_s is not None:
                queue.add_after(key, again_s)

    def _failed(self, reconciler: Reconciler, key: str, code: str, exc: Exception) -> None:
        self._metrics.failures.labels(reconciler.name, code).inc()
        log = logger.info if code in {NOT_LEADER, "conflict"} else logger.warning
        fields = {"reconciler": reconciler.name, "key": key, "code": code, "why": str(exc)}
        log("an object is not yet what it should be", extra={"fields": fields})
