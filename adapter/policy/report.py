"""Usage reports: intervals of leases and a price plan in, rows out. Nanoseconds inside, seconds for people.

A range includes its start and excludes its end; intervals that cross a border are cut there, so reports
of adjoining ranges add up to the report of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from adapter.policy.leases import CPU_DEVICE
from adapter.policy.pricing import PricePlan
from adapter.records import LeaseInterval, LeasePhase

GROUPS = ("function", "namespace", "tenant", "phase", "device", "replica", "price_class")


@dataclass(slots=True)
class ReportRow:
    """One group's totals. `by_phase` and `allocated` are share-weighted nanoseconds."""

    group: tuple[str, ...]
    unit: str
    allocated_ns: int = 0
    by_phase_ns: dict[LeasePhase, int] = field(default_factory=dict)
    cost: Decimal = Decimal(0)

    @property
    def busy_ratio(self) -> float:
        """Part of the allocated time in which a request was in flight, 0 to 1."""
        return self.by_phase_ns.get(LeasePhase.RUNNING, 0) / self.allocated_ns if self.allocated_ns else 0.0


def report(
    intervals: Iterable[LeaseInterval], start_ns: int, end_ns: int, by: Sequence[str], plan: PricePlan
) -> list[ReportRow]:
    """Totals by group, groups in order. GPU-seconds and replica-seconds are never added up together."""
    rows: dict[tuple[tuple[str, ...], str], ReportRow] = {}
    for interval in intervals:
        nanoseconds = min(interval.ended_at_ns, end_ns) - max(interval.started_at_ns, start_ns)
        if nanoseconds <= 0:
            continue
        group = tuple(_value(interval, name) for name in by)
        unit = "replica-seconds" if interval.device == CPU_DEVICE else "GPU-seconds"
        row = rows.setdefault((group, unit), ReportRow(group, unit))
        weighted = round(nanoseconds * interval.share) if interval.share != 1 else nanoseconds
        row.allocated_ns += weighted
        row.by_phase_ns[interval.phase] = row.by_phase_ns.get(interval.phase, 0) + weighted
        row.cost += plan.cost(interval, nanoseconds)
    return [rows[key] for key in sorted(rows)]


def _value(interval: LeaseInterval, name: str) -> str:
    value = getattr(interval, name)
    return value.value if isinstance(value, LeasePhase) else str(value)
