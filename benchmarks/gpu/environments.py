"""The Python environments that later parts run in, from what is cached here where that is enough."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter.errors import AdapterError
from adapter.hosts.environment import Environments
from benchmarks.gpu.bench import Bench
from benchmarks.results_file import Bar
from benchmarks.session import FUNCTIONS, REPOSITORY, cache_folder

TAKES_TURNS = REPOSITORY / "tests" / "functions" / "gpu-memory"


def run(bench: Bench) -> Iterable[Bar]:
    began, how = time.monotonic(), {}
    for folder in (TAKES_TURNS, *([] if bench.simulated else [FUNCTIONS / "embed"])):
        how[folder.name] = make(folder)
    yield Bar.of("gpu_environments_s", time.monotonic() - began, "s", [how])


def make(folder: Path) -> str:
    """Whether the cache was enough for the function's environment. Raises `AdapterError`."""
    environments = Environments(cache_folder())
    try:
        with _offline():
            environments.python_for(folder)
    except AdapterError:
        environments.python_for(folder)
        return "downloaded"
    return "offline"


@contextmanager
def _offline() -> Iterator[None]:
    os.environ["UV_OFFLINE"] = "1"
    try:
        yield
    finally:
        del os.environ["UV_OFFLINE"]
