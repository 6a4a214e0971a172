"""What functions with a budget held today: looked at again and again, and told in the log where it is nearly all of it.

What is not known refuses nobody: see `adapter.ledger.held`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from adapter.ledger.held import LOOK_S, Ask, HeldToday
from adapter.openfaas.fleet import Fleet
from adapter.policy.budget import BudgetState

logger = logging.getLogger(__name__)

FIRST_LOOK_LIMIT_S = 5.0
"""A deploy waits no longer to know what is left."""


class Budgets:
    """Of the gateway's functions. `clock_ns` is the calendar."""

    def __init__(self, fleets: Mapping[str, Fleet], ask: Ask, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._fleets, self._clock_ns = fleets, clock_ns
        self._held = HeldToday(ask, clock_ns=clock_ns)
        self.of = self._held.budget
        self._said: dict[str, tuple[int, BudgetState]] = {}  # the end of the day, and what was logged in it

    async def watch(self) -> None:
        while True:
            if any(fleet.deployment.spec.budget_gpu_s for fleet in self._fleets.values()):
                await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Find out what was held, unless that is known of a moment ago."""
        await self._held.look()
        self._said = {key: said for key, said in self._said.items() if key in self._fleets}
        for key, fleet in self._fleets.items():
            self._say(key, fleet)

    def _say(self, key: str, fleet: Fleet) -> None:
        """What is new, once a day."""
        now_ns, budget = self._clock_ns(), fleet.budget
        state = budget.state(now_ns)
        if state is not BudgetState.OPEN and self._said.get(key) != (budget.ends_at_ns, state):
            self._said[key] = budget.ends_at_ns, state
            fields = {"function": key, "why": budget.text(now_ns)}
            logger.warning("a budget is %s", state.value, extra={"fields": fields})
