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
_READ_BYTES = 64 * 1024
_ROUND_BYTES = 2**20
"""A function that writes a lot is read over several rounds, and others have their turn."""
_EVENT_BYTES = 1024
"""What an event counts for in that, so that a function that says a lot is heard over several rounds too."""


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
        self._left_bytes = 0
        """Of this round."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, restarts: int) -> list[Event]:
        """What is new, of the container's run number `restarts` and those before; of what is a lot, the first part.

        Never raises: no file, no events.
        """
        events: list[Event] = []
        self._left_bytes = _ROUND_BYTES
        for run in range(max(self._restarts, restarts - 1, 0), restarts + 1):
            if run != self._restarts:
                self._begin(run)
            events += self._read_run(run)
            if self._left_bytes <= 0:
                break
        return events

    def _begin(self, run: int) -> None:
        self.close()
        self._restarts, self._inode, self._rest = run, 0, b""
        self._drop_parts()

    def _read_run(self, run: int) -> list[Event]:
        events = self._drain()
        while self._left_bytes > 0 and (following := self._following(run)) is not None:
            events += self._drain()  # what came before the runtime went on to the next file
            if self._left_bytes <= 0 or not self._open(following):
                break
            events += self._drain()
        return events

    def _following(self, run: int) -> Path | None:
        """The file after the one that is read; None where there is none yet."""
        latest = self._folder / f"{run}.log"
        if self._inode and _inode(latest) == self._inode:
            return None
        files = {_inode(path): path for path in (*self._rotated(latest), latest)}
        files.pop(0, None)
        if not self._inode:
            return next(iter(files.values()), None)
        if self._inode not in files:  # it is packed, or gone
            return latest if latest in files.values() else None
        inodes = list(files)
        return next((files[inode] for inode in inodes[inodes.index(self._inode) + 1 :]), None)

    def _rotated(self, path: Path) -> Iterable[Path]:
        """Older files of the same run, the oldest first; what is packed is too old to matter."""
        with suppress(OSError):
            return sorted(old for old in self._folder.glob(f"{path.name}.*") if old.suffix not in (".gz", ".tmp"))
        return ()

    def _open(self, path: Path) -> bool:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return False
        self.close()
        self._fd, self._inode, self._rest = fd, os.fstat(fd).st_ino, b""
        return True

    def _drain(self) -> list[Event]:
        events: list[Event] = []
        while self._fd >= 0 and self._left_bytes > 0 and (data := self._some()):
            *lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > _EVENT_LIMIT_BYTES:
                self._rest = b""
            found = [event for event in map(self._event, lines) if event is not None]
            self._left_bytes -= len(data) + _EVENT_BYTES * len(found)
            events += found
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


def _inode(path: Path) -> int:
    """0 where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0
