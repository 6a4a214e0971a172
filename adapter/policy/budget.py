"""Budgets: how many GPU-seconds a function may hold in a UTC day.

Pure: leases, the budget and the calendar (nanoseconds since 1970) in, a state and its words out. A budget never ends what
runs: whoever makes replicas asks before one is woken, and wakes none of a function whose budget is spent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from adapter.errors import Overloaded
from adapter.policy.pricing import PricePlan
from adapter.policy.report import GPU_SECONDS, report
from adapter.records import LeaseInterval
from adapter.units import format_duration

NEAR_RATIO = 0.8
"""Of a budget: from here on it is nearly spent, and people are told."""
SPENT_CODE = "budget-spent"

_DAY_NS = 86_400 * 10**9


class BudgetState(str, Enum):
    OPEN = "open"
    NEARLY_SPENT = "nearly spent"
    SPENT = "spent"


@dataclass(frozen=True, slots=True)
class Budget:
    """`held_gpu_s` of `limit_gpu_s` GPU-seconds that `function` may hold until `ends_at_ns`; a limit of 0: no bound."""

    function: str
    held_gpu_s: float
    limit_gpu_s: float
    ends_at_ns: int

    def state(self, now_ns: int) -> BudgetState:
        """Open once its day is over: what is held in the next one is not known here."""
        if not self.limit_gpu_s or now_ns >= self.ends_at_ns:
            return BudgetState.OPEN
        if self.held_gpu_s >= self.limit_gpu_s:
            return BudgetState.SPENT
        return BudgetState.NEARLY_SPENT if self.held_gpu_s >= NEAR_RATIO * self.limit_gpu_s else BudgetState.OPEN

    def opens_in_s(self, now_ns: int) -> float:
        """Seconds until it is open again; 0 when it is not spent."""
        return (self.ends_at_ns - now_ns) / 1e9 if self.state(now_ns) is BudgetState.SPENT else 0.0

    def refusal(self, now_ns: int) -> Overloaded | None:
        """Why it is not woken; None where it may be. One for each caller."""
        if self.state(now_ns) is not BudgetState.SPENT:
            return None
        message, why, hint = self._parts(now_ns)
        wait_s = self.opens_in_s(now_ns)
        return Overloaded(message, why=why, hint=hint, code=SPENT_CODE, retry_after_s=wait_s)

    def text(self, now_ns: int) -> str:
        """For people: what, how much of how much, until when, and what to do; empty where it is open."""
        return "" if self.state(now_ns) is BudgetState.OPEN else " ".join(self._parts(now_ns))

    def _parts(self, now_ns: int) -> tuple[str, str, str]:
        state, left_s = self.state(now_ns), (self.ends_at_ns - now_ns) / 1e9
        then = "It wakes again" if state is BudgetState.SPENT else "A new day begins"
        return (
            f"The budget of {self.function} is {state.value}.",
            f"It held {self.held_gpu_s:,.1f} of {self.limit_gpu_s:,.1f} GPU-seconds in this UTC day.",
            f"{then} at 00:00 UTC, in {format_duration(left_s)}; for more today raise price.budget (gpufn.dev/budget).",
        )


def unbounded(function: str, limit_gpu_s: float) -> Budget:
    """Where nobody knows what is held."""
    return Budget(function, 0.0, limit_gpu_s, 0)


def utc_day(now_ns: int) -> tuple[int, int]:
    """Start and, excluded, end of the day of an instant."""
    start_ns = now_ns // _DAY_NS * _DAY_NS
    return start_ns, start_ns + _DAY_NS


def held_gpu_s(intervals: Iterable[LeaseInterval], start_ns: int, end_ns: int) -> dict[str, float]:
    """GPU-seconds held in ``[start_ns, end_ns)`` by ``name.namespace``, as reports count what is allocated."""
    rows = report(intervals, (), PricePlan(), start_ns=start_ns, end_ns=end_ns, by=("function", "namespace"))
    return {".".join(row.group): float(row.allocated_ns) / 1e9 for row in rows if row.unit == GPU_SECONDS}
