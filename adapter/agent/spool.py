"""What the ledger has not acknowledged yet, and what the agent has to know after it died: one file that survives both.

    magic, then frames: length (4 bytes), CRC-32 of length and payload (4), payload (JSON, UTF-8)
    payload: {"seq": number of its first record, "records": […], "state": {…}, or null: more of the same follows}

Records come with the state that they lead to, in one frame or several, so that either all are there or nothing: a crash
at any byte leaves the spool as it was before them or after them. What was acknowledged is delivered again after a crash (it counts once),
unless the file was written anew meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from adapter.errors import Conflict, Overloaded, StorageError
from adapter.files import part_of, sync

logger = logging.getLogger(__name__)

FILE_NAME = "spool"
LIMIT_BYTES = 64 * 2**20
"""Some days of a busy node without a ledger."""

_MAGIC = b"GPUFNSP1"
_HEADER = struct.Struct("<II")
_FRAME_LIMIT_BYTES = 16 * 2**20
_PART_BYTES = 2**20
"""Records for more than this go into several frames."""
_PENDING_BYTES = 4 * 2**20
"""Half of what the ledger takes at once: there, records are written less densely."""
_COMPACT_BYTES = 2**16
"""Less than this is not worth writing anew."""


@dataclass(frozen=True, slots=True)
class _Frame:
    offset: int
    length: int
    """Bytes with the header."""
    first: int
    count: int


class Spool:
    """One agent's spool; nobody else may have it open. Its methods may be called from any thread."""

    def __init__(self, path: Path, fd: int, limit_bytes: int) -> None:
        self._path, self._fd, self._limit_bytes = path, fd, limit_bytes
        self._mutex = threading.RLock()
        self._frames: list[_Frame] = []
        self._acked = 0
        self._next = 1
        self.state: dict[str, Any] | None = None
        """Of the last frame; None where there is none."""
        self.size_bytes = 0
        self.dropped_bytes = 0
        """Of a torn end, of all behind a damaged place, or of what was damaged since."""

    @classmethod
    def open(cls, folder: Path, limit_bytes: int = LIMIT_BYTES) -> Spool:
        """Make it, or go on with what is there. Raises `Conflict` where another process has it, and `StorageError`."""
        path = folder / FILE_NAME
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = _locked(path)
            spool = cls(path, fd, limit_bytes)
            try:
                spool._recover()
            except BaseException:  # whatever it is: with the descriptor goes the lock
                os.close(fd)
                raise
        except OSError as exc:
            raise _unusable(path, exc) from exc
        return spool

    def close(self) -> None:
        """What was acknowledged need not be delivered again by the next one."""
        with self._mutex:
            if len(self._live()) < len(self._frames):
                self._compact()
            os.close(self._fd)

    @property
    def unacked(self) -> int:
        """Records that wait for the ledger."""
        with self._mutex:
            return sum(frame.first + frame.count - max(frame.first, self._acked + 1) for frame in self._live())

    @property
    def is_full(self) -> bool:
        """What can be said later should be: half of the room is kept for what cannot."""
        with self._mutex:
            return sum(frame.length for frame in self._live()) > self._limit_bytes // 2

    def append(self, records: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> None:
        """On the disk, both of them, when this returns.

        Raises `Overloaded` where its bound is reached, and `StorageError` (a full disk): nothing is kept then.
        """
        with self._mutex:
            self._append(records, state)

    def _append(self, records: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> None:
        parts, frames, first = _parts(records), list[bytes](), self._next
        for part in parts:
            frames.append(_frame({"seq": first, "records": part, "state": dict(state) if part is parts[-1] else None}))
            first += len(part)
        whole, longest = b"".join(frames), max(map(len, frames))
        if longest > _HEADER.size + _FRAME_LIMIT_BYTES:
            raise StorageError("Records cannot be kept.", why=f"{longest} bytes are one piece.", code="spool-frame")
        if self.size_bytes + len(whole) > self._limit_bytes:
            self._compact()
        if self.size_bytes + len(whole) > self._limit_bytes:
            raise Overloaded(
                f"The spool {self._path} is full.",
                why=f"The ledger has not acknowledged {self.unacked} records.",
                hint="Look whether agents reach the ledger: kubectl -n gpufn-system logs deploy/gpufn-ledger",
                code="spool-full",
            )
        try:
            _write_at(self._fd, whole, self.size_bytes)
            os.fdatasync(self._fd)
        except OSError as exc:
            self._cut_back()
            raise _unusable(self._path, exc) from exc
        for part, frame in zip(parts, frames, strict=True):
            self._keep(_Frame(self.size_bytes, len(frame), self._next, len(part)))
        self.state = dict(state)

    def pending(self, limit: int = 1000, limit_bytes: int = _PENDING_BYTES) -> list[tuple[int, dict[str, Any]]]:
        """The oldest records that are not acknowledged, with their numbers; a whole frame's at least.

        What the disk gives back otherwise than it was written is lost, and logged: the others need not wait for it.
        """
        found: list[tuple[int, dict[str, Any]]] = []
        damaged: list[_Frame] = []
        with self._mutex:
            for frame in self._live():
                limit_bytes -= frame.length
                if found and (len(found) + frame.count > limit or limit_bytes < 0):
                    break
                data = self._read(frame)
                if data is None:
                    damaged.append(frame)
                    continue
                numbered = enumerate(data["records"], start=frame.first)
                found += [(seq, record) for seq, record in numbered if seq > self._acked]
            if damaged:
                self._lose(damaged)
        return found

    def ack(self, seq: int) -> None:
        """The ledger has all up to `seq`."""
        with self._mutex:
            self._acked = max(self._acked, min(seq, self._next - 1))
            live_bytes = sum(frame.length for frame in self._live())
            if self.size_bytes - live_bytes > max(_COMPACT_BYTES, live_bytes):
                self._compact()

    def _live(self) -> list[_Frame]:
        return [frame for frame in self._frames if frame.first + frame.count - 1 > self._acked]

    # The file -----------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Read what is there up to the first frame that is not whole, or not followed by its others; forget the rest."""
        size = os.fstat(self._fd).st_size
        if os.pread(self._fd, len(_MAGIC), 0) != _MAGIC:
            os.ftruncate(self._fd, 0)
            _write_at(self._fd, _MAGIC, 0)
            os.fsync(self._fd)
            sync(self._path.parent)
            self.size_bytes, self.dropped_bytes = len(_MAGIC), size
            return
        self.size_bytes = at = len(_MAGIC)
        parts: list[_Frame] = []
        while (payload := _payload_at(self._fd, at)) is not None and (data := _decoded(payload)) is not None:
            parts.append(_Frame(at, _HEADER.size + len(payload), data["seq"], len(data["records"])))
            at += parts[-1].length
            if data["state"] is not None:
                for frame in parts:
                    self._keep(frame)
                self.state = data["state"]
                parts.clear()
        self.dropped_bytes = size - self.size_bytes
        if self.dropped_bytes:
            fields = {"path": str(self._path), "bytes": self.dropped_bytes}
            logger.error("the end of the spool is torn: it is dropped", extra={"fields": fields})
            os.ftruncate(self._fd, self.size_bytes)
            os.fsync(self._fd)
        self._acked = self._frames[0].first - 1 if self._frames else 0

    def _keep(self, frame: _Frame) -> None:
        if frame.count:
            self._frames.append(frame)
        self.size_bytes += frame.length
        self._next = frame.first + frame.count

    def _read(self, frame: _Frame) -> dict[str, Any] | None:
        payload = _payload_at(self._fd, frame.offset)
        return None if payload is None else _decoded(payload)

    def _lose(self, damaged: list[_Frame]) -> None:
        """Forget them, and leave them out of the file: who opens that reads no further than to what is damaged."""
        fields = {"path": str(self._path), "records": sum(frame.count for frame in damaged)}
        logger.error("records in the spool are damaged: they are lost", extra={"fields": fields})
        self.dropped_bytes += sum(frame.length for frame in damaged)
        self._frames = [frame for frame in self._frames if frame not in damaged]
        self._compact()

    def _cut_back(self) -> None:
        """Part of a frame may be there: a later one must not follow it."""
        try:
            os.ftruncate(self._fd, self.size_bytes)
        except OSError as exc:  # the next frame is written over it; only what is longer stays, and is no frame
            logger.error("the spool cannot be cut", extra={"fields": {"path": str(self._path), "why": str(exc)}})  # noqa: TRY400

    def _compact(self) -> None:
        """Write it anew without what is acknowledged; where that fails (a full disk) it stays as it is."""
        self._frames = self._live()
        part = part_of(self._path)
        try:
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            return self._not_compacted(exc)
        frames, at = list[_Frame](), len(_MAGIC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            _write_at(fd, _MAGIC, 0)
            for frame in self._frames:
                _write_at(fd, os.pread(self._fd, frame.length, frame.offset), at)
                frames.append(_Frame(at, frame.length, frame.first, frame.count))
                at += frame.length
            last = _frame({"seq": self._next, "records": [], "state": self.state or {}})
            _write_at(fd, last, at)
            os.fsync(fd)
            part.replace(self._path)
        except OSError as exc:
            os.close(fd)
            part.unlink(missing_ok=True)
            return self._not_compacted(exc)
        os.close(self._fd)
        self._fd, self._frames, self.size_bytes = fd, frames, at + len(last)
        try:
            sync(self._path.parent)
        except OSError as exc:
            # The name leads to the new file, and only if the machine dies now perhaps to the old one.
            self._not_compacted(exc)
        return None

    def _not_compacted(self, exc: OSError) -> None:
        logger.warning("the spool is not made smaller", extra={"fields": {"path": str(self._path), "why": str(exc)}})


def _locked(path: Path) -> int:
    """A descriptor of the file with an exclusive lock. A name that changed hands while it was locked is opened anew."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                return fd
        except OSError as exc:
            os.close(fd)
            if isinstance(exc, BlockingIOError):
                raise Conflict(f"Another agent has the spool {path}.", code="spool-busy") from exc
            raise
        os.close(fd)


def _parts(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """In order; one at least, and only one that holds a single record is larger than a part should be."""
    parts: list[list[Mapping[str, Any]]] = [[]]
    size = 0
    for record in records:
        length = len(json.dumps(record))
        if parts[-1] and size + length > _PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(record)
        size += length
    return parts


def _frame(payload: Mapping[str, Any]) -> bytes:
    text = json.dumps(payload, separators=(",", ":")).encode()
    return _HEADER.pack(len(text), _checksum(text)) + text


def _checksum(payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<I", len(payload))))


def _payload_at(fd: int, offset: int) -> bytes | None:
    """None where no whole frame is."""
    header = os.pread(fd, _HEADER.size, offset)
    if len(header) < _HEADER.size:
        return None
    length, checksum = _HEADER.unpack(header)
    if length > _FRAME_LIMIT_BYTES:
        return None
    payload = os.pread(fd, length, offset + _HEADER.size)
    return payload if len(payload) == length and _checksum(payload) == checksum else None


def _decoded(payload: bytes) -> dict[str, Any] | None:
    """None where it is another version's."""
    try:
        data = json.loads(payload)
    except ValueError:
        return None
    is_ours = isinstance(data, dict) and isinstance(data.get("seq"), int) and isinstance(data.get("records"), list)
    return data if is_ours and isinstance(data.get("state", ""), (dict, NoneType)) else None


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view, offset = view[written:], offset + written


def _unusable(path: Path, exc: OSError) -> StorageError:
    return StorageError(
        f"The spool {path} cannot be used.",
        why=f"{exc.strerror or exc}.",
        hint="Make room on the node's disk." if exc.errno in (errno.ENOSPC, errno.EDQUOT) else "",
        code="spool-failed",
    )
