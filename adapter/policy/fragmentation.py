"""How much of a node's free GPUs nobody can use: the measure of FGD (Weng et al., USENIX ATC 2023).

Pure. A free GPU is fragmented as far as replicas that usually come cannot have it, because the node has too few GPUs
free for them, too little CPU, or another model. Where a replica adds least to that, it is least in the way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from adapter.policy.needs import Kind, Need, Offer, fit
from adapter.policy.node_terms import NO_TERMS

_MOST_UNITS = 128
"""Free units that are told apart: whoever needs no more than these is served by more, too."""


@dataclass(frozen=True, slots=True)
class _Served:
    """Needs that some free units are enough for: `share[i]` of all come with no more CPU than ``cpu_milli[i - 1]``."""

    cpu_milli: list[int]
    share: list[float]


class Mix:
    """What replicas usually need. Immutable; what it finds out about kinds of offers it keeps."""

    def __init__(self, counts: Mapping[Need, int]) -> None:
        """How often each need came; those without a GPU do not matter."""
        self._alike: dict[Need, Counter[int]] = {}
        for need, count in counts.items():
            if need.gpus:
                plain = _plain(need)
                self._alike.setdefault(replace(plain, cpu_milli=0), Counter())[plain.cpu_milli] += count
        self._count = sum(counter.total() for counter in self._alike.values())
        self._tables: dict[Kind, list[_Served]] = {}

    @classmethod
    def of(cls, needs: Iterable[Need]) -> Mix:
        """`needs` as they came, each as often as it came."""
        return cls(Counter(needs))

    def unusable(self, offer: Offer, free: int, cpu_milli: int) -> float:
        """How many of `free` units of an offer, with so much CPU beside them, are of no use on average."""
        return self.more_unusable(offer, (0, 0), (free, cpu_milli))

    def more_unusable(self, offer: Offer, before: tuple[int, int], after: tuple[int, int]) -> float:
        """How many more units are of no use after than before; each is free units, and the CPU beside them."""
        table = self._tables.get(offer.kind)
        if table is None:
            table = self._tables[offer.kind] = self._table(offer)
        (free, cpu_milli), (left, cpu_left_milli) = before, after
        was, will = table[min(free, _MOST_UNITS)], table[min(left, _MOST_UNITS)]
        lost = left * (1 - will.share[bisect_right(will.cpu_milli, cpu_left_milli)])
        return lost - free * (1 - was.share[bisect_right(was.cpu_milli, cpu_milli)])

    def _table(self, offer: Offer) -> list[_Served]:
        """By the number of free units."""
        able: dict[int, Counter[int]] = {}
        for need, counts in self._alike.items():
            found = fit(need, offer)
            if not found.code:
                able.setdefault(found.units, Counter()).update(counts)
        table, so_far = [], Counter[int]()
        for free in range(min(offer.allocatable, _MOST_UNITS) + 1):
            so_far.update(able.get(free, {}))
            cpu_milli = sorted(so_far)
            share = [served / self._count for served in accumulate(so_far[cpu] for cpu in cpu_milli)]
            table.append(_Served(cpu_milli, [0.0, *share]))
        return table


def _plain(need: Need) -> Need:
    """What of a need decides which offers fit it, and how much CPU it takes beside."""
    return replace(
        need, function="", snapshot="", spot="any", host_memory_bytes=0, terms=NO_TERMS, load_s=0, cold_price=0
    )


USUAL = Mix.of(
    Need("", gpus, cpu_milli=cpu_milli)
    for gpus, cores, times in (
        (0.5, 2, 3),
        (1.0, 4, 6),
        (1.0, 8, 4),
        (1.0, 12, 2),
        (2.0, 16, 2),
        (4.0, 32, 1),
        (8.0, 64, 2),
    )
    for cpu_milli in [cores * 1000] * times
)
"""Where nothing has come yet: mostly single GPUs, with the CPU that clouds sell beside one."""


class Recent:
    """The needs of the last replicas, a day's worth rather than a minute's: who came just now may come no more."""

    def __init__(self, at_most: int = 10_000, fewest: int = 100) -> None:
        """`fewest`: of so many on they say more than `USUAL` does, and the mix is made anew after so many more."""
        self._at_most, self._fewest = at_most, fewest
        self._last: deque[Need] = deque()
        self._counts: Counter[Need] = Counter()
        self._seen = 0
        self._mix = USUAL

    @property
    def mix(self) -> Mix:
        return self._mix

    def add(self, need: Need) -> None:
        if not need.gpus:
            return
        plain = _plain(need)
        self._last.append(plain)
        self._counts[plain] += 1
        if len(self._last) > self._at_most:
            oldest = self._last.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        self._seen += 1
        if self._seen % self._fewest == 0:
            self._mix = Mix(self._counts)
