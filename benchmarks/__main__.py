"""``python -m benchmarks [NAME…] [--runs N]``: measure, print a table, keep everything in a file.

Each benchmark is a module with ``run(options) -> Iterable[Bar]``; see `BENCHMARKS`. A missed bar is printed
and kept like a met one, and ends with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass, field
from typing import Any

from benchmarks.plot import write_plots
from benchmarks.results_file import Bar, save

BENCHMARKS = {
    "listen": "benchmarks.listen",
    "wakes": "benchmarks.wakes",
    "warm": "benchmarks.warm",
    "held": "benchmarks.held",
    "cycles": "benchmarks.cycles",
    "parks": "benchmarks.parks",
    "weights": "benchmarks.weights",
    "images": "benchmarks.images",
    "cluster": "benchmarks.cluster",
    "admission": "benchmarks.admission",
    "controller": "benchmarks.controller",
    "stranded": "benchmarks.stranded",
}
"""Name on the command line -> module. Their order is that of a whole run."""


@dataclass
class Options:
    """How a run is done. A benchmark puts start records to show into `starts`."""

    runs: int = 10
    functions: tuple[str, ...] = ("embed", "generate", "echo")
    starts: dict[str, Any] = field(default_factory=dict)


def table(bars: list[Bar]) -> str:
    rows = [("BAR", "VALUE", "UNIT", "WANTED", "MET")]
    rows += [(b.name, f"{b.value:g}", b.unit, b.bar or "", {True: "yes", False: "NO", None: ""}[b.met]) for b in bars]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--runs", type=int, default=10, help="runs behind a median (default: 10)")
    parser.add_argument("--functions", default="embed,generate,echo", help="functions to wake (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="print only, keep no file")
    asked = parser.parse_args()
    unknown = set(asked.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    options = Options(asked.runs, tuple(asked.functions.split(",")))
    bars: list[Bar] = []
    for name in asked.names or BENCHMARKS:
        print(f"… {name}", file=sys.stderr, flush=True)
        measured = list(importlib.import_module(BENCHMARKS[name]).run(options))
        bars += measured
        if not asked.dry:  # after each: an interrupted run keeps what it has
            path = save(measured, options.starts)
            write_plots(path)
    print(table(bars))
    return 1 if any(bar.met is False for bar in bars) else 0


if __name__ == "__main__":
    sys.exit(main())
