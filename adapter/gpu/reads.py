"""How parts of a file are read: in which pieces, and through the page cache or past it.

Pure planning, and reading that goes on after short reads and says what is wrong in our words.
Standard library only; knows nothing of GPUs.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from adapter.errors import SnapshotCorrupt, SnapshotError
from adapter.pagecache import resident_ratio

PAGE_BYTES = 4096
"""What O_DIRECT may ask offsets, lengths and addresses to be multiples of."""

GAP_BYTES = 256 * 2**10
"""Bytes between two parts that are read for nothing, because another request would take longer."""

_SAMPLES = 64
_PROBE_LEAST_BYTES = 256 * 2**20
"""Below it a probe costs more than the better choice gains."""
_PROBE_BYTES = 4 * 2**20
_PROBE_THREADS = 4
_PROBE_READS = 8


class Mode(str, enum.Enum):
    """How the file was read: it lay in the page cache; through it; past it (O_DIRECT)."""

    CACHED = "cached"
    BUFFERED = "buffered"
    DIRECT = "direct"


@dataclass(slots=True)
class Read:
    """One read of a buffer's size or less: `size` bytes of the file from `start`, a multiple of a page, on.

    `copies` are (start in the buffer, bytes, target address).
    """

    start: int
    size: int = 0
    copies: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, start: int, size: int, address: int) -> None:
        self.size = max(self.size, start + size)
        if self.copies:
            last_start, last_size, last_address = self.copies[-1]
            if (last_start + last_size, last_address + last_size) == (start, address):
                self.copies[-1] = (last_start, last_size + size, last_address)
                return
        self.copies.append((start, size, address))


def plan(ranges: Iterable[tuple[int, int, int]], limit_bytes: int) -> list[Read]:
    """Reads of at most `limit_bytes` that cover `ranges`, (file offset, bytes, target address) each.

    In the order of the file, every byte copied once. `limit_bytes` is a multiple of a page.
    """
    reads: list[Read] = []
    for at, size, address in sorted(ranges):
        done = 0
        while done < size:
            here = at + done
            if not reads or not _continues(reads[-1], here, limit_bytes):
                reads.append(Read(here // PAGE_BYTES * PAGE_BYTES))
            read = reads[-1]
            part = min(size - done, read.start + limit_bytes - here)
            read.add(here - read.start, part, address + done)
            done += part
    return reads


def _continues(read: Read, at: int, limit_bytes: int) -> bool:
    return read.start <= at <= read.start + read.size + GAP_BYTES and at < read.start + limit_bytes


class Source:
    """An open file, read by several threads. `close` it."""

    def __init__(self, fd: int, reads: Sequence[Read]) -> None:
        self._fd = fd
        self._direct = -1
        self.mode = Mode.CACHED if _resident_ratio(fd, reads) >= 0.5 else Mode.BUFFERED
        if self.mode is Mode.BUFFERED and _is_direct_faster(fd, reads):
            self._direct = _open_direct(fd)
            self.mode = Mode.DIRECT if self._direct >= 0 else Mode.BUFFERED

    def read(self, read: Read, buffer: memoryview) -> None:
        """Fill the beginning of `buffer`, at a page and a multiple of pages long. Raises `SnapshotError`."""
        done = 0
        while done < read.size:
            direct = self.mode is Mode.DIRECT and done % PAGE_BYTES == 0  # after an odd short read it is not
            end = -(-read.size // PAGE_BYTES) * PAGE_BYTES if direct else read.size
            try:
                count = os.preadv(self._direct if direct else self._fd, [buffer[done:end]], read.start + done)
            except InterruptedError:
                continue
            except OSError as exc:
                if direct and exc.errno == errno.EINVAL:  # a file system that cannot, and did not say so before
                    self.mode = Mode.BUFFERED
                    continue
                raise SnapshotError(
                    "The weights cannot be read.",
                    why=f"{exc.strerror} at byte {read.start + done}.",
                    code="read-failed",
                ) from exc
            if count <= 0:
                raise SnapshotCorrupt(
                    "The weights end early.", why=f"The file has become shorter than {read.start + read.size} bytes."
                )
            done += count

    def close(self) -> None:
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1


def _resident_ratio(fd: int, reads: Sequence[Read]) -> float:
    step = max(1, len(reads) // _SAMPLES)
    try:
        return resident_ratio(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY), [read.start for read in reads[::step]])
    except (OSError, ValueError):
        return 0


_faster_direct: dict[int, bool] = {}
"""Device number of a mount -> whether reads past the page cache are faster there. A restored process keeps it."""


def _is_direct_faster(fd: int, reads: Sequence[Read]) -> bool:
    size = sum(read.size for read in reads)
    mount = os.fstat(fd).st_dev
    if mount in _faster_direct or size < _PROBE_LEAST_BYTES:
        return _faster_direct.get(mount, False)
    direct = _open_direct(fd)
    if direct >= 0:
        try:
            start = reads[len(reads) // 3].start, reads[2 * len(reads) // 3].start
            _faster_direct[mount] = _seconds(direct, start[0]) < _seconds(fd, start[1])
        except OSError:  # EINVAL: it cannot; anything else is said when it is met in earnest
            _faster_direct[mount] = False
        finally:
            os.close(direct)
    return _faster_direct.setdefault(mount, False)


def _seconds(fd: int, start: int) -> float:
    """What a few reads at once take. Raises `OSError`."""

    def read(number: int) -> None:
        with mmap.mmap(-1, _PROBE_BYTES) as buffer:  # begins at a page
            os.preadv(fd, [buffer], start + number * _PROBE_BYTES)

    began = time.perf_counter()
    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        list(pool.map(read, range(_PROBE_READS)))
    return time.perf_counter() - began


def _open_direct(fd: int) -> int:
    """The same file past the page cache, or -1 where its file system or this system cannot."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return -1
