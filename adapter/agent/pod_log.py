"""What a container's entrypoint says in its log: our events, read from the files that the container runtime writes.

    /var/log/pods/NAMESPACE_POD_UID/CONTAINER/RESTARTS.log       lines ``TIME STREAM TAG TEXT``; TAG P: more follows
    …/RESTARTS.log.20260102-150405                               one that was rotated; .gz when it is older

Functions write there too: a line counts only where it is one of our events as a whole, and what it says of whose it is
counts for nothing. https://github.com/kubernetes/design-proposals-archive/blob/main/node/kubelet-cri-logging.md
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from adapter.records import Event

FOLDER = Path("/var/log/pods")
_EVENT_START = b'{"event"'
_EVENT_LIMIT_BYTES = 64 * 1024
_READ_BYTES = 2**20
"""At once: a function that writes a lot is read over several rounds, and others have their turn."""


def log_folder(namespace: str, pod: str, uid: str, container: str, root: Path = FOLDER) -> Path:
    return root / f"{namespace}_{pod}_{uid}" / container


class PodLog:
    """Events of one container, over its restarts and its files' rotations, from the first that is still there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1
        self._inode = 0
        self._restarts = -1
        self._rest = b""
        self._parts: list[bytes] = []
        """Of a line of the container's that comes in several of the runtime's."""
        self._parts_bytes = 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, restarts: int) -> list[Event]:
        """What is new, of the container's run number `restarts` and those before. Never raises: no file, no events."""
        events: list[Event] = []
        for run in range(max(self._restarts, restarts - 1, 0), restarts + 1):
            if run != self._restarts:
                self._begin(run)
            events += self._read_run(run)
        return events

    def _begin(self, run: int) -> None:
        self.close()
        self._restarts, self._inode, self._rest = run, 0, b""
        self._drop_parts()

    def _read_run(self, run: int) -> list[Event]:
        events: list[Event] = []
        path = self._folder / f"{run}.log"
        if self._fd < 0 and not self._inode:
            for old in self._rotated(path):
                self._open(old)
                events += self._drain()
                self.close()
            self._open(path)
        events += self._drain()
        with suppress(OSError):
            if self._fd >= 0 and path.stat().st_ino != self._inode:  # it was rotated: nothing is added to the old one
                events += self._drain(whole=True)
                self.close()
                self._open(path)
                events += self._drain()
        if self._fd < 0:
            self._open(path)
        return events

    def _rotated(self, path: Path) -> Iterable[Path]:
        """Older files of the same run, the oldest first; what is packed is too old to matter."""
        with suppress(OSError):
            return sorted(old for old in self._folder.glob(f"{path.name}.*") if old.suffix not in (".gz", ".tmp"))
        return ()

    def _open(self, path: Path) -> None:
        with suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self._inode = os.fstat(self._fd).st_ino

    def _drain(self, *, whole: bool = False) -> list[Event]:
        if self._fd < 0:
            return []
        events: list[Event] = []
        while data := self._some():
            *lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > _EVENT_LIMIT_BYTES:
                self._rest = b""
            for line in lines:
                event = self._event(line)
                if event is not None:
                    events.append(event)
            if len(data) < _READ_BYTES and not whole:
                break
        return events

    def _some(self) -> bytes:
        try:
            return os.read(self._fd, _READ_BYTES)
        except OSError:
            return b""

    def _event(self, line: bytes) -> Event | None:
        """Of a line of the runtime's, with the parts of the container's line that came before it."""
        fields = line.split(b" ", 3)
        if len(fields) < 4 or fields[1] != b"stdout":
            return None
        _, _, tag, text = fields
        if self._parts or text.startswith(_EVENT_START):
            self._parts.append(text)
            self._parts_bytes += len(text)
        if tag.startswith(b"P"):
            if self._parts_bytes > _EVENT_LIMIT_BYTES:
                self._parts = [b"too long"]
                self._parts_bytes = 0
            elif not self._parts:
                self._parts = [b"-"]  # what follows begins in the middle of a line
            return None
        whole = b"".join(self._parts)
        self._drop_parts()
        if not whole.startswith(_EVENT_START) or len(whole) > _EVENT_LIMIT_BYTES:
            return None
        try:
            return Event.from_line(whole)
        except ValueError:
            return None

    def _drop_parts(self) -> None:
        self._parts, self._parts_bytes = [], 0
