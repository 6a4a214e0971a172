"""Pages of large files: whether they are in memory, and bringing them there faster than by one fault each.

What is not in the page cache is asked for by several threads, so that a disk has more than one request to
work on, and in windows of two large pages whatever its read-ahead is set to (that is what MADV_HUGEPAGE does
to a mapped file); the page cache then holds large pages where the file system can, which are mapped as such.
Where the kernel has no MADV_POPULATE_READ (before 5.14) the pages are asked for and not waited for.
Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

PAGE_BYTES = mmap.PAGESIZE
_SAMPLES = 64
_WARM_RATIO = 0.9
_PIECE_BYTES = 8 * 2**20
"""Small, so that what is under way lies together: far apart, disks are slower."""
_THREADS = 4
"""They wait for the disk, not for a processor: more than a small machine has of these, few enough for a disk that turns."""

_MADV_POPULATE_READ = 22  # linux/mman.h; the mmap module names it from Python 3.15 on
_WILLNEED_BYTES = 128 * 2**10
"""One request of the older kind: the kernel cuts off what is above the disk's own limit, 128 KiB on the smallest."""

_MEMORY_SHARE = 0.5
"""Read-ahead fills no more than this of the memory that is available: more would push out what it just read."""


def resident_ratio(mapping: mmap.mmap, starts: Iterable[int] = ()) -> float:
    """How much of a privately mapped file is in the page cache, by pages at `starts` or all over it. Reads nothing.

    0 where the kernel does not say it.
    """
    step = max(PAGE_BYTES, len(mapping) // _SAMPLES // PAGE_BYTES * PAGE_BYTES)
    pages = [start for start in starts or range(0, len(mapping), step) if start < len(mapping)]
    base, resident, byte = _address(mapping), 0, ctypes.c_ubyte()
    for page in pages:
        if _libc.mincore(ctypes.c_void_p(base + page), ctypes.c_size_t(PAGE_BYTES), ctypes.byref(byte)) == 0:
            resident += byte.value & 1
    return resident / max(1, len(pages))


def populate(mapping: mmap.mmap) -> None:
    """Bring every page of a privately mapped file into memory; returns when they are there.

    Raises `OSError` (EFAULT) where the disk cannot read a page or the file has become shorter: what would
    else end the process (SIGBUS) when that page is touched.
    """
    with suppress(OSError):  # a kernel without large pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    if resident_ratio(mapping) < _WARM_RATIO:  # else faults are quicker: the kernel maps the neighbours of each
        _in_threads(lambda start, length: _populate(mapping, start, length), len(mapping))


class ReadAhead:
    """A file that is read into the page cache in the background; whatever fails only ends it early."""

    def __init__(self, path: Path) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(path,), name="read-ahead", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended by then; no thread is left when it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End it after the pieces that are being read, and wait for that."""
        self._stopped.set()
        self._thread.join()

    def _run(self, path: Path) -> None:
        with suppress(OSError, ValueError):  # missing, empty, no regular file, unreadable: a slower start, no more
            with path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            mapping.madvise(mmap.MADV_HUGEPAGE)

            def unless_stopped(start: int, length: int) -> None:
                if not self._stopped.is_set():
                    _populate(mapping, start, length)

            _in_threads(unless_stopped, min(len(mapping), int(_available_bytes() * _MEMORY_SHARE)))


def _in_threads(act: Callable[[int, int], object], size: int) -> None:
    """Call `act` with (start, length) of consecutive pieces of `size`. Raises what the first that fails raises."""
    starts = range(0, size, _PIECE_BYTES)

    def one(start: int) -> None:
        act(start, min(_PIECE_BYTES, size - start))

    if len(starts) < 2:
        for start in starts:
            one(start)
        return
    with ThreadPoolExecutor(min(_THREADS, len(starts)), "weights") as pool:
        for _ in pool.map(one, starts):
            pass


def _populate(mapping: mmap.mmap, start: int, length: int) -> None:
    if _madvise(_address(mapping) + start, length, _MADV_POPULATE_READ) == 0:
        return
    error = ctypes.get_errno()
    if error in {errno.ENOMEM, errno.EAGAIN}:  # a tight memory limit: these pages come when they are touched
        return
    if error != errno.EINVAL:
        raise OSError(error, os.strerror(error))
    for at in range(start, start + length, _WILLNEED_BYTES):
        mapping.madvise(mmap.MADV_WILLNEED, at, min(_WILLNEED_BYTES, start + length - at))


def _available_bytes() -> int:
    """What can be allocated without swapping, page cache that can be dropped included."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


_libc = ctypes.CDLL(None, use_errno=True)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
