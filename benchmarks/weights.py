"""Weights into memory against other loaders, the disk, and what replicas and streams cost: `weights_*` and others.

Two gigabytes of random weights (`loaders.py`) are written once in each loader's format and loaded in turns: cold by
a new process, when none of the file's pages is in the page cache, and then warm by another, some times, with the
pages as that left them.
Loaders live in an environment of their own, which is kept beside those of functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.loaders import FILES, drop, read_through
from benchmarks.results_file import Bar
from benchmarks.session import REPOSITORY, cache_folder, clean_environment

if TYPE_CHECKING:
    from benchmarks.__main__ import Options

BASE = ("torch==2.15.0", "numpy", "safetensors")
"""What every loader runs with, ours too. torch is the version of the lock file."""

PEERS = {
    "safetensors": (),
    "safetensors_pread": (),
    "torch_mmap": (),
    "tensorizer": ("tensorizer",),
    "fastsafetensors": ("fastsafetensors",),
    "runai": ("runai-model-streamer",),
}
"""Loader -> packages beside `BASE`."""

_MOST_RUNS = 5
"""Each run reads 2 GB some twenty times."""

_GB = 10**9


def run(options: Options) -> Iterable[Bar]:
    root = cache_folder().parent / "weights-bench"  # never /tmp, which may be memory
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    python, missing = peers_environment(root / "peers")
    with tempfile.TemporaryDirectory(dir=root) as name:
        folder = Path(name)
        make_files(python, folder)
        rounds = Rounds(python, folder, missing)
        for _ in range(min(options.runs, _MOST_RUNS)):
            rounds.one()
        yield from rounds.bars()
        yield second_replica(python, folder, min(options.runs, 3))
        yield from stream_host(folder)


def make_files(python: Path, folder: Path, copies: int = 1) -> None:
    """The model in every loader's format; `copies`: how many times it has its layers."""
    _loaders(python, "make", str(folder), str(copies))


class Rounds:
    """Runs in turns: each loader warm and cold, onto `device`, and the disk itself."""

    def __init__(self, python: Path, folder: Path, missing: Mapping[str, str], device: str = "cpu") -> None:
        self._python = python
        self._folder = folder
        self._device = device
        self._prefix = "weights" if device == "cpu" else "gpu_weights"
        self._missing = dict(missing)
        self._order = ["gpufn", *(name for name in PEERS if name not in missing)]
        self._seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._disk: dict[str, list[float]] = defaultdict(list)
        self._bytes = 0
        self._sum: int | None = None

    def one(self) -> None:
        """One turn of everyone; whoever was first is last next time."""
        for name in list(self._order):
            if not self._load(name, "cold"):
                continue
            read_through(self._folder / FILES[name])  # for those that go past the page cache; what is there stays
            self._load(name, "warm")
        for how, flags in (("buffered", ()), ("direct", ("iflag=direct",))):
            read_through(self._data)
            drop(self._data)
            self._disk[how].append(dd(self._data, flags))
        self._order.append(self._order.pop(0))

    @property
    def _data(self) -> Path:
        return self._folder / FILES["gpufn"]

    def _load(self, name: str, heat: str) -> bool:
        """Whether it ran. A peer that does not is left out from then on."""
        try:
            arguments = ("load", str(self._folder), name, self._device, heat)
            said = json.loads(_loaders(self._python, *arguments).splitlines()[-1])
        except (RuntimeError, ValueError) as exc:
            if name == "gpufn":
                raise
            self._missing[name] = f"it does not run: {exc}"
            self._order.remove(name)
            return False
        if self._sum not in (None, said["sum"]):
            raise RuntimeError(f"{name} loaded other bytes than the others")
        self._sum, self._bytes = said["sum"], said["bytes"]
        seconds = min(said["seconds"])
        self._seconds[name, heat].append(seconds)
        print(f"  {heat} {name} {self._bytes / seconds / _GB:.2f} GB/s", file=sys.stderr, flush=True)
        return True

    def bars(self) -> Iterator[Bar]:
        """Of each one's best turn, since what a machine and its disk do besides only adds: on virtual ones it
        triples. Those of medians are kept beside them.
        """
        for heat in ("warm", "cold"):
            turns = {name: seconds for (name, at), seconds in self._seconds.items() if at == heat}
            for called, of in (("", min), ("_median", statistics.median)):
                values = {name: of(seconds) for name, seconds in turns.items()}
                ours = values.pop("gpufn")
                best = min(values, key=values.__getitem__)
                runs = [{"best": best, **self._missing}, *({"gpufn": g, best: b} for g, b in self._pairs(best, heat))]
                yield Bar.of(f"{self._prefix}_{heat}{called}_over_best_peer", values[best] / ours, "ratio", runs)
            for name, seconds in turns.items():
                rates = [round(self._bytes / s / _GB, 3) for s in seconds]
                yield Bar.of(f"{self._prefix}_{heat}_{name}", max(rates), "GB/s", rates)
        for called, rate_of in (("", max), ("_median", statistics.median)):
            disk = {how: rate_of(rates) for how, rates in self._disk.items()}
            cold = rate_of([self._bytes / s for s in self._seconds["gpufn", "cold"]])
            yield Bar.of(f"{self._prefix}_cold{called}_over_disk", cold / max(disk.values()), "ratio", [disk])
        for how, rates in self._disk.items():
            yield Bar.of(f"disk_{how}", max(rates) / _GB, "GB/s", [round(rate / _GB, 3) for rate in rates])

    def _pairs(self, best: str, heat: str) -> Iterator[tuple[float, float]]:
        ours, theirs = self._seconds["gpufn", heat], self._seconds[best, heat]
        return ((round(a, 4), round(b, 4)) for a, b in zip(ours, theirs, strict=True))


