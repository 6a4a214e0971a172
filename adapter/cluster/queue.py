"""Keys that await work: each once, however often it is added; again after a pause that grows while it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

from adapter.cluster.backoff import pause_s

K = TypeVar("K", bound=Hashable)

_FIRST_PAUSE_S, _PAUSE_LIMIT_S = 0.5, 300.0


class WorkQueue(Generic[K]):
    """Any number of workers: each `get` is followed by `done`. No key is worked on by two at once: one that is added
    meanwhile comes again after its `done`. Times are the event loop's."""

    def __init__(self, *, first_pause_s: float = _FIRST_PAUSE_S, pause_limit_s: float = _PAUSE_LIMIT_S) -> None:
        self._first_pause_s, self._pause_limit_s = first_pause_s, pause_limit_s
        self._waiting: dict[K, float] = {}
        """When each was added first since it was taken last; in that order."""
        self._working: set[K] = set()
        self._later: dict[K, tuple[float, asyncio.TimerHandle]] = {}
        self._failed: dict[K, int] = {}
        self._moved = asyncio.Event()

    def __len__(self) -> int:
        """How many could be worked on now."""
        return sum(key not in self._working for key in self._waiting)

    def add(self, key: K) -> None:
        """Now. What was to come later for this key comes now."""
        self._cancel(key)
        if key not in self._waiting:
            self._waiting[key] = asyncio.get_running_loop().time()
        self._moved.set()

    def add_after(self, key: K, delay_s: float) -> None:
        """In `delay_s`, unless it comes sooner anyway."""
        loop = asyncio.get_running_loop()
        due = loop.time() + delay_s
        if key in self._waiting or (key in self._later and self._later[key][0] <= due):
            return
        self._cancel(key)
        self._later[key] = due, loop.call_at(due, self.add, key)

    def retry(self, key: K) -> None:
        """It failed: later, and each time after a longer pause until `forget`."""
        self._failed[key] = self._failed.get(key, 0) + 1
        limit_s = self._pause_limit_s
        self.add_after(key, pause_s(self._failed[key], first_s=self._first_pause_s, limit_s=limit_s))

    def forget(self, key: K) -> None:
        """It did not fail: its next failure is its first."""
        self._failed.pop(key, None)

    async def get(self) -> tuple[K, float]:
        """The key that waited longest of those nobody works on, and for how many seconds it did."""
        while True:
            for key in self._waiting:
                if key not in self._working:
                    since = self._waiting.pop(key)
                    self._working.add(key)
                    return key, asyncio.get_running_loop().time() - since
            self._moved.clear()
            await self._moved.wait()

    def done(self, key: K) -> None:
        self._working.discard(key)
        self._moved.set()

    def close(self) -> None:
        """Nothing comes later any more."""
        for key in list(self._later):
            self._cancel(key)

    def _cancel(self, key: K) -> None:
        later = self._later.pop(key, None)
        if later is not None:
            later[1].cancel()
