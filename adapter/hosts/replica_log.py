"""A function's log: JSON lines that all its replicas append to, bounded by one rotation.

What a replica prints is only counted on the event loop; one thread writes for all, so that neither a disk
that hangs nor a handler that prints without end holds up requests. A replica that prints more than it may in
a second loses the rest of that second, and its log says so, and how many lines it was.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

LINES_PER_S = 1000
BYTES_PER_S = 4 * 2**20
"""What one replica may print. More is no log that anybody reads."""

_TOO_MUCH = (
    f"gpufn: more than {LINES_PER_S} lines or {BYTES_PER_S // 2**20} MiB in a second: the rest is dropped".encode()
)

_LIMIT_BYTES = 16 * 2**20
"""At this size the file becomes ``….1`` and a new one begins: at most twice this is kept."""

_LINE_LIMIT_BYTES = 64 * 1024

_BACKLOG = 256
"""Pieces, of a pipe's 64 KiB at most, that may wait for the disk."""

_FLUSH_LIMIT_S = 2.0


class LogWriter:
    """The thread that writes. What it is given it does in order."""

    def __init__(self) -> None:
        self._work: queue.Queue[Callable[[], object] | None] = queue.Queue(_BACKLOG)
        threading.Thread(target=self._run, name="logs", daemon=True).start()

    def give(self, work: Callable[[], object]) -> bool:
        """False where too much waits already, and this is not done."""
        with suppress(queue.Full):
            self._work.put_nowait(work)
            return True
        return False

    async def flush(self) -> None:
        """Wait, for a moment at most, until what it was given so far is done."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        if self.give(lambda: loop.call_soon_threadsafe(done.set)):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(done.wait(), _FLUSH_LIMIT_S)

    async def close(self) -> None:
        await self.flush()
        with suppress(queue.Full):
            self._work.put_nowait(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception:  # boundary: one log's trouble is not the others'
                logger.exception("lines of a log are lost")


class ReplicaLog:
    """Turns what one replica prints into lines ``{"timestamp", "instance", "text"}``, written by `writer`."""

    def __init__(
        self,
        path: Path,
        instance: str,
        writer: LogWriter,
        *,
        echo: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`echo` gets the bare text too."""
        self._path = path
        self._echo = echo
        self._instance = instance
        self._writer = writer
        self._clock = clock
        self._rest = b""
        self._second_ends_s = 0.0
        self._lines_left = self._bytes_left = 0
        self._dropped = 0

    def feed(self, data: bytes) -> bool:
        """Take what was printed; a line is kept when it ends, or when it is too long to wait for.

        False where it is more than may be printed: to read on at once would only keep everybody else waiting.
        """
        whole, end, rest = data.rpartition(b"\n")
        if end:
            whole, self._rest = self._rest + whole, rest
            return self._keep(whole)
        self._rest += data
        if len(self._rest) <= _LINE_LIMIT_BYTES:
            return True
        whole, self._rest = self._rest, b""
        return self._keep(whole)

    def close(self) -> None:
        if self._rest:
            self._keep(self._rest)
            self._rest = b""
        if self._dropped:
            self._write([self._loss()])

    async def flush(self) -> None:
        """Wait, for a moment at most, until it is written."""
        await self._writer.flush()

    def _keep(self, text: bytes) -> bool:
        """Have lines written, as many as still may be in this second; whether these were all."""
        lines = []
        now_s = self._clock()
        if now_s >= self._second_ends_s:
            self._second_ends_s, self._lines_left, self._bytes_left = now_s + 1.0, LINES_PER_S, BYTES_PER_S
            if self._dropped:
                lines.append(self._loss())
        room = self._lines_left if self._bytes_left > 0 else 0
        parts = text.split(b"\n", room)  # one more than there is room for, at most: a flood is not taken apart
        lost = parts.pop().count(b"\n") + 1 if len(parts) > room else 0
        self._lines_left -= len(parts)
        self._bytes_left -= len(text)
        lines += parts
        if lost and not self._dropped:
            lines.append(_TOO_MUCH)
        self._dropped += lost
        if lines and not self._write(lines):
            self._dropped += len(parts)
        return not lost

    def _loss(self) -> bytes:
        count, self._dropped = self._dropped, 0
        return f"gpufn: {count} lines were dropped".encode()

    def _write(self, lines: list[bytes]) -> bool:
        now = datetime.now(timezone.utc).isoformat()
        return self._writer.give(lambda: self._append(lines, now))

    # On the writer's thread ---------------------------------------------------------------------

    def _append(self, lines: list[bytes], now: str) -> None:
        texts = [line.decode(errors="replace") for line in lines]
        entries = (json.dumps({"timestamp": now, "instance": self._instance, "text": text}) for text in texts)
        try:
            size = self._add("".join(entry + "\n" for entry in entries).encode())
            if size > _LIMIT_BYTES:
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        except OSError as exc:  # a full disk: the function goes on without its log
            logger.error("lines of a log are lost", extra={"fields": {"log": str(self._path), "reason": str(exc)}})  # noqa: TRY400
        if self._echo is not None:
            self._echo.write("".join(text + "\n" for text in texts))
            self._echo.flush()

    def _add(self, data: bytes) -> int:
        """Append; returns the size of the file then."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
            return os.fstat(fd).st_size
        finally:
            os.close(fd)
