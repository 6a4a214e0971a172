"""A warm replica against the same handler under plain gunicorn and Flask, in turns: `*_warm_…_over_gunicorn`.

The load goes straight to both: no gateway is between, since the other side has none either.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapter.hosts.environment import Environments
from adapter.spec import parse_spec, read_config, read_handler_shape
from benchmarks.load import Load, request_bytes, run_load
from benchmarks.results_file import Bar
from benchmarks.session import FUNCTIONS, cache_folder, clean_environment, gpufn

if TYPE_CHECKING:
    from benchmarks.__main__ import Options

BASELINE = Path(__file__).parent / "baseline"
SECONDS = {"echo": 4.0, "embed": 8.0}
BODIES = {"echo": b"x" * 100, "embed": json.dumps({"texts": ["The model wakes when somebody calls."]}).encode()}
_PAIRS = 5
_START_LIMIT_S = 300.0


def run(options: Options) -> Iterable[Bar]:
    for name in ("echo", "embed"):
        if name in options.functions:
            yield from compare(name)


def compare(name: str) -> Iterable[Bar]:
    threads = parse_spec(read_config(FUNCTIONS / name), {}).in_flight
    python = Environments(cache_folder()).python_for(FUNCTIONS / name)
    request, seconds = request_bytes("/", BODIES[name]), SECONDS[name]
    rps, p99, runs = [], [], []
    with gpufn_run(name) as ours, gunicorn(name, python, threads) as theirs:
        for port in (ours, theirs):
            run_load(port, request, connections=threads, seconds=seconds / 2)
        for number in range(_PAIRS):
            order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
            loads = {port: run_load(port, request, connections=threads, seconds=seconds) for port in order}
            check(name, loads.values())
            rps.append(loads[ours].rps / loads[theirs].rps)
            p99.append(loads[ours].quantile_s(0.99) / loads[theirs].quantile_s(0.99))
            runs.append({side: facts(loads[port]) for side, port in (("gpufn", ours), ("gunicorn", theirs))})
            print(f"  {name} {runs[-1]}", file=sys.stderr, flush=True)
    yield Bar.of(f"{name}_warm_rps_over_gunicorn", statistics.median(rps), "ratio", runs)
    yield Bar.of(f"{name}_warm_p99_over_gunicorn", statistics.median(p99), "ratio", [round(value, 3) for value in p99])


def check(name: str, loads: Iterable[Load]) -> None:
    for load in loads:
        if load.wrong or not load.latencies_s:
            raise RuntimeError(f"{name}: {len(load.wrong)} wrong answers, such as {load.wrong[:1]}")


def facts(load: Load) -> dict[str, float]:
    """Requests a second, and latencies in milliseconds."""
    return {
        "rps": round(load.rps, 1),
        "p50_ms": round(load.quantile_s(0.5) * 1000, 2),
        "p99_ms": round(load.quantile_s(0.99) * 1000, 2),
    }


@contextmanager
def gpufn_run(name: str) -> Iterator[int]:
    """`gpufn run` of a function; yields its port."""
    folder = Path(tempfile.mkdtemp(prefix="gpufn-bench-"))
    port = free_port()
    command = [*gpufn(), "run", str(FUNCTIONS / name), "--port", str(port), "--envs", str(cache_folder())]
    environment = {**clean_environment(), "GPUFN_HOME": str(folder)}
    try:
        with serving(command, port, environment, name):
            if read_handler_shape(FUNCTIONS / name).has_load:
                wait_for_snapshot(folder)  # taken once in a function's life, and no part of being warm
            yield port
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_snapshot(folder: Path) -> None:
    """Raises `RuntimeError`."""
    deadline = time.monotonic() + _START_LIMIT_S
    while not list(folder.glob("**/snapshots/*/*/process-*")):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no snapshot below {folder}")
        time.sleep(0.5)


@contextmanager
def gunicorn(name: str, python: Path, threads: int) -> Iterator[int]:
    """The same handler under gunicorn's threaded worker, as one would write it by hand; yields its port."""
    port = free_port()
    command = [
        str(python), "-m", "gunicorn", "--chdir", str(BASELINE), "--bind", f"127.0.0.1:{port}", "--worker-class", "gthread",
        "--workers", "1", "--threads", str(threads), "--keep-alive", "75", "--log-level", "error", "app:app",
    ]  # fmt: skip
    environment = {**clean_environment(), "FUNCTION_FOLDER": str(FUNCTIONS / name)}
    with serving(command, port, environment, name):
        yield port


@contextmanager
def serving(command: list[str], port: int, environment: dict[str, str], name: str) -> Iterator[None]:
    """A server that answers once we are inside, and is gone afterwards."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + _START_LIMIT_S
        while not answers(port, name):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"does not serve {name}: {' '.join(command)}")
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def answers(port: int, name: str) -> bool:
    try:
        return bool(run_load(port, request_bytes("/", BODIES[name]), connections=1, seconds=0.001).latencies_s)
    except (OSError, EOFError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
