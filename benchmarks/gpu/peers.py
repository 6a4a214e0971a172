"""Weights onto the GPU against other loaders: `gpu_weights_*`, as `benchmarks.weights` does it on the CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.bench import Bench
from benchmarks.results_file import Bar
from benchmarks.session import cache_folder
from benchmarks.weights import Rounds, make_files, peers_environment

COPIES = 2
"""Of the layers: 3.5 GB of weights, four times on the disk. What larger ones get of PCIe says `stream`."""


def run(bench: Bench) -> Iterable[Bar]:
    """As many rounds as there is time for; what is measured after each is kept."""
    root = cache_folder().parent / "weights-bench"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    python, missing = peers_environment(root / "peers")
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        folder = Path(name)
        make_files(python, folder, copies=COPIES)
        rounds = Rounds(python, folder, missing, device="cuda:0")
        took_s = 0.0
        while took_s < bench.left_s():
            began = time.monotonic()
            rounds.one()
            took_s = time.monotonic() - began
            yield from rounds.bars()
