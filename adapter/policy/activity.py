"""What a function's leases and starts say about its traffic: when it was busy, and how long its wakes took.

Pure. Within a heartbeat a lease says how long a replica was busy, not when: so busy intervals of one function, whichever
replica's, are one where they are no further apart than that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from adapter.records import Rung, StartRecord

RESOLUTION_NS = 10 * 10**9
"""A heartbeat."""
_LATEST = 9
_WAKES = 50
"""Of each rung, the newest: what a wake costs now."""


class Run(NamedTuple):
    """A replica of a function had a request; nanoseconds since the epoch."""

    namespace: str
    function: str
    started_at_ns: int
    ended_at_ns: int


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
    def load_s(self) -> float | None:
        """What a start without a process snapshot is likely to take: the median of the latest; None where none was seen."""
        rung = next((rung for rung in (Rung.LOAD, Rung.START) if self.wakes_s.get(rung)), None)
        return None if rung is None else median(self.wakes_s[rung][:_LATEST])

    @property
    def last_busy_end_ns(self) -> int | None:
        return self.busy[-1][1] if self.busy else None


def activity(
    runs: Iterable[Run], starts: Iterable[StartRecord], *, resolution_ns: int = RESOLUTION_NS
) -> list[Activity]:
    """Of every function that either tells of, in order of their names. `runs` come in order of their start and may be
    very many: only what is apart is kept. `starts` come newest first."""
    busy: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    wakes: dict[tuple[str, str], dict[Rung, list[float]]] = defaultdict(lambda: defaultdict(list))
    for namespace, function, start_ns, end_ns in runs:
        spans = busy[namespace, function]
        if spans and start_ns - spans[-1][1] <= resolution_ns:
            spans[-1] = spans[-1][0], max(end_ns, spans[-1][1])
        else:
            spans.append((start_ns, end_ns))
    for record in starts:
        seconds = wakes[record.namespace, record.function][record.rung]
        if not record.error and len(seconds) < _WAKES:
            seconds.append(record.total_ns / 1e9)
    return [
        Activity(
            function=function,
            namespace=namespace,
            busy=tuple(busy.get((namespace, function), ())),
            wakes_s={rung: tuple(of) for rung, of in wakes.get((namespace, function), {}).items() if of},
        )
        for namespace, function in sorted(busy.keys() | wakes.keys())
    ]
