"""How much of a node's free GPUs nobody can use: the measure of FGD (Weng et al., USENIX ATC 2023).

Pure. A free GPU is fragmented as far as replicas that usually come cannot have it, because the node has too few GPUs
free for them, too little CPU, or another model. Where a replica adds least to that, it is least in the way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from adapter.policy.needs import Kind, Need, Offer, fit

_MOST_UNITS = 128
"""Free units that are told apart: whoever needs no more than these is served by more, too."""


@dataclass(frozen=True, slots=True)
class _Served:
    """Needs that some free units are enough for: `share[i]` of all come with no more CPU than ``cpu_milli[i - 1]``."""

    cpu_milli: list[int]
    share: list[float]


class Mix:
    """What replicas usually need. Immutable; what it finds out about kinds of offers it keeps."""

    def __init__(self, needs: Iterable[Need]) -> None:
        """`needs` as they came lately, each as often as it came; those without a GPU do not matter."""
        self._alike: dict[tuple[object, ...], tuple[Need, Counter[int]]] = {}
        self._count = 0
        for need in needs:
            if need.gpus:
                _, counts = self._alike.setdefault(_key(need), (need, Counter()))
                counts[need.cpu_milli] += 1
                self._count += 1
        self._tables: dict[Kind, list[_Served]] = {}

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
        for need, counts in self._alike.values():
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


def _key(need: Need) -> tuple[object, ...]:
    """What decides which offers fit it."""
    return (
        need.gpus,
        need.models,
        need.memory_bytes,
        need.compute_capability,
        need.mig_profile,
        need.resource,
        need.units,
    )


USUAL = Mix(
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
