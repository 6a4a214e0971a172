"""The one reservation ledger of a gateway's GPUs: who holds them, who waits for them, who makes room.

Decisions are `adapter.policy.grants`'; here they are carried out, after every change and once a second while
somebody waits: an event that was missed costs a second, never a GPU. Wants are served in the order in which they
came, device by device: what is kept for an earlier one no later one gets. Everything runs on the event loop.
Nothing is kept on a disk, because no replica outlives its gateway.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from adapter.errors import AdapterError, ConfigError, Overloaded, Unavailable
from adapter.hosts import Inventory
from adapter.policy.grants import (
    Claim,
    ClaimState,
    Decision,
    Device,
    Evict,
    Granted,
    Refused,
    Wait,
    Want,
    decide,
    describe,
    free_bytes,
    is_spare,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 5.0
"""For callers whose function found no GPU: about what a neighbour needs to finish and to be parked."""

_AGAIN_S = 1.0
"""Between looks, and between requests to the same replica: one that was busy when it was asked forgot it."""

_PARK_LIMIT_S = 40.0
_PARK_BYTES_PER_S = 2e9
"""A replica that is asked to park and stays idle for longer than this never will: it is stopped. (The limits of
the driver's own steps: 10 s for its lock, then 30 s or the time of its bytes.)"""


class Holder(Protocol):
    """A replica, as far as its grant goes."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> ClaimState:
        """While it holds its grant."""

    @property
    def idle_since_s(self) -> float | None: ...

    def wake_s(self, *, parks: bool) -> float:
        """How much longer its next request waits once it was parked, or stopped."""

    def evict(self, *, park: bool) -> None:
        """Park or stop it, if it is idle still. What becomes of that is told by `Gpus.parked` or `release`."""


@dataclass(eq=False)
class Grant:
    """One replica's hold on GPUs, from the first `acquire` to `release`; parked in between, it holds nothing.

    `holder` is None until the replica is there.
    """

    want: Want
    parks: bool = True
    """Its replica can give its memory back and keep its process."""
    min_replicas: int = 0
    devices: tuple[Device, ...] = ()
    """Those it holds; when parked, those it was on."""
    is_held: bool = False
    holder: Holder | None = None

    @property
    def uuids(self) -> tuple[str, ...]:
        return tuple(device.uuid for device in self.devices)

    @property
    def share(self) -> float:
        """Of the device, or a count of whole ones."""
        return self.want.share_of(self.devices[0])

    @property
    def can_park(self) -> bool:
        """Drivers checkpoint no process on a slice."""
        return self.parks and not any(device.is_slice for device in self.devices)

    def claim(self) -> Claim:
        """What it is to the policy."""
        holder = self.holder
        name = f"{self.want.function} (new)" if holder is None else holder.name
        state = ClaimState.STARTING if holder is None else holder.state
        return Claim(
            name,
            self.want.function,
            self.uuids,
            self.want.bytes_of(self.devices[0]),
            state if self.is_held else ClaimState.PARKED,
            None if holder is None else holder.idle_since_s,
            0.0 if holder is None else holder.wake_s(parks=self.can_park),
            self.min_replicas,
        )


class Withdrawn(Exception):
    """Nobody wants the grant any more."""


@dataclass
class _Eviction:
    began_s: float
    again_s: float


class Gpus:
    """The ledger over one host's inventory."""

    def __init__(
        self,
        inventory: Inventory | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        is_ours: bool = True,
    ) -> None:
        """`is_ours`: who gets which GPU is decided here, and not by a scheduler."""
        self.is_ours = is_ours
        self.inventory = inventory or Inventory(why_not="This host has none.")
        self._clock = clock
        self._grants: dict[Grant, None] = {}  # held or parked
        self._queue: dict[Grant, asyncio.Future[None]] = {}  # first come, first served
        self._evictions: dict[Grant, _Eviction] = {}
        self._told: dict[Grant, Decision] = {}
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.Handle | None = None

    def check(self, want: Want) -> None:
        """Raises `ConfigError` where `want` could not be granted if everything were free."""
        decision = decide(self.inventory.devices, (), want)
        if isinstance(decision, Refused):
            why = decision.reason if self.inventory.devices else f"{decision.reason} {self.inventory.why_not}"
            raise ConfigError(
                f"{want.function} needs a GPU that cannot be had here.",
                why=why,
                hint="See what is here: gpufn nodes. Change [gpu] in gpufn.toml; count = 0 runs on the CPU.",
                code=decision.code,
            )

    async def acquire(self, grant: Grant, limit_s: float) -> None:
        """Hold what the grant wants; waits for it, `limit_s` at most. A parked one goes back to where it was.

        Raises `Overloaded` when the time is over, `Unavailable` when it cannot be had, `Withdrawn`. Then, and
        when it is cancelled, all is as before.
        """
        loop = asyncio.get_running_loop()
        was = grant.devices
        ticket: asyncio.Future[None] = loop.create_future()
        self._queue[grant] = ticket
        timer = loop.call_later(limit_s, self._expire, grant, limit_s)
        try:
            self._look()
            await ticket
        except BaseException:
            if grant.is_held:  # it was given, and cancelled before it could be taken
                self._take_back(grant, was)
            raise
        finally:
            timer.cancel()
            self._forget(grant)
            self.changed()

    def is_spare(self, want: Want) -> bool:
        """Whether it could be given to a guess: nobody waits, nobody must make room, and it is not the last one."""
        return not self._queue and is_spare(self.inventory.devices, self._claims().values(), want)

    def withdraw(self, grant: Grant) -> None:
        """Who waits for it need not any more."""
        self._fail(grant, Withdrawn())

    def parked(self, grant: Grant) -> None:
        """Its replica has given the memory back and keeps its process."""
        grant.is_held = False
        self._evictions.pop(grant, None)
        self.changed()

    def release(self, grant: Grant) -> None:
        """Its replica has ended, or never came to be."""
        self.withdraw(grant)
        grant.is_held = False
        self._grants.pop(grant, None)
        self._evictions.pop(grant, None)
        self.changed()

    def changed(self) -> None:
        """A grant came back, or its holder may be idle now: those who wait are looked at, in the loop's next turn."""
        if self._queue and self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._look)

    # Those who wait -----------------------------------------------------------------------------

    def _look(self) -> None:
        """Decide about everybody who waits, in order."""
        for look in (self._soon, self._later):
            if look is not None:
                look.cancel()
        self._soon = self._later = None
        self._evictions = {g: e for g, e in self._evictions.items() if g.claim().state is ClaimState.IDLE}
        kept: set[str] = set()
        for grant in list(self._queue):
            if grant in self._queue and not self._queue[grant].done():
                kept |= self._decide(grant, frozenset(kept))
        if self._queue:
            self._later = asyncio.get_running_loop().call_later(_AGAIN_S, self._look)

    def _decide(self, grant: Grant, kept: frozenset[str]) -> set[str]:
        """Carry out what is decided; returns the devices that are kept for this grant from now on."""
        want = replace(grant.want, was_on=grant.uuids) if grant in self._grants else grant.want
        claims = self._claims()
        decision = decide(self.inventory.devices, claims.values(), want, kept)
        self._log(grant, want, claims.values(), kept, decision)
        if isinstance(decision, Granted):
            self._give(grant, decision.devices)
        elif isinstance(decision, Refused):
            why = f"{decision.reason} It was there when the function was deployed."
            self._fail(grant, Unavailable(f"{want.function} has no GPU.", why=why, code=decision.code))
        elif isinstance(decision, Evict):
            self._evict([g for g, claim in claims.items() if claim in decision.victims])
        return {d.uuid for d in decision.devices} if isinstance(decision, Evict | Wait) else set()

    def _claims(self) -> dict[Grant, Claim]:
        """Those that were asked to go already cost nothing more: a choice that was made is stuck to."""
        claims = {grant: grant.claim() for grant in self._grants}
        return {g: replace(c, wake_s=0.0) if g in self._evictions else c for g, c in claims.items()}

    def _give(self, grant: Grant, devices: tuple[Device, ...]) -> None:
        grant.devices, grant.is_held = devices, True
        self._grants[grant] = None
        self._queue[grant].set_result(None)

    def _take_back(self, grant: Grant, was: tuple[Device, ...]) -> None:
        grant.devices, grant.is_held = was, False
        if not was:
            del self._grants[grant]

    def _evict(self, victims: Iterable[Grant]) -> None:
        now_s = self._clock()
        for grant in victims:
            claim = grant.claim()
            if claim.state is not ClaimState.IDLE or grant.holder is None:
                continue  # it goes already
            eviction = self._evictions.setdefault(grant, _Eviction(now_s, now_s))
            if now_s >= eviction.again_s:
                eviction.again_s = now_s + _AGAIN_S
                limit_s = max(_PARK_LIMIT_S, claim.bytes_each / _PARK_BYTES_PER_S)
                grant.holder.evict(park=grant.can_park and now_s < eviction.began_s + limit_s)

    def _expire(self, grant: Grant, limit_s: float) -> None:
        self._fail(
            grant,
            Overloaded(
                f"{grant.want.function} found no GPU.",
                why=f"It waited {limit_s:g} s (gpu_wait). {self.holders(grant.want)}",
                hint="Retry later; see who holds what: gpufn nodes",
                code="gpu-wait",
                retry_after_s=RETRY_AFTER_S,
            ),
        )

    def _fail(self, grant: Grant, error: AdapterError | Withdrawn) -> None:
        ticket = self._queue.get(grant)
        if ticket is not None and not ticket.done():
            ticket.set_exception(error)
            self._forget(grant)
            self.changed()

    def _forget(self, grant: Grant) -> None:
        self._queue.pop(grant, None)
        self._told.pop(grant, None)

    def _log(self, grant: Grant, want: Want, claims: Iterable[Claim], kept: frozenset[str], decision: Decision) -> None:
        """Every decision that is new, with all that it rests on: `decide` gives it again."""
        if self._told.get(grant) == decision:
            return
        self._told[grant] = decision
        inputs = {"want": asdict(want), "claims": [asdict(claim) for claim in claims], "kept": sorted(kept)}
        fields = {"function": want.function, "decision": type(decision).__name__.lower(), **asdict(decision), **inputs}
        logger.info("who gets GPUs", extra={"fields": fields})

    # For people ---------------------------------------------------------------------------------

    def holders(self, want: Want) -> str:
        """Who holds the devices that `want` could have."""
        decision = decide(self.inventory.devices, (grant.claim() for grant in self._grants), want)
        if isinstance(decision, Wait | Refused):
            return decision.reason
        return describe(self.inventory.devices, [grant.claim() for grant in self._grants])

    def rows(self) -> list[dict[str, Any]]:
        """Each device, who holds it and who was parked there."""
        claims = [grant.claim() for grant in self._grants]
        return [
            {
                "uuid": device.uuid,
                "model": device.model,
                "slice": device.is_slice,
                "memory_bytes": device.memory_bytes,
                "free_bytes": free_bytes(device, claims),
                "holders": [_holder(c) for c in claims if c.bytes_on(device.uuid)],
                "parked": [_holder(c) for c in claims if c.state is ClaimState.PARKED and device.uuid in c.devices],
            }
            for device in self.inventory.devices
        ]

    def waiting(self) -> list[str]:
        """The functions that wait, in their order."""
        return [grant.want.function for grant in self._queue]


def _holder(claim: Claim) -> dict[str, Any]:
    return {
        "replica": claim.replica,
        "function": claim.function,
        "state": claim.state.value,
        "bytes": claim.bytes_each,
    }
