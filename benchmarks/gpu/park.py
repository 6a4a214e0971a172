"""Parking and resuming a process through our helper, against the driver's own time for the same calls.

The driver's time is that of the steps in the helper's answers; the difference is our helper, its socket and its
looks at the process's state. First and later cycles are told apart: a driver may keep the host memory it took.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapter.gpu.client import HelperClient, start_helper
from adapter.gpu.wire import Answer, Operation
from benchmarks.gpu.bench import GB, Bench, available_bytes, label, rate
from benchmarks.gpu.machine import memory_bytes
from benchmarks.results_file import Bar
from benchmarks.session import REPOSITORY

SIZES = (1 * GB, 8 * GB, 16 * GB)
CYCLES = 3

Cycle = Mapping[str, float]


def run(bench: Bench) -> Iterable[Bar]:
    sizes, left_out = bench.sizes(SIZES, host=1.5)
    worst: dict[str, tuple[float, list[Any]]] = {}
    for size in sizes:
        cycles, first_s = measure(bench, size)
        yield Bar.of(f"gpu_helper_first_{label(size)}_s", first_s, "s")
        for what, step in (("park", "checkpoint_s"), ("resume", "restore_s")):
            seconds = [cycle[step] for cycle in cycles]
            yield Bar.of(f"gpu_{what}_{label(size)}_gb_s", rate(size, seconds), "GB/s", cycles)
            yield Bar.of(f"gpu_{what}_{label(size)}_s", statistics.median(c[f"{what}_s"] for c in cycles), "s")
            ratio = statistics.median(c[f"{what}_s"] / c[f"{what}_driver_s"] for c in cycles)
            worst[what] = max(worst.get(what, (0.0, [])), (ratio, [{"size": label(size)}, left_out]))
        growth = max(cycle["host_bytes"] for cycle in cycles) / size
        yield Bar.of(f"gpu_park_{label(size)}_host", growth, "of its GPU memory")
        for what, (ratio, runs) in worst.items():  # of the sizes so far
            yield Bar.of(f"gpu_{what}_over_driver", ratio, "ratio", runs)


def measure(bench: Bench, size: int) -> tuple[list[Cycle], float]:
    """Its cycles, and the seconds from starting a helper to its first answer. Raises `RuntimeError`, `GpuError`."""
    with holder(size) as process:
        pidfd = os.pidfd_open(process.pid)
        began = time.perf_counter()
        try:
            with start_helper(str(bench.folder / f"helper-{size}")) as helper, helper.connect() as client:
                _done(client.ask(Operation.STATE, pidfd))
                first_s = time.perf_counter() - began
                cycles = [cycle(client, process, pidfd, size) for _ in range(CYCLES)]
        finally:
            os.close(pidfd)
    return cycles, first_s


def cycle(client: HelperClient, process: subprocess.Popen[str], pidfd: int, size: int) -> Cycle:
    """One park and resume. Raises `RuntimeError` where the process did not come back as it was."""
    resident, available, used = resident_bytes(process.pid), available_bytes(), memory_bytes()[1]
    began = time.perf_counter()
    parked = _done(client.ask(Operation.PARK, pidfd, size_bytes=size))
    park_s = time.perf_counter() - began
    host = {
        "resident_bytes": resident_bytes(process.pid) - resident,
        "machine_bytes": available - available_bytes(),
        "given_back_bytes": used - memory_bytes()[1],
    }
    began = time.perf_counter()
    resumed = _done(client.ask(Operation.RESUME, pidfd, size_bytes=size))
    resume_s = time.perf_counter() - began
    if say(process) != "whole":
        raise RuntimeError(f"a process of {label(size)} came back with other bytes")
    return {
        "park_s": park_s,
        "park_driver_s": sum(steps_s(parked).values()),
        "resume_s": resume_s,
        "resume_driver_s": sum(steps_s(resumed).values()),
        **steps_s(parked),
        **steps_s(resumed),
        "host_bytes": max(host["resident_bytes"], host["machine_bytes"]),  # what the driver pins is in neither's other
        **host,
    }


def steps_s(answer: Answer) -> dict[str, float]:
    """Seconds of each call of the driver."""
    return {f"{step.name}_s": (step.ended_ns - step.started_ns) / 1e9 for step in answer.steps}


def _done(answer: Answer) -> Answer:
    if answer.error is not None:
        raise answer.error
    return answer


@contextmanager
def holder(size: int) -> Iterator[subprocess.Popen[str]]:
    """A process with `size` bytes of GPU memory, each block with a pattern of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.holder", str(size)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"a process with {label(size)} of GPU memory did not come up")
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def say(process: subprocess.Popen[str]) -> str:
    """Whether its memory is whole."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) * 1024
