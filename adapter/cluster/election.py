"""One leader among replicas, by a Lease of Kubernetes.

Who leads is fenced by its own monotonic clock, not by what it last heard: its writes end before another's could begin,
also when the API server hangs, when this process or its machine was stopped for a minute, and when somebody sets the clock. Others wait
for a lease's whole time from when they last *saw* it renewed, which is never before the renewal was sent.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from adapter.cluster.api import Api, Patience
from adapter.cluster.backoff import a_little_less
from adapter.cluster.resources import LEASES
from adapter.errors import AdapterError, NotFound
from adapter.keys import SYSTEM_NAMESPACE

logger = logging.getLogger(__name__)


def _boot_time_s() -> float:
    """Goes on while the machine sleeps, as others' clocks do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Terms:
    """As Kubernetes' own components have them. A leader that could not renew for `renew_s` of the lease's `lease_s`
    leads no more: what is between is for its last writes and for clocks that run apart."""

    lease_s: int = 15
    renew_s: float = 10.0
    retry_s: float = 2.0


class Election:
    """`run` leads whenever this replica, `identity`, holds the Lease `name`."""

    def __init__(
        self,
        api: Api,
        name: str,
        identity: str,
        *,
        namespace: str = SYSTEM_NAMESPACE,
        terms: Terms = Terms(),
        clock: Callable[[], float] = _boot_time_s,
    ) -> None:
        self.identity = identity
        self._api, self._clock, self._terms = api, clock, terms
        self._collection, self._path = LEASES.path(namespace), LEASES.path(namespace, name)
        self._body = LEASES.body(name, namespace)
        self._patience = Patience(total_s=terms.renew_s / 2, attempts=1, paced=False)
        self._until = 0.0
        """On our clock: until when we may write."""
        self._seen: tuple[Any, float] = (None, 0.0)
        """The lease as somebody else wrote it, and when on our clock we saw that first."""

    def left_s(self) -> float:
        """For how long this replica may still act as the leader; 0 where it is none. For `Api.fenced`."""
        return max(0.0, self._until - self._clock())

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Until it is cancelled: wait for the lease, and run `lead` for as long as we have it.

        `lead` is cancelled when it is lost, and must end soon after; what it writes, it writes through a fenced `Api`.
        When `run` is cancelled, `lead` ends first, and then the lease is given back: the next leader need not wait.
        """
        try:
            while True:
                await self._acquired()
                logger.info("leading", extra={"fields": {"lease": self._path, "identity": self.identity}})
                await self._lead(lead)
                logger.warning("not leading any more", extra={"fields": {"lease": self._path}})
        finally:
            await self._give_back()

    async def _acquired(self) -> None:
        while True:
            if await self._try():
                return
            await asyncio.sleep(a_little_less(self._terms.retry_s))

    async def _lead(self, lead: Callable[[], Awaitable[None]]) -> None:
        work = asyncio.ensure_future(lead())
        renewal = asyncio.ensure_future(self._renewed_for_long())
        try:
            await asyncio.wait([work, renewal], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work  # it is not meant to end: what it raises is the caller's
        finally:
            for task in (work, renewal):
                task.cancel()
            await asyncio.wait([work, renewal])

    async def _renewed_for_long(self) -> None:
        """Ends when the lease is lost, or its time has run out: then another may have led, and all begins anew."""
        while left_s := self.left_s():
            await asyncio.sleep(min(self._terms.retry_s, left_s))
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._try(), self.left_s())

    async def _try(self) -> bool:
        """Acquire or renew the lease. False where it is another's; a failure to ask changes nothing."""
        try:
            return await self._hold()
        except AdapterError as exc:
            logger.warning("a lease could not be renewed", extra={"fields": {"lease": self._path, "code": exc.code}})
            return self.left_s() > 0

    async def _hold(self) -> bool:
        lease = await self._read()
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity")
        if holder and holder != self.identity and not self._ran_out(spec):
            self._until = 0.0
            return False
        asked_at = self._clock()
        await self._write(lease, spec, self._terms.lease_s)
        self._until = asked_at + self._terms.renew_s
        return True

    async def _read(self) -> dict[str, Any]:
        try:
            return await self._api.get(self._path, patience=self._patience)
        except NotFound:
            return {}

    def _ran_out(self, spec: dict[str, Any]) -> bool:
        """Nobody has renewed it for as long as it holds, by our clock: clocks of others are not looked at."""
        written = (spec.get("holderIdentity"), spec.get("renewTime"), spec.get("leaseTransitions"))
        if written != self._seen[0]:
            self._seen = written, self._clock()
        lease_s = spec.get("leaseDurationSeconds")
        lasts_s = lease_s if isinstance(lease_s, int) else self._terms.lease_s
        return self._clock() >= self._seen[1] + lasts_s

    async def _write(
        self, lease: dict[str, Any], spec: dict[str, Any], lease_s: int, holder: str | None = None
    ) -> None:
        """As `holder`, by default us. Raises `Conflict` where somebody else has written since `lease` was read."""
        holder = self.identity if holder is None else holder
        is_new = spec.get("holderIdentity") != holder
        now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        new = {
            "holderIdentity": holder,
            "leaseDurationSeconds": lease_s,
            "acquireTime": now if is_new else spec.get("acquireTime", now),
            "renewTime": now,
            "leaseTransitions": int(spec.get("leaseTransitions") or 0) + int(is_new and bool(lease)),
        }
        if lease:
            await self._api.replace(self._path, {**lease, "spec": new}, patience=self._patience)
        else:
            await self._api.create(self._collection, {**self._body, "spec": new}, patience=self._patience)

    async def _give_back(self) -> None:
        if self.left_s() == 0:
            return
        self._until = 0.0
        with suppress(AdapterError):
            lease = await self._read()
            if (lease.get("spec") or {}).get("holderIdentity") == self.identity:
                await self._write(lease, lease["spec"], 1, holder="")
