"""What can be parked with this driver on this GPU: `gpu_canary_*`, as facts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict

from adapter.gpu.capabilities import find_capabilities
from benchmarks.gpu.bench import CAPABILITIES, Bench
from benchmarks.results_file import Bar

_SAID = {True: 1, False: 0, None: -1}


def run(bench: Bench) -> Iterable[Bar]:
    began = time.monotonic()
    found = find_capabilities(bench.folder / "capabilities")  # anew
    if (bench.folder / "capabilities").exists():
        shutil.copytree(bench.folder / "capabilities", CAPABILITIES, dirs_exist_ok=True)
    yield Bar.of("gpu_canaries_s", time.monotonic() - began, "s", [found.identity])
    for feature, verdict in found.verdicts.items():
        said = {name: value for name, value in asdict(verdict).items() if value}
        yield Bar.of(f"gpu_canary_{feature.value}", _SAID[verdict.works], "(1 works, 0 not, -1 not tried)", [said])
