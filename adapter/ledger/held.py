"""What functions have held of their budgets today, as a ledger says when it is asked now and then.

What is not known refuses nobody: while a ledger does not answer, only a budget that was seen spent stays so, until its
day is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from adapter.errors import AdapterError
from adapter.policy.budget import Budget, utc_day

logger = logging.getLogger(__name__)

Ask: TypeAlias = Callable[[int, int], Awaitable[Mapping[str, float]]]
"""``ask(start_ns, end_ns)``: GPU-seconds held in that time by ``name.namespace``. Raises `AdapterError`."""

LOOK_S = 10.0
"""As often as agents tell: so much longer may a function hold before it is noticed."""
_RESTS = 20
"""Times as long as an answer took: a ledger of many rows is not kept busy by this."""
_AFTER_S = 600.0
"""How long it is looked after nobody wants it any more: for what is told late."""


class HeldToday:
    """`clock` is monotonic, `clock_ns` the calendar."""

    def __init__(
        self,
        ask: Ask,
        *,
        clock: Callable[[], float] = time.monotonic,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._ask, self._clock, self._clock_ns = ask, clock, clock_ns
        self.is_known = False
        """The ledger answered when it was asked last."""
        self._held_gpu_s: Mapping[str, float] = {}
        self._day_ends_at_ns = 0
        self._again_at = float("-inf")
        self._looking = asyncio.Lock()
        self._is_down = False

    def budget(self, function: str, limit_gpu_s: float) -> Budget:
        """Of ``name.namespace``, as far as is known. Asks nobody."""
        return Budget(function, self._held_gpu_s.get(function, 0.0), limit_gpu_s, self._day_ends_at_ns)

    async def look(self) -> None:
        """Ask the ledger, unless it was asked a moment ago. Never raises."""
        async with self._looking:
            began, rest_s, day = self._clock(), 0.0, utc_day(self._clock_ns())
            if began < self._again_at:
                return
            try:
                self._held_gpu_s, self._day_ends_at_ns = await self._ask(*day), day[1]
                rest_s = _RESTS * (self._clock() - began)
                self._answered()
            except AdapterError as error:
                self._failed(error.code, error.why or error.message)
            except Exception as exc:  # boundary: budgets must keep nobody from doing anything else
                logger.exception("what was held cannot be read")
                self._failed("failed", str(exc))
            self._again_at = self._clock() + max(LOOK_S, rest_s)

    async def watch(self, is_wanted: Callable[[], bool]) -> None:
        """Look once, and again and again while it is wanted, until cancelled."""
        wanted_at = self._clock()
        while True:
            if is_wanted():
                wanted_at = self._clock()
            if not self.is_known or self._clock() - wanted_at < _AFTER_S:
                await self.look()
            await asyncio.sleep(LOOK_S)

    def _answered(self) -> None:
        if self._is_down:
            logger.info("the ledger tells what was held again")
        self.is_known, self._is_down = True, False

    def _failed(self, code: str, why: str) -> None:
        if not self._is_down:
            fields = {"code": code, "why": why}
            logger.warning("the ledger does not tell what was held: budgets stop nobody", extra={"fields": fields})
        self.is_known, self._is_down = False, True
