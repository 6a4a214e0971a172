"""What a function's leases and starts say about its traffic: when it was busy, and how long its wakes took.

Pure. Within a heartbeat a lease says how long a replica was busy, not when: so busy intervals of one function, whichever
replica's, are one where they are no further apart than that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from adapter.records import LeaseInterval, LeasePhase, Rung, StartRecord

RESOLUTION_NS = 10 * 10**9
"""A heartbeat."""
_WAKES = 50
"""Of each rung, the newest: what a wake costs now."""


@dataclass(frozen=True, slots=True)
class Activity:
    """One function. `busy`: ``(start, end)`` in nanoseconds since the epoch, in order, apart from each other.

    `wakes_s`: seconds that starts took by rung, the newest first.
    """

    function: str
    namespace: str
    busy: tuple[tuple[int, int], ...]
    wakes_s: dict[Rung, tuple[float, ...]]

    @property
    def last_busy_end_ns(self) -> int | None:
        return self.busy[-1][1] if self.busy else None


def activity(
    intervals: Iterable[LeaseInterval], starts: Iterable[StartRecord], *, resolution_ns: int = RESOLUTION_NS
) -> list[Activity]:
    """Of every function that either tells of, in order of their names. `starts` come newest first."""
    busy: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    wakes: dict[tuple[str, str], dict[Rung, list[float]]] = defaultdict(lambda: defaultdict(list))
    for interval in intervals:
        if interval.phase is LeasePhase.RUNNING:
            busy[interval.namespace, interval.function].append((interval.started_at_ns, interval.ended_at_ns))
    for record in starts:
        seconds = wakes[record.namespace, record.function][record.rung]
        if not record.error and len(seconds) < _WAKES:
            seconds.append(record.total_ns / 1e9)
    return [
        Activity(
            function=function,
            namespace=namespace,
            busy=_merged(busy.get((namespace, function), []), resolution_ns),
            wakes_s={rung: tuple(of) for rung, of in wakes.get((namespace, function), {}).items() if of},
        )
        for namespace, function in sorted(busy.keys() | wakes.keys())
    ]


def _merged(intervals: list[tuple[int, int]], resolution_ns: int) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for start_ns, end_ns in sorted(intervals):
        if found and start_ns - found[-1][1] <= resolution_ns:
            found[-1] = found[-1][0], max(end_ns, found[-1][1])
        else:
            found.append((start_ns, end_ns))
    return tuple(found)
