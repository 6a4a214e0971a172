"""What was promised to pods that have no node yet, so that many that come at once do not all choose the same one.

A promise is kept until its pod has a node, by then the cluster itself says so, or for half a minute: the scheduler may
have chosen another node, and a pod may never have been made.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

TTL_S = 30.0
PER_NAMESPACE = 200
"""A namespace's pods that are refused later, by a quota say, must not look like a full cluster to all others."""


@dataclass(frozen=True, slots=True)
class Reservation:
    node: str
    amounts: Mapping[str, int]
    ends_at: float


class Reservations:
    """By a mark that the pod carries: it has no name and no UID yet when it is promised something."""

    def __init__(self, ttl_s: float = TTL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._clock = ttl_s, clock
        self._by_mark: dict[str, Reservation] = {}
        """In the order of their ends."""
        self._number: Counter[str] = Counter()
        """By namespace."""

    def __len__(self) -> int:
        return len(self._by_mark)

    def __contains__(self, mark: object) -> bool:
        return mark in self._by_mark

    def add(self, mark: str, node: str, amounts: Mapping[str, int]) -> None:
        """`mark`: ``namespace/…``. Where the namespace has `PER_NAMESPACE` already, nothing is promised."""
        self.drop(mark)
        namespace = _namespace(mark)
        if self._number[namespace] >= PER_NAMESPACE:
            return
        self._number[namespace] += 1
        self._by_mark[mark] = Reservation(node, amounts, self._clock() + self._ttl_s)

    def drop(self, mark: str) -> str:
        """The node that it was for; empty where nothing was promised."""
        found = self._by_mark.pop(mark, None)
        if found is None:
            return ""
        namespace = _namespace(mark)
        self._number[namespace] -= 1
        if not self._number[namespace]:
            del self._number[namespace]
        return found.node

    def expire(self) -> set[str]:
        """Forget those whose time is over; the nodes they were for."""
        now, freed = self._clock(), set()
        while self._by_mark:
            mark, first = next(iter(self._by_mark.items()))
            if first.ends_at > now:
                break
            freed.add(self.drop(mark))
        return freed

    def on(self, node: str) -> Counter[str]:
        """What is promised of a node."""
        total: Counter[str] = Counter()
        for each in self._by_mark.values():
            if each.node == node:
                total.update(each.amounts)
        return total


def _namespace(mark: str) -> str:
    return mark.partition("/")[0]
