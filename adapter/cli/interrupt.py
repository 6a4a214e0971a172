"""Runs what a command does asynchronously, so that Ctrl-C always ends it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_interruptible(work: Coroutine[Any, Any, T], run: Callable[[Coroutine[Any, Any, T]], T] = asyncio.run) -> T:
    """`run`, on this thread's loop, with a SIGINT that wakes the loop.

    The one of `asyncio.run` does not: where the kernel gives the signal to another thread (one that waits for a child
    process, say), the handler would run when the main thread next does something, which may be never.
    """
    asked = False

    async def main() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def ask() -> None:
            nonlocal asked
            asked = True
            task.cancel()

        loop.add_signal_handler(signal.SIGINT, ask)
        try:
            return await work
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return run(work)  # whoever started us wants it ignored, or has a handler
    try:
        return run(main())
    except asyncio.CancelledError:
        if asked:
            raise KeyboardInterrupt from None
        raise
