"""Whether GPU time adds up: per device and UTC hour, what tenants held + idle + others' + down is its capacity.

Pure. Two streams are held against each other: leases say who held a device, and device intervals say how long it was
there and held at all. What one tells and the other does not is the residual, and findings name where it is: leases that
overlap, time that was held and no lease tells (a gap), leases of a device that was not there (a mismatch).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from itertools import pairwise

from adapter.policy.leases import CPU_DEVICE
from adapter.records import DeviceInterval, LeaseInterval

HOUR_NS = 3_600 * 10**9
_NEGLIGIBLE_NS = 10**6
"""What rounding of shares can make; a finding is longer."""


class FindingKind(str, Enum):
    OVERLAP = "overlap"
    GAP = "gap"
    MISMATCH = "mismatch"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not add up, from `started_at_ns` to `ended_at_ns`; `nanoseconds` of it, by share."""

    kind: FindingKind
    device: str
    started_at_ns: int
    ended_at_ns: int
    nanoseconds: int
    replicas: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceHour:
    """One device in one hour. All nanoseconds: ``sum(tenants) + idle + others + down + residual == capacity``."""

    node: str
    device: str
    model: str
    hour_at_ns: int
    capacity_ns: int
    tenants_ns: tuple[tuple[str, int], ...]
    idle_ns: int
    others_ns: int
    down_ns: int
    residual_ns: int


@dataclass(frozen=True, slots=True)
class Conservation:
    hours: tuple[DeviceHour, ...]
    findings: tuple[Finding, ...]

    @property
    def residual_ns(self) -> int:
        """Of all hours, none of them made up for by another."""
        return sum(abs(hour.residual_ns) for hour in self.hours)


@dataclass(frozen=True, slots=True)
class _Held:
    """One device's part of a lease."""

    lease: LeaseInterval
    share: Fraction
    start_ns: int
    end_ns: int

    def within(self, start_ns: int, end_ns: int) -> Fraction:
        return self.share * max(0, min(self.end_ns, end_ns) - max(self.start_ns, start_ns))


def conserve(
    leases: Iterable[LeaseInterval], devices: Iterable[DeviceInterval], *, start_ns: int, end_ns: int
) -> Conservation:
    """Hold both against each other in ``[start_ns, end_ns)``, which begins with an hour.

    A device counts from the first to the last hour in which it was there at all, cut at the range. Of a device interval
    that crosses an hour's border each hour has its part: agents end theirs there.
    """
    held = _held_by_device(leases, start_ns, end_ns)
    present: dict[str, list[DeviceInterval]] = defaultdict(list)
    for interval in sorted(devices, key=lambda d: d.started_at_ns):
        if interval.started_at_ns < end_ns and interval.ended_at_ns > start_ns:
            present[interval.device].append(interval)
    hours: list[DeviceHour] = []
    findings: list[Finding] = []
    for device in sorted(held.keys() | present.keys()):
        rows = present.get(device, [])
        hours += _hours(device, held.get(device, []), rows, start_ns, end_ns)
        findings += _overlaps(device, held.get(device, []))
        findings += _differences(device, held.get(device, []), rows)
    return Conservation(tuple(hours), tuple(findings))


def _held_by_device(leases: Iterable[LeaseInterval], start_ns: int, end_ns: int) -> dict[str, list[_Held]]:
    """In order of their start. Of a lease of several devices each has its part."""
    held: dict[str, list[_Held]] = defaultdict(list)
    for lease in sorted(leases, key=lambda i: i.started_at_ns):
        low, high = max(lease.started_at_ns, start_ns), min(lease.ended_at_ns, end_ns)
        if lease.device == CPU_DEVICE or high <= low:
            continue
        names = lease.device.split(",")
        share = Fraction(lease.share).limit_denominator(1000) / len(names)
        for name in names:
            held[name].append(_Held(lease, share, low, high))
    return held


