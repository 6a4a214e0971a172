"""Our stream of a file into GPU memory, against what PCIe gives plain copies from pinned memory, in turns.

The file is in the page cache. Ours has everything in it: pinning its buffers, reading, copying, and the last
byte on the device.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter.gpu.memory import call, context
from adapter.gpu.stream import stream
from benchmarks.gpu.bench import GB, MIB, Bench, label, rate
from benchmarks.loaders import read_through, resident
from benchmarks.results_file import Bar, ratio_of_medians

SIZES = (1 * GB, 4 * GB, 16 * GB)
RUNS = 5
_PINNED_BYTES = 256 * MIB
_BLOCK_BYTES = 16 * MIB
_LOOK_BYTES = 4096


def run(bench: Bench) -> Iterable[Bar]:
    sizes, left_out = bench.sizes(SIZES, host=1.3, disk=1.3)
    path = bench.folder / "weights"
    write(path, sizes[-1])
    read_through(path)
    for size in sizes:
        ours, pcie = measure(path, size)
        ratio = ratio_of_medians(pcie, ours)
        runs = [{"gpufn_s": round(a, 5), "pcie_s": round(b, 5)} for a, b in zip(ours, pcie, strict=True)]
        yield Bar.of(f"gpu_stream_{label(size)}_gb_s", rate(size, ours), "GB/s", [round(s, 5) for s in ours])
        yield Bar.of(f"gpu_pcie_{label(size)}_gb_s", rate(size, pcie), "GB/s", [round(s, 5) for s in pcie])
        yield Bar.of("gpu_weights_over_pcie", ratio, "ratio", [{"size": label(size), **left_out}, *runs])  # the last


def measure(path: Path, size: int) -> tuple[list[float], list[float]]:
    """Seconds of each run: ours, and PCIe's. Raises `RuntimeError` where other bytes arrived."""
    ours, pcie = [], []
    with path.open("rb") as file, context(0), device_memory(size) as memory, pinned(min(_PINNED_BYTES, size)) as buffer:
        for _ in range(RUNS):
            pcie.append(copy(buffer, min(_PINNED_BYTES, size), memory, size))
            if resident(path) < 1:
                raise RuntimeError("the file does not stay in the page cache: there is too little memory")
            ours.append(stream(file.fileno(), [(0, size, memory)]).seconds)
            check(file.fileno(), memory, size)
    return ours, pcie


def copy(buffer: int, buffer_bytes: int, memory: int, size: int) -> float:
    """Seconds of plain copies from one pinned buffer, until the last byte is there."""
    lane = call("cuStreamCreate", 1)  # CU_STREAM_NON_BLOCKING
    try:
        began = time.perf_counter()
        for at in range(0, size, buffer_bytes):
            call("cuMemcpyHtoDAsync", memory + at, buffer, min(buffer_bytes, size - at), lane)
        call("cuStreamSynchronize", lane)
        return time.perf_counter() - began
    finally:
        call("cuStreamDestroy", lane)


def check(fd: int, memory: int, size: int) -> None:
    """Both ends of each block are as in the file. Raises `RuntimeError`."""
    for at in range(0, size, _BLOCK_BYTES):
        for place in (at, min(at + _BLOCK_BYTES, size) - _LOOK_BYTES):
            back = bytearray(_LOOK_BYTES)
            call("cuMemcpyDtoH", back, memory + place, _LOOK_BYTES)
            if back != os.pread(fd, _LOOK_BYTES, place):
                raise RuntimeError(f"other bytes arrived at {place} of {label(size)}")


def write(path: Path, size: int) -> None:
    """A file on the disk in which no block is like another."""
    block = bytearray(os.urandom(_BLOCK_BYTES))
    with path.open("wb", buffering=0) as file:
        for number, at in enumerate(range(0, size, _BLOCK_BYTES)):
            block[:8] = block[-8:] = number.to_bytes(8, "little")
            file.write(block[: min(_BLOCK_BYTES, size - at)])
        os.fsync(file.fileno())


@contextmanager
def device_memory(size: int) -> Iterator[int]:
    memory = int(call("cuMemAlloc", size))
    try:
        yield memory
    finally:
        call("cuMemFree", memory)


@contextmanager
def pinned(size: int) -> Iterator[int]:
    address = int(call("cuMemHostAlloc", size, 0))
    ctypes.memset(address, 1, size)
    try:
        yield address
    finally:
        call("cuMemFreeHost", address)
