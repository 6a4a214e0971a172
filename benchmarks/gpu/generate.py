"""`functions/generate` on CUDA by each rung: `gpu_generate_*`."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.rungs import by_rung
from benchmarks.results_file import Bar
from benchmarks.wakes import generate


def run(bench: Bench) -> Iterable[Bar]:
    with bench.session() as session:
        yield from by_rung(bench, session, generate(), "generate", has_build=True)
