"""The smallest GPU function by each rung, a few MiB and no torch: `gpu_toy_*`. What a rung takes at the least."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.environments import TAKES_TURNS
from benchmarks.gpu.rungs import by_rung
from benchmarks.gpu.turns import is_whole
from benchmarks.results_file import Bar
from benchmarks.wakes import Subject


def run(bench: Bench) -> Iterable[Bar]:
    with bench.session(TAKES_TURNS.parent) as session:
        yield from by_rung(bench, session, Subject(TAKES_TURNS.name, b"", is_whole), "toy", has_build=False)