def _hours(
    device: str, held: Sequence[_Held], rows: Sequence[DeviceInterval], start_ns: int, end_ns: int
) -> Iterator[DeviceHour]:
    if not rows:
        return
    first = max(rows[0].started_at_ns, start_ns) // HOUR_NS
    last = (min(max(row.ended_at_ns for row in rows), end_ns) - 1) // HOUR_NS
    for hour in range(first, last + 1):
        low, high = max(hour * HOUR_NS, start_ns), min((hour + 1) * HOUR_NS, end_ns)
        inside = [row for row in rows if row.started_at_ns < high and row.ended_at_ns > low]
        tenants: dict[str, Fraction] = defaultdict(Fraction)
        for part in held:
            if part.start_ns < high and part.end_ns > low:
                tenants[part.lease.tenant] += part.within(low, high)
        rounded = tuple(sorted((tenant, round(ns)) for tenant, ns in tenants.items()))
        there_ns = sum(_cut(row, low, high) for row in inside)
        held_ns, others_ns = (
            round(sum(Fraction(getattr(row, name) * _cut(row, low, high), _length(row)) for row in inside))
            for name in ("held_ns", "others_ns")
        )
        facts = inside[-1] if inside else rows[0]
        idle_ns, down_ns = there_ns - held_ns - others_ns, max(0, high - low - there_ns)
        told_ns = sum(ns for _, ns in rounded)
        yield DeviceHour(
            node=facts.node,
            device=device,
            model=facts.model,
            hour_at_ns=hour * HOUR_NS,
            capacity_ns=high - low,
            tenants_ns=rounded,
            idle_ns=idle_ns,
            others_ns=others_ns,
            down_ns=down_ns,
            residual_ns=high - low - told_ns - idle_ns - others_ns - down_ns,
        )


def _overlaps(device: str, held: Sequence[_Held]) -> Iterator[Finding]:
    """Where shares add up to more than the device."""
    edges = sorted({edge for part in held for edge in (part.start_ns, part.end_ns)})
    waiting, active = list(reversed(held)), list[_Held]()
    finding: Finding | None = None
    for low, high in pairwise(edges):
        active = [part for part in active if part.end_ns > low]
        while waiting and waiting[-1].start_ns <= low:
            active.append(waiting.pop())
        excess = sum((part.share for part in active), Fraction(0)) - 1
        nanoseconds = round(excess * (high - low))
        if nanoseconds <= 0:
            continue
        replicas = tuple(sorted({part.lease.replica for part in active}))
        if finding and finding.ended_at_ns == low and finding.replicas == replicas:
            finding = _longer(finding, high, nanoseconds)
            continue
        if finding:
            yield finding
        finding = Finding(FindingKind.OVERLAP, device, low, high, nanoseconds, replicas)
    if finding:
        yield finding


def _differences(device: str, held: Sequence[_Held], rows: Sequence[DeviceInterval]) -> Iterator[Finding]:
    """Time that was held and that no lease tells, and leases of time in which nobody held the device, or it was away."""
    reaches: list[int] = []
    for part in held:  # the furthest end so far: what ends before a row cannot be in it, nor can any before
        reaches.append(max(part.end_ns, reaches[-1] if reaches else 0))
    finding: Finding | None = None
    for row in rows:
        told, replicas = Fraction(0), set[str]()
        for part in held[bisect_left(reaches, row.started_at_ns + 1) :]:
            if part.start_ns >= row.ended_at_ns:
                break
            told += part.within(row.started_at_ns, row.ended_at_ns)
            replicas.add(part.lease.replica)
        missing_ns = round(row.held_ns - told)
        if abs(missing_ns) <= _NEGLIGIBLE_NS or told > _length(row):  # more than all of it: that is an overlap
            continue
        kind, of = (FindingKind.GAP, ()) if missing_ns > 0 else (FindingKind.MISMATCH, tuple(sorted(replicas)))
        if finding and (finding.ended_at_ns, finding.kind, finding.replicas) == (row.started_at_ns, kind, of):
            finding = _longer(finding, row.ended_at_ns, abs(missing_ns))
            continue
        if finding:
            yield finding
        finding = Finding(kind, device, row.started_at_ns, row.ended_at_ns, abs(missing_ns), of)
    if finding:
        yield finding
    yield from _strays(device, held, rows)


def _strays(device: str, held: Sequence[_Held], rows: Sequence[DeviceInterval]) -> Iterator[Finding]:
    starts = [row.started_at_ns for row in rows]
    for part in held:
        near = rows[max(0, bisect_left(starts, part.start_ns + 1) - 1) : bisect_left(starts, part.end_ns)]
        there_ns = sum(
            _cut(row, part.start_ns, part.end_ns) for row in near if row.node == part.lease.node or not part.lease.node
        )
        nanoseconds = round(part.share * (part.end_ns - part.start_ns - there_ns))
        if nanoseconds > _NEGLIGIBLE_NS:
            yield Finding(FindingKind.MISMATCH, device, part.start_ns, part.end_ns, nanoseconds, (part.lease.replica,))


def _longer(finding: Finding, end_ns: int, nanoseconds: int) -> Finding:
    return Finding(
        finding.kind,
        finding.device,
        finding.started_at_ns,
        end_ns,
        finding.nanoseconds + nanoseconds,
        finding.replicas,
    )


def _length(row: DeviceInterval) -> int:
    return row.ended_at_ns - row.started_at_ns


def _cut(row: DeviceInterval, start_ns: int, end_ns: int) -> int:
    return max(0, min(row.ended_at_ns, end_ns) - max(row.started_at_ns, start_ns))
