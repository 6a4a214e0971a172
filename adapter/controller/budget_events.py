"""Says on objects that people look at when a function has nearly, or all, held what its budget lets it hold today."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone

from adapter.cluster.events import EventRecorder
from adapter.controller.cluster_view import BUDGET_ANNOTATION, Budgeted, ClusterView, PodFacts
from adapter.ledger.held import LOOK_S, HeldToday
from adapter.policy.budget import NEAR_RATIO, BudgetState

NEAR_REASON, SPENT_REASON = "BudgetNearlySpent", "BudgetSpent"


class BudgetEvents:
    """A reconciler of pods whose functions have a budget, by ``namespace/name``: who has none holds nothing."""

    name = "budgets"

    def __init__(
        self,
        view: ClusterView,
        held: HeldToday,
        events: EventRecorder,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._view, self._held, self._events, self._clock_ns = view, held, events, clock_ns

    def start(self, changed: Callable[[str], None]) -> None:
        def on_pod(key: str, _old: PodFacts | None, new: PodFacts | None) -> None:
            if new is not None and new.budget is not None:
                changed(key)

        self._view.pods.on_change(on_pod)

    def all_keys(self) -> Iterable[str]:
        return [key for key, facts in self._view.pods.snapshot().items() if facts.budget is not None]

    async def reconcile(self, key: str) -> float | None:
        facts = self._view.pods.get(key)
        if facts is None or facts.budget is None:
            return None
        await self._held.look()
        now_ns = self._clock_ns()
        budget = self._held.budget(facts.budget.function, facts.budget.limit_gpu_s)
        state = budget.state(now_ns)
        if state is not BudgetState.OPEN:
            for about in facts.budget.about:
                await self._events.say(about, *_words(facts.budget, state, now_ns))
        return LOOK_S


def _words(of: Budgeted, state: BudgetState, now_ns: int) -> tuple[str, str]:
    """Reason and message: of one day the same, so that it is one Event."""
    day = datetime.fromtimestamp(now_ns // 10**9, timezone.utc).date()
    limit = f"the {of.limit_gpu_s:,.1f} GPU-seconds that it may hold on {day} (UTC)"
    more = f"for more today raise {BUDGET_ANNOTATION}"
    if state is BudgetState.SPENT:
        runs = "What runs goes on; no replica is made before 00:00 UTC"
        return SPENT_REASON, f"{of.function} has held {limit}. {runs}, {more}."
    then = "When it has held all of them, no replica is made before 00:00 UTC"
    return NEAR_REASON, f"{of.function} has held {NEAR_RATIO:.0%} of {limit}. {then}; {more}."
