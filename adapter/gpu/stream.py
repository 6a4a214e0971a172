"""Parts of a file into device memory: threads read into small rings of pinned buffers, streams copy from them.

Each thread has a stream and a few buffers of its own, so a buffer is never in two hands: it is filled
while the one before is copied, and again when that copy is done. Host memory is bounded by `Options`,
whatever the size of the model. Knows nothing of torch: addresses come in.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from adapter.gpu.memory import Lane, context, enter
from adapter.gpu.reads import PAGE_BYTES, Mode, Read, Source, plan

_LEAST_THREADS, _MOST_THREADS = 4, 8


def _threads() -> int:
    """A disk wants some reads at once, whatever the processors. Out of the page cache one thread gets 7 GB/s where
    PCIe 5 takes 55; more than eight wait for one another."""
    return min(max(_LEAST_THREADS, len(os.sched_getaffinity(0))), _MOST_THREADS)


@dataclass(frozen=True, slots=True)
class Options:
    """How much is under way at once. Pinned memory is the product of the three: 64 MiB at the most by default."""

    threads: int = field(default_factory=_threads)
    buffers: int = 2
    """Of each thread."""
    buffer_bytes: int = 4 * 2**20
    """A multiple of a page. Larger ones keep no disk and no bus busier, and take longer to pin."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """What was copied to the device, how long it took with everything, and how the file was read."""

    bytes: int
    seconds: float
    mode: Mode
    reads: int


_LEAST_BUFFER_BYTES = 2**20


def stream(
    fd: int, ranges: Sequence[tuple[int, int, int]], *, device: int = 0, options: Options = Options()
) -> Streamed:
    """Copy parts of an open file, (file offset, bytes, device address) each, into memory of a device.

    Everything is there when it returns. Raises `SnapshotError` (the disk), `SnapshotCorrupt` (the file is
    too short), `GpuError`; then parts may be missing, and no thread, copy or pinned buffer is left.
    """
    began = time.perf_counter()
    size = sum(part for _, part, _ in ranges)
    buffer_bytes = _fitting(size, options)
    reads = plan(ranges, buffer_bytes)
    if not reads:
        return Streamed(0, 0.0, Mode.CACHED, 0)
    with context(device) as primary, closing(Source(fd, reads)) as source:
        work = _Work(reads)

        def run() -> None:
            try:
                enter(primary)
                with Lane(options.buffers, buffer_bytes) as lane:
                    for read in work:
                        source.read(read, lane.buffer())
                        lane.send(read.copies)
                    lane.finish()
            except BaseException as exc:
                work.fail(exc)

        _together(run, min(options.threads, len(reads)), work)
        return Streamed(size, time.perf_counter() - began, source.mode, len(reads))


def _fitting(size: int, options: Options) -> int:
    """The buffers' size: small models are cut so that every buffer has a part in them."""
    share = -(-size // (options.threads * options.buffers))
    rounded = -(-share // PAGE_BYTES) * PAGE_BYTES
    return min(options.buffer_bytes, max(_LEAST_BUFFER_BYTES, rounded))


class _Work:
    """Reads to be done, each by the thread that takes it; none any more once something failed."""

    def __init__(self, reads: Iterable[Read]) -> None:
        self._reads = iter(reads)
        self._lock = threading.Lock()
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[Read]:
        while True:
            with self._lock:
                read = None if self.failure else next(self._reads, None)
            if read is None:
                return
            yield read

    def fail(self, exc: BaseException) -> None:
        """The first failure is the one that is said."""
        with self._lock:
            self.failure = self.failure or exc


def _together(run: Callable[[], None], count: int, work: _Work) -> None:
    """Call it in threads, and wait until all have ended, also when interrupted. Raises what failed first."""
    threads = [threading.Thread(target=run, name=f"weights-{number}") for number in range(count)]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError as exc:  # no more threads for this process
        work.fail(exc)
    for thread in started:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as exc:
                work.fail(exc)
    if work.failure:
        raise work.failure
