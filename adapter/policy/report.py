"""Usage reports: lease intervals, start records and a price plan in, rows out.

A range includes its start and excludes its end, and intervals that cross a border are cut there: reports of
adjoining ranges add up to the report of the whole, to the nanosecond and to the last digit of the money.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal

from adapter.policy.leases import CPU_DEVICE
from adapter.policy.pricing import PricePlan
from adapter.records import LeaseInterval, LeasePhase, StartRecord

GROUPS = (
    "function",
    "namespace",
    "tenant",
    "phase",
    "device",
    "gpu_model",
    "revision",
    "replica",
    "price_class",
    "node",
)
GROUP_ALIASES = {"gpu": "gpu_model"}
"""What else people call them."""
GPU_SECONDS, REPLICA_SECONDS = "GPU-seconds", "replica-seconds"

_EXACT = Context(prec=100)
"""Nanoseconds, shares and prices are short decimals: in a hundred digits nothing of them is rounded."""


@dataclass(slots=True)
class ReportRow:
    """One group's totals. Nanoseconds count by share: half a GPU for 2 ns is 1 ns, and that may be a fraction."""

    group: tuple[str, ...]
    unit: str
    """GPU-seconds and replica-seconds are never added up together."""
    phase_ns: dict[LeasePhase, Decimal] = field(default_factory=dict)
    cost: Decimal = Decimal(0)
    starts: int = 0
    failed_starts: int = 0
    gpu_models: set[str] = field(default_factory=set)
    """Of the GPUs that were held, where they are known."""

    @property
    def allocated_ns(self) -> Decimal:
        """What nobody else could have: every phase but parked, in which a replica gives its GPU back."""
        return sum((ns for phase, ns in self.phase_ns.items() if phase is not LeasePhase.PARKED), Decimal(0))

    @property
    def busy_ratio(self) -> float:
        """Part of the allocated time in which a request was in flight, 0 to 1."""
        allocated_ns = self.allocated_ns
        return float(self.phase_ns.get(LeasePhase.RUNNING, 0) / allocated_ns) if allocated_ns else 0.0


def report(
    intervals: Iterable[LeaseInterval],
    starts: Iterable[StartRecord],
    plan: PricePlan,
    *,
    start_ns: int,
    end_ns: int,
    by: Sequence[str],
) -> list[ReportRow]:
    """Totals of ``[start_ns, end_ns)`` by the `GROUPS` named in `by`, in order of the groups.

    Starts belong to no phase: they are counted only where `by` does not name it.
    """
    rows: dict[tuple[tuple[str, ...], str], ReportRow] = {}
    holders: dict[str, LeaseInterval] = {}
    held_ns: dict[tuple[tuple[str, ...], str, LeasePhase, float, str, str], int] = {}
    for interval in intervals:
        nanoseconds = min(interval.ended_at_ns, end_ns) - max(interval.started_at_ns, start_ns)
        if nanoseconds > 0:
            what = interval.phase, interval.share, interval.price_class, interval.gpu_model
            key = (_group(interval, by), unit_of(interval), *what)
            held_ns[key] = held_ns.get(key, 0) + nanoseconds
            holders[interval.replica] = interval
    for (group, unit, phase, share, price_class, gpu_model), nanoseconds in held_ns.items():
        row = rows.setdefault((group, unit), ReportRow(group, unit))
        row.gpu_models |= {gpu_model} - {""}
        weighted_ns = _EXACT.multiply(Decimal(nanoseconds), Decimal(str(share)))
        row.phase_ns[phase] = _EXACT.add(row.phase_ns.get(phase, Decimal(0)), weighted_ns)
        rate = plan.rate(price_class, phase, gpu=unit == GPU_SECONDS)
        row.cost = _EXACT.add(row.cost, _EXACT.multiply(rate, weighted_ns).scaleb(-9, _EXACT))
    if "phase" not in by:
        _count_starts(rows, (s for s in starts if start_ns <= s.started_at_ns < end_ns), holders, by)
    return [rows[key] for key in sorted(rows)]


def unit_of(interval: LeaseInterval) -> str:
    """What a second of this interval is."""
    return REPLICA_SECONDS if interval.device == CPU_DEVICE else GPU_SECONDS


def _count_starts(
    rows: dict[tuple[tuple[str, ...], str], ReportRow],
    starts: Iterable[StartRecord],
    holders: dict[str, LeaseInterval],
    by: Sequence[str],
) -> None:
    """A start belongs to the group of its replica's intervals; one that failed at once may have none."""
    for record in starts:
        holder = holders.get(record.replica)
        group = _group(holder or record, by)
        there = (unit for unit in (GPU_SECONDS, REPLICA_SECONDS) if (group, unit) in rows)
        unit = unit_of(holder) if holder else next(there, REPLICA_SECONDS)
        row = rows.setdefault((group, unit), ReportRow(group, unit))
        row.starts += not record.error
        row.failed_starts += bool(record.error)


def _group(item: LeaseInterval | StartRecord, by: Sequence[str]) -> tuple[str, ...]:
    values = (getattr(item, name, "") for name in by)
    return tuple(value.value if isinstance(value, LeasePhase) else str(value) for value in values)
