"""How much of a node's free GPUs nobody can use: the measure of FGD (Weng et al., USENIX ATC 2023).

Pure. A free GPU is fragmented as far as replicas that usually come cannot have it, because the node has too few GPUs
free for them, too little CPU, or another model. Where a replica adds least to that, it is least in the way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from adapter.policy.needs import Kind, Need, Offer, fit

_UNUSABLE = 2**62
"""More CPU than there is."""
_MOST_UNITS = 128
"""Free units that are told apart: whoever needs no more than these is served by more, too."""


class Mix:
    """What replicas usually need. Immutable; what it finds out about kinds of offers it keeps."""

    def __init__(self, needs: Iterable[Need]) -> None:
        """`needs` as they came lately, each as often as it came; those without a GPU do not matter."""
        self._needs = [need for need in needs if need.gpus]
        self._tables: dict[Kind, list[list[int]]] = {}

    def unusable(self, offer: Offer, free: int, cpu_milli: int) -> float:
        """How many of `free` units of an offer, with so much CPU beside them, are of no use on average."""
        table = self._tables.get(offer.kind)
        if table is None:
            table = self._tables[offer.kind] = self._table(offer)
        needs = table[min(free, _MOST_UNITS)]
        return free * (1 - bisect_right(needs, cpu_milli) / len(needs)) if needs else float(free)

    def _table(self, offer: Offer) -> list[list[int]]:
        """By the number of free units: for each need, least first, the CPU with which they are enough for it."""
        fits = [(fit(need, offer), need.cpu_milli) for need in self._needs]
        return [
            sorted(_UNUSABLE if f.code or f.units > free else cpu_milli for f, cpu_milli in fits)
            for free in range(min(offer.allocatable, _MOST_UNITS) + 1)
        ]


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
