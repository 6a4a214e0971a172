"""An event loop whose time passes only while nothing else can happen: a minute's wait takes no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine


class VirtualTime(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTime) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None):
        events = super().select(0)
        if not events:
            assert timeout is not None, "nothing would ever happen any more"
            self._loop.now += max(0.0, timeout)
        return events


def in_virtual_time(work: Coroutine):
    """Run `work` to its end; what it left running is cancelled."""
    loop = VirtualTime()
    try:
        return loop.run_until_complete(work)
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.close()
