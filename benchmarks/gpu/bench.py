"""What every part is given: where to work, how long, and how much fits."""

from __future__ import annotations

import re
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import memory_bytes
from benchmarks.session import FUNCTIONS, Session, cache_folder, wait_until_gone

GB = 10**9
MIB = 2**20

CAPABILITIES = cache_folder().parent / "gpu-bench" / "capabilities"
"""What works here, as the canaries found last: gateways need not find it anew."""

END_S = 15.0
"""For a part to stop its gateway, look at what is left, and say what it found."""

_CONTEXT_BYTES = 10**9
"""Of a GPU, for the contexts of those who use it."""

_SETTLE_S = 10.0
_NOISE_BYTES = 32 * MIB
"""What a driver takes and gives for itself."""


@dataclass
class Bench:
    """One part's run. What it puts into `starts` are start records to show."""

    folder: Path
    """Its own, on a disk; removed after it."""
    simulated: bool = False
    deadline_s: float = float("inf")
    """Of the monotonic clock: whoever goes on after it is ended."""
    starts: dict[str, Any] = field(default_factory=dict)

    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    @contextmanager
    def session(self, functions: Path = FUNCTIONS) -> Iterator[Session]:
        """A gateway over a fresh state folder that knows already what works on the GPUs."""
        state = self.folder / "state"
        state.mkdir(mode=0o700)
        if CAPABILITIES.exists():
            shutil.copytree(CAPABILITIES, state / "gpu")
        with Session(state, functions=functions) as session:
            session.wait_for_gpus()
            yield session

    def sizes(self, real: Sequence[int], *, host: float = 0, disk: float = 0) -> tuple[list[int], dict[str, str]]:
        """Those of `real` that fit, or two small ones for a simulated GPU; and why each of the others does not.

        `host`, `disk`: how many times its size each takes there. Raises `RuntimeError` where none fits.
        """
        if self.simulated:
            return [4 * MIB, 32 * MIB], {}
        total, used = memory_bytes()
        room = {
            "GPU memory": (total - used - _CONTEXT_BYTES, 1.0),
            "host memory": (available_bytes(), host),
            "disk": (shutil.disk_usage(self.folder).free, disk),
        }
        fitting, left_out = [], {}
        for size in real:
            lacking = [what for what, (there, times) in room.items() if times * size > there]
            if lacking:
                left_out[label(size)] = f"not enough {', '.join(lacking)}"
            else:
                fitting.append(size)
        if not fitting:
            raise RuntimeError(f"nothing fits: {left_out}")
        return fitting, left_out


def label(size: int) -> str:
    """``8gb``: for names of bars."""
    return f"{size // GB}gb" if size >= GB else f"{size // MIB}mib"


def rate(size: int, seconds: Iterable[float]) -> float:
    """GB/s of the median."""
    return size / statistics.median(seconds) / GB


def available_bytes() -> int:
    """Host memory that could be had without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    assert found
    return int(found[1]) * 1024


def left_behind(session: Session, names: Iterable[str], used_before: int) -> list[str]:
    """Scale the functions to zero and stop the gateway; what is still held then, or runs."""
    for name in names:
        session.to_zero(name)
    nodes = session.api("GET", "/gpufn/v1/nodes").json()
    found = [f"lease: {holder}" for node in nodes for device in node["devices"] for holder in device["holders"]]
    session.stop()
    found += wait_until_gone(session.state)
    deadline = time.monotonic() + _SETTLE_S
    while (more := memory_bytes()[1] - used_before) > _NOISE_BYTES and time.monotonic() < deadline:
        time.sleep(0.1)
    return [*found, *([f"{more} bytes of GPU memory"] if more > _NOISE_BYTES else [])]
