"""A function's log: JSON lines that all its replicas append to, bounded by one rotation."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

_LIMIT_BYTES = 16 * 2**20
"""At this size the file becomes ``….1`` and a new one begins: at most twice this is kept."""

_LINE_LIMIT_BYTES = 64 * 1024


class ReplicaLog:
    """Turns what one replica prints into lines ``{"timestamp", "instance", "text"}``."""

    def __init__(self, path: Path, instance: str, echo: TextIO | None = None) -> None:
        """`echo` gets the bare text too."""
        self._path = path
        self._echo = echo
        self._instance = instance
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Append what was printed; a line is written when it ends, or when it is too long to wait for."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_LIMIT_BYTES:
            lines.append(self._rest)
            self._rest = b""
        if lines:
            self._append(lines)

    def close(self) -> None:
        if self._rest:
            self._append([self._rest])
            self._rest = b""

    def _append(self, lines: list[bytes]) -> None:
        now = datetime.now(timezone.utc).isoformat()
        texts = [line.decode(errors="replace") for line in lines]
        entries = (json.dumps({"timestamp": now, "instance": self._instance, "text": text}) for text in texts)
        try:
            size = self._write("".join(entry + "\n" for entry in entries).encode())
            if size > _LIMIT_BYTES:
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        except OSError as exc:  # a full disk: the function goes on without its log
            logger.error("lines of a log are lost", extra={"fields": {"log": str(self._path), "reason": str(exc)}})  # noqa: TRY400
        if self._echo is not None:
            self._echo.write("".join(text + "\n" for text in texts))
            self._echo.flush()

    def _write(self, data: bytes) -> int:
        """Append; returns the size of the file then."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
            return os.fstat(fd).st_size
        finally:
            os.close(fd)
