"""The life of a component: it starts, works until a signal ends it, and ends with an exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from adapter import logs
from adapter.errors import AdapterError
from adapter.settings import as_log_level, from_environment, variable


@dataclass(frozen=True, slots=True)
class _Settings:
    """What all components have."""

    log_level: str = variable("GPUFN_LOG_LEVEL", as_log_level, "info", "how much is logged")


def run(serve: Callable[[], Coroutine[Any, Any, None]], environ: Mapping[str, str] = os.environ) -> int:
    """Until `serve` ends; the exit code. An `AdapterError`, of its making too, is printed for whoever started it."""
    try:
        logs.setup(level=from_environment(_Settings, environ).log_level)
        asyncio.run(serve())
    except AdapterError as error:
        print(error.to_text(), file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


def stop_asked() -> asyncio.Event:
    """Set by SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def until(end: Awaitable[object], *works: Awaitable[object]) -> None:
    """Run `works` until `end` is there, then cancel them. One that ends or fails before that ends all: what it raised is
    raised here."""
    tasks = [asyncio.ensure_future(work) for work in (end, *works)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in done:
        task.result()
