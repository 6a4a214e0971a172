"""What the entrypoint waits for: descriptors, timers and signals, in one thread."""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress

Call = Callable[[], object]


class Loop:
    """Calls back what is due; `turn` waits for the next of it. Not for use from several threads."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Call]] = []
        self._timer_ids = itertools.count()

    def watch(self, file: int, call: Call) -> None:
        """Call whenever the descriptor can be read."""
        self.selector.register(file, selectors.EVENT_READ, call)

    def forget(self, file: int) -> None:
        """Harmless where it is not watched."""
        with suppress(KeyError, ValueError):
            self.selector.unregister(file)

    def after(self, seconds: float, call: Call) -> None:
        """Call once, that much later."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_ids), call))

    def watch_signals(self, numbers: Collection[signal.Signals], call: Callable[[set[int]], object]) -> None:
        """Call with the numbers of those that came, here and not between two instructions of anything; of those too
        that were blocked until now."""
        wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)
        self.watch(wake_r, lambda: call(set(os.read(wake_r, 512))))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def turn(self) -> None:
        """Wait for what comes first, and do all that is due."""
        timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        for key, _ in self.selector.select(timeout):
            if key.fd in self.selector.get_map():  # an earlier callback of this turn may have closed it
                key.data()
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()