# The disk --------------------------------------------------------------------------------------


def dd(path: Path, flags: Iterable[str]) -> float:
    """Bytes a second that dd reads from the disk."""
    began = time.perf_counter()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=8M", "status=none", *flags], check=True)
    return path.stat().st_size / (time.perf_counter() - began)


# Replicas and streams ---------------------------------------------------------------------------------------------


def second_replica(python: Path, folder: Path, runs: int) -> Bar:
    """What filling and touching the weights adds to the sum of two replicas' memory, ÷ the weights."""
    size, ratios = (folder / FILES["gpufn"]).stat().st_size, []
    for _ in range(runs):
        with replica(python, folder) as first:
            first.fill()
            with replica(python, folder) as second:
                before = first.pss_bytes() + second.pss_bytes()
                second.fill()
                ratios.append((first.pss_bytes() + second.pss_bytes() - before) / size)
    return Bar.of("second_replica_extra_pss", statistics.median(ratios), "of the weights", ratios)


@dataclass(frozen=True, slots=True)
class Replica:
    """A process that has a model, whose weights it fills when told."""

    process: subprocess.Popen[str]

    def fill(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.expect("filled")

    def expect(self, word: str) -> None:
        assert self.process.stdout
        if self.process.stdout.readline().strip() != word:
            raise RuntimeError(f"a replica did not say {word}")

    def pss_bytes(self) -> int:
        """Proportional set size: each page divided by those that share it."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text(encoding="ascii")
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        assert found
        return int(found[1]) * 1024


@contextmanager
def replica(python: Path, folder: Path) -> Iterator[Replica]:
    command = [str(python), "-m", "benchmarks.loaders", "hold", str(folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    try:
        found = Replica(process)
        found.expect("ready")
        yield found
    finally:
        process.kill()
        process.communicate()


def stream_host(folder: Path) -> Iterator[Bar]:
    """Streams to a simulated GPU where there is none: its memory bounds are ours, its speed is not a GPU's."""
    variables: Mapping[str, str] = {}
    where = "a GPU"
    if not Path("/dev/nvidiactl").exists():
        from tests.stubs.build import build
        from tests.stubs.simulated import Simulated

        libraries = folder / "stub-driver"
        libraries.mkdir()
        variables = Simulated(folder / "machine", build(libraries)).environment
        where = "a simulated GPU"
    said = json.loads(_loaders(Path(sys.executable), "stream", str(folder), **variables).splitlines()[-1])
    yield Bar.of("stream_host_mb", said["host_bytes"] / 2**20, "MiB", [{**said, "to": where}])


# The loaders' environment -----------------------------------------------------------------------------------------


def peers_environment(root: Path) -> tuple[Path, dict[str, str]]:
    """Its interpreter, and why a loader is not in it. Made once, and again when what belongs in it changes."""
    wanted = json.dumps([sys.version, BASE, PEERS]).encode()
    home = root / hashlib.blake2b(wanted, digest_size=8).hexdigest()
    python, kept = home / "bin" / "python", home / "missing.json"
    if not kept.exists():
        _uv("venv", "--quiet", "--clear", "--python", sys.executable, str(home))
        _install(python, *BASE)
        missing = {}
        for name, packages in PEERS.items():
            try:
                if packages:
                    _install(python, *BASE, *packages)
            except RuntimeError as exc:
                missing[name] = f"it cannot be installed: {exc}"
        kept.write_text(json.dumps(missing), encoding="utf-8")
    found: dict[str, str] = json.loads(kept.read_text(encoding="utf-8"))
    return python, found


def _install(python: Path, *packages: str) -> None:
    """From uv's cache where it has them. Raises `RuntimeError`."""
    command = ["pip", "install", "--quiet", "--python", str(python), *packages]
    try:
        _uv(*command, "--offline")
    except RuntimeError:
        _uv(*command)


def _uv(*arguments: str) -> None:
    _checked([sys.executable, "-m", "uv", *arguments], dict(os.environ))


def _loaders(python: Path, *arguments: str, **variables: str) -> str:
    return _checked([str(python), "-m", "benchmarks.loaders", *arguments], {**clean_environment(), **variables})


def _checked(command: list[str], environment: dict[str, Any]) -> str:
    """What the command prints. Raises `RuntimeError` with its last word."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout
