"""What the ledger says of every function's traffic, asked for as it is needed, and only for what is new.

While the ledger cannot be asked, what it said last stays, and is not called fresh.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeAlias

from adapter.errors import AdapterError
from adapter.policy.activity import RESOLUTION_NS, Activity

logger = logging.getLogger(__name__)

Ask: TypeAlias = Callable[[int], Awaitable[list[Activity]]]
"""``ask(since_ns)``: what functions did since then. Raises `AdapterError`."""

_NEW_S = 30.0
"""How long an answer counts as new: a few heartbeats."""
_FRESH_S = 300.0
"""How old the last answer may be for decisions to rest on it."""
_LOOK_BACK_NS = 2 * 86400 * 10**9
"""At first: as long as a gap counts for at least half in a keep-alive."""
_LATE_NS = 15 * 60 * 10**9
"""Agents deliver later what they could not deliver in time."""
_BUSY_KEPT = 512
_FORGOTTEN_S = 7 * 86400.0
"""A function of which nothing was said for so long: it may be gone, and whoever asks anew would not hear of it."""


class LedgerTraffic:
    """One answer at a time is asked for, however many wait for it. `clock` is monotonic, `clock_ns` the calendar."""

    def __init__(
        self,
        ask: Ask,
        *,
        clock: Callable[[], float] = time.monotonic,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._ask, self._clock, self._clock_ns = ask, clock, clock_ns
        self._known: dict[tuple[str, str], tuple[Activity, float]] = {}
        """With when something was said of it last."""
        self._asked_at: float | None = None
        self._answered_at: float | None = None
        self._since_ns: int | None = None
        self._asking = asyncio.Lock()
        self._is_down = False

    @property
    def is_fresh(self) -> bool:
        return self._answered_at is not None and self._clock() - self._answered_at < _FRESH_S

    async def of(self, namespace: str, function: str) -> Activity | None:
        """None where nothing is known of it. Never raises for a ledger that is down."""
        await self._look()
        return self.known(namespace, function)

    def known(self, namespace: str, function: str) -> Activity | None:
        """What was said of it so far. Asks nobody."""
        known, _ = self._known.get((namespace, function), (None, 0.0))
        return known

    async def watch(self) -> None:
        """Ask again and again, until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(_NEW_S)

    async def _look(self) -> None:
        async with self._asking:
            if self._asked_at is None or self._clock() - self._asked_at >= _NEW_S:
                await self._refresh()

    async def _refresh(self) -> None:
        self._asked_at, now_ns = self._clock(), self._clock_ns()
        since_ns = now_ns - _LOOK_BACK_NS if self._since_ns is None else self._since_ns - _LATE_NS
        try:
            news = await self._ask(since_ns)
        except AdapterError as error:
            if not self._is_down:
                fields = {"code": error.code, "why": error.why or error.message}
                logger.warning(
                    "the ledger tells nothing of traffic: what was known of it stays", extra={"fields": fields}
                )
            self._is_down = True
            return
        if self._is_down:
            logger.info("the ledger tells of traffic again")
        self._is_down, self._answered_at, self._since_ns = False, self._clock(), now_ns
        for activity in news:
            key = activity.namespace, activity.function
            known, _ = self._known.pop(key, (None, 0.0))
            self._known[key] = joined(known, activity), self._asked_at
        forgotten_at = self._asked_at - _FORGOTTEN_S
        self._known = {key: known for key, known in self._known.items() if known[1] > forgotten_at}


def joined(known: Activity | None, news: Activity) -> Activity:
    """What was known and what is said now, of times that overlap: nothing counts twice. Bounded."""
    if known is None:
        return news
    wakes = {
        rung: _with_newer(known.wakes_s.get(rung, ()), news.wakes_s.get(rung, ()))
        for rung in known.wakes_s.keys() | news.wakes_s.keys()
    }
    return replace(news, busy=_united((*known.busy, *news.busy))[-_BUSY_KEPT:], wakes_s=wakes)


def _united(busy: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for begin_ns, end_ns in sorted(busy):
        if found and begin_ns - found[-1][1] <= RESOLUTION_NS:
            found[-1] = found[-1][0], max(end_ns, found[-1][1])
        else:
            found.append((begin_ns, end_ns))
    return tuple(found)


def _with_newer(known: tuple[float, ...], news: tuple[float, ...]) -> tuple[float, ...]:
    """Both have the newest first: the end of what is said now is the beginning of what was known."""
    same = next(n for n in range(min(len(known), len(news)), -1, -1) if news[len(news) - n :] == known[:n])
    return (*news, *known[same:])[: max(len(known), len(news))]
