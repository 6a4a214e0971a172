"""The file that of-watchdog keeps while a function takes requests: exec probes (`cat /tmp/.lock`) look for it.

Owns its place and life. Of use in a container only: on a machine with many replicas it would say nothing of one.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path


class LockFile:
    """`write` when the port is open, `remove` when no more requests should come; without `wanted` neither does a thing."""

    def __init__(self, *, wanted: bool) -> None:
        self._path = Path(tempfile.gettempdir(), ".lock") if wanted else None

    def write(self) -> None:
        """A folder that cannot be written is said and no more: probes over HTTP do not need the file."""
        if self._path is None:
            return
        try:
            self._path.write_bytes(b"")
        except OSError as error:
            print(
                f"gpufn: no lock file {self._path}: {error.strerror}. suppress_lock=true wants none.", file=sys.stderr
            )

    def remove(self) -> None:
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
