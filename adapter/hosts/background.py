"""Tasks that nobody awaits: kept from being collected, and their failures logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class Background:
    """A set of running tasks with one owner, whom the log names by `fields`."""

    def __init__(self, **fields: str) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._fields = fields

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("work in the background failed", exc_info=error, extra={"fields": self._fields})

    def cancel(self) -> None:
        """All but the one that asks."""
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    async def join(self) -> None:
        """Wait until all have ended, those included that they begin meanwhile."""
        while self._tasks:
            await asyncio.wait(self._tasks)
