"""``python -m benchmarks.gpu [PART…]``: run the parts on this machine's GPU, and keep what they find.

A part that fails, or is not done in its time, is kept as failed with its reason and stops no other; what it had
measured until then is kept too. All together stay below ten minutes. Without a GPU there is nothing to do, unless
``--simulated`` asks for the parts that the simulated driver of tests/stubs can do: that runs the code, and its
speeds mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError
from benchmarks.__main__ import table
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.machine import describe, has_gpu
from benchmarks.plot import write_plots
from benchmarks.results_file import FOLDER, Bar, save
from benchmarks.session import REPOSITORY, cache_folder


@dataclass(frozen=True, slots=True)
class Part:
    """`limit_s`: what is not done by then is not done."""

    limit_s: float
    simulated: bool = True
    """The simulated driver can do it: it needs no kernel and no torch on the device."""


PARTS = {
    "environments": Part(60),
    "canaries": Part(40),
    "park": Part(75),
    "stream": Part(45),
    "toy": Part(50),
    "llama": Part(170, simulated=False),
    "embed": Part(70, simulated=False),
    "turns": Part(60),
    "kills": Part(60),
    "peers": Part(180, simulated=False),
    "generate": Part(90, simulated=False),
}
"""Name, which is that of its module, in the order in which they run."""

_ALL_S = 585.0
"""What is left of ten minutes once the results are written."""

_LEAST_S = 5.0
_END_S = 10.0
"""For a part that is told to end to stop its gateway."""

_SPEEDS = {"ratio", "s", "ms", "GB/s"}
"""Units of what a simulated GPU says nothing about."""


@dataclass
class Outcome:
    """What came of a part; `failed` is the reason, or empty."""

    bars: list[Bar] = field(default_factory=list)
    starts: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    def all_bars(self, name: str) -> list[Bar]:
        """The last of each name, and whether the part failed."""
        last = {bar.name: bar for bar in self.bars}
        how = Bar.of(f"gpu_{name}_failed", bool(self.failed), "parts", [self.failed] if self.failed else [])
        return [*last.values(), how]


# The part's process -----------------------------------------------------------------------------


def run_part(name: str, *, simulated: bool, limit_s: float) -> int:
    """Run one part in this process; its bars go to standard output, one JSON line each."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    root = cache_folder().parent / "gpu-bench"  # never /tmp, which may be memory
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        bench = Bench(Path(folder), simulated=simulated, deadline_s=time.monotonic() + limit_s)
        try:
            for bar in importlib.import_module(f"benchmarks.gpu.{name}").run(bench):
                _tell(bar=bar.to_json())
        except (AdapterError, RuntimeError, OSError, ValueError, subprocess.SubprocessError) as exc:
            _tell(failed=_reason(exc))
            return 1
        finally:
            _tell(starts=bench.starts)
    return 0


def _tell(**word: object) -> None:
    print(json.dumps(word), flush=True)


def _reason(exc: BaseException) -> str:
    if isinstance(exc, AdapterError):
        return f"{exc.message} {exc.why}".strip()
    return f"{type(exc).__name__}: {exc}"


# The run ----------------------------------------------------------------------------------------


def outcome_of(name: str, environment: Mapping[str, str], limit_s: float, *flags: str) -> Outcome:
    """Run a part in a process group of its own, which ends at the limit whatever it does."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--limit", str(limit_s), *flags]
    with tempfile.TemporaryFile("w+") as said:  # no pipe, which a process that hangs in the driver could keep open
        process = subprocess.Popen(command, stdout=said, cwd=REPOSITORY, env=dict(environment), start_new_session=True)
        late = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = True
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        outcome = heard(said)
    if late:
        outcome.failed = f"It was not done in {limit_s:.0f} s."
    elif process.returncode and not outcome.failed:
        outcome.failed = f"It ended with code {process.returncode}, without a word."
    return outcome


def heard(lines: Iterable[str]) -> Outcome:
    """What a part's process said, as far as it came."""
    outcome = Outcome()
    for line in lines:
        with suppress(ValueError):  # cut off when it was killed
            word = json.loads(line)
            if "bar" in word:
                outcome.bars.append(Bar(**word["bar"]))
            outcome.starts |= word.get("starts", {})
            outcome.failed = word.get("failed", outcome.failed)
    return outcome


@contextmanager
def simulated_machine() -> Iterator[dict[str, str]]:
    """The environment of processes on a simulated machine with one GPU."""
    from tests.stubs.build import build
    from tests.stubs.simulated import Simulated

    with tempfile.TemporaryDirectory(prefix="gpufn-bench-") as name:
        libraries = Path(name) / "libraries"
        libraries.mkdir()
        machine = Simulated(Path(name) / "machine", build(libraries))
        yield {**os.environ, "LD_LIBRARY_PATH": machine.search_path}


def run_all(
    names: Sequence[str],
    environment: Mapping[str, str],
    *,
    simulated: bool,
    results: Path | None,
    patience: float = 1.0,
) -> list[Bar]:
    """Every part in turn; what each found is kept before the next one begins. `patience` times as long as usual they
    may take."""
    deadline = time.monotonic() + patience * _ALL_S
    flags = ["--simulated"] if simulated else []
    facts = {"gpu": {"simulated": True} if simulated else describe()}
    bars: list[Bar] = []
    for name in names:
        limit_s = min(patience * PARTS[name].limit_s, deadline - time.monotonic())
        print(f"… {name}", file=sys.stderr, flush=True)
        if limit_s < _LEAST_S:
            outcome = Outcome(failed="No time was left for it.")
        else:
            outcome = outcome_of(name, environment, limit_s, *flags)
        if outcome.failed:
            print(f"  failed: {outcome.failed}", file=sys.stderr, flush=True)
        measured = [_as_fact(bar) if simulated else bar for bar in outcome.all_bars(name)]
        bars += measured
        if results is not None:
            write_plots(save(measured, outcome.starts, folder=results, facts=facts))
    return bars


def _as_fact(bar: Bar) -> Bar:
    """A simulated GPU's speeds are measured against nothing."""
    return replace(bar, bar=None, met=None) if bar.unit in _SPEEDS else bar


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PART", help=f"some of: {', '.join(PARTS)}; default: all")
    parser.add_argument("--simulated", action="store_true", help="on the simulated GPU; keeps no results by default")
    parser.add_argument("--results", type=Path, help=f"folder for the results (default: {FOLDER.name})")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="of a simulated run on a busy machine: times as long (default: 1)"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=_ALL_S, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        return run_part(asked.part, simulated=asked.simulated, limit_s=asked.limit)
    unknown = set(asked.names) - set(PARTS)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    names = asked.names or [name for name, part in PARTS.items() if part.simulated or not asked.simulated]
    if asked.simulated:
        with simulated_machine() as environment:
            bars = run_all(names, environment, simulated=True, results=asked.results, patience=asked.patience)
    elif has_gpu():
        bars = run_all(names, os.environ, simulated=False, results=asked.results or FOLDER)
    else:
        print("gpu-bench: this machine has no NVIDIA GPU, so nothing was measured (ARGS=--simulated runs the code)")
        return 0
    print(table(bars))
    return 1 if any(bar.met is False for bar in bars) else 0


if __name__ == "__main__":
    sys.exit(main())
