"""Bars and the file that keeps them: benchmarks/results/<machine>_<date>.json.

``{"machine": {…}, "date", "commit", "bars": [{"name", "value", "unit", "bar", "met", "runs"}], "starts": {…}}``.
A bar that is measured again on the same day replaces its value and moves the former one to ``earlier``, so
that nobody can measure until it fits without leaving a trace.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"

WANTED: dict[str, tuple[str, float]] = {
    "embed_plain_over_restored": (">=", 15),
    "embed_restored_over_criu": ("<=", 1.5),
    "generate_plain_over_restored": (">=", 30),
    "listen_ms": ("<=", 100),
    "echo_warm_rps_over_gunicorn": (">=", 0.95),
    "echo_warm_p99_over_gunicorn": ("<=", 1.1),
    "embed_warm_rps_over_gunicorn": (">=", 0.95),
    "embed_warm_p99_over_gunicorn": ("<=", 1.1),
    "held_500_lost": ("<=", 0),
    "held_500_starts": ("<=", 1),
    "cycles_100_wrong": ("<=", 0),
    "cycles_100_leaked": ("<=", 0),
    "park_1000_lost": ("<=", 0),
    "park_1000_leaked": ("<=", 0),
    "park_1000_untold": ("<=", 0),
    "echo_from_zero_ms": ("<=", 400),
    "weights_warm_over_best_peer": (">=", 1.0),
    "weights_cold_over_best_peer": (">=", 1.0),
    "weights_cold_over_disk": (">=", 0.9),
    "second_replica_extra_pss": ("<=", 0.05),
    "stream_host_mb": ("<=", 256),
    "rebuild_code_s": ("<=", 10),
    "rebuild_code_layers_besides_app": ("<=", 0),
    "image_added_mb": ("<=", 45),
    "image_criu_mb": ("<=", 30),
    "reproducible_layers_differing": ("<=", 0),
    "container_plain_over_restored": (">=", 10),
    "registry_restore_over_local": ("<=", 3),
    "registry_restore_over_plain": ("<=", 0.5),
    "knative_plain_over_restored": (">=", 3),
    "cluster_held_200_lost": ("<=", 0),
    "cluster_held_200_pods": ("<=", 1),
    "component_down_lost": ("<=", 0),
    "admission_p99_ms": ("<=", 15),
    "admission_tls_p99_ms": ("<=", 30),
    "controller_lag_s": ("<=", 2),
    "controller_rss_mb": ("<=", 500),
    "stranded_gpus_over_default": ("<=", 1),
    "stranded_gpus_over_binpack": ("<=", 1),
    "gpu_resume_over_driver": ("<=", 1.3),
    "gpu_weights_over_pcie": (">=", 0.9),
    "gpu_weights_warm_over_best_peer": (">=", 1.0),
    "gpu_weights_cold_over_best_peer": (">=", 1.0),
    "gpu_8b_restore_s": ("<=", 3),
    "gpu_turns_lost": ("<=", 0),
    "gpu_turns_leaked": ("<=", 0),
    "gpu_kills_lost": ("<=", 0),
    "gpu_kills_leaked": ("<=", 0),
}
"""What each bar should be. Values with other names are facts beside the bars, without one."""

_FAILED = re.compile(r"gpu_\w+_failed")
"""Parts of `benchmarks.gpu` that did not come to their end: none should."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One measured value. `runs` are the raw values behind it, in the order in which they were taken."""

    name: str
    value: float
    unit: str
    runs: Sequence[Any] = ()
    bar: str | None = None
    met: bool | None = None
    earlier: tuple[Mapping[str, Any], ...] = field(default=())

    @classmethod
    def of(cls, name: str, value: float, unit: str, runs: Iterable[Any] = ()) -> Bar:
        """A bar with what is wanted of it, if anything is."""
        value = round(value, 4)
        wanted = WANTED.get(name) or (("<=", 0.0) if _FAILED.fullmatch(name) else None)
        if wanted is None:
            return cls(name, value, unit, tuple(runs))
        sign, bound = wanted
        met = value >= bound if sign == ">=" else value <= bound
        return cls(name, value, unit, tuple(runs), f"{sign} {bound:g}", met)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        if not self.earlier:
            del data["earlier"]
        return data


def ratio_of_medians(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(over) / statistics.median(under)


def machine() -> dict[str, Any]:
    """What the numbers depend on. No names of hosts or people."""
    facts = {
        "cpu": _first("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_first("/proc/meminfo", r"MemTotal:\s*(\d+)") or 0) / 2**20),
        "kernel": platform.release().split("-")[0],
        "system": _first("/etc/os-release", r'PRETTY_NAME="(.+)"') or platform.system(),
        "python": platform.python_version(),
    }
    return {**facts, "criu": _criu_version()}


def _first(path: str, pattern: str) -> str:
    try:
        match = re.search(pattern, Path(path).read_text(encoding="utf-8"))
    except OSError:
        return ""
    return match[1].strip() if match else ""


def _criu_version() -> str:
    from adapter.errors import SnapshotError
    from adapter.snapshot.process import find_criu

    try:
        return find_criu().version
    except SnapshotError:
        return "none"


def path_of(facts: Mapping[str, Any], date: str, folder: Path = FOLDER) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", str(facts["cpu"]).lower()).strip("-")
    return folder / f"{name}-{facts['cores']}-cores_{date}.json"


def save(
    bars: Iterable[Bar],
    starts: Mapping[str, Any],
    *,
    folder: Path = FOLDER,
    facts: Mapping[str, Any] | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> Path:
    """Add `bars` and `starts` to the file of this machine and day; returns its path.

    `facts`: what else is known of the machine; it stays in the file.
    """
    here, at = machine(), now()
    path = path_of(here, f"{at:%Y-%m-%d}", folder)
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": {}, "bars": [], "starts": {}}
    data = {
        "machine": {**old["machine"], **here, **(facts or {})},
        "date": f"{at:%Y-%m-%dT%H:%M:%SZ}",
        "commit": _commit(),
        "bars": merged(old["bars"], [bar.to_json() for bar in bars]),
        "starts": {**old["starts"], **starts},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(_compact(data), encoding="utf-8")
    return path


def merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The old bars with the new ones in their places, former values kept."""
    result = {bar["name"]: bar for bar in old}
    for bar in new:
        former = result.get(bar["name"])
        if former is not None:
            seen = [*former.get("earlier", ()), {"value": former["value"], "met": former["met"]}]
            result[bar["name"]] = {**bar, "earlier": seen}
        else:
            result[bar["name"]] = bar
    return list(result.values())


def _compact(data: Mapping[str, Any]) -> str:
    """JSON for people and for diffs: one line a bar and a start."""

    def lines(items: Iterable[str]) -> str:
        return ",\n    ".join(items)

    bars = lines(json.dumps(bar) for bar in data["bars"])
    starts = lines(f"{json.dumps(name)}: {json.dumps(record)}" for name, record in data["starts"].items())
    head = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(data[key])}" for key in ("machine", "date", "commit"))
    return f'{{\n  {head},\n  "bars": [\n    {bars}\n  ],\n  "starts": {{\n    {starts}\n  }}\n}}\n'


def _commit() -> str:
    """The revision measured, with a mark where the work tree differs from it in more than results."""
    revision = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/", ":!results")
    return f"{revision}-dirty" if revision and changed else revision or "unknown"


def _git(*arguments: str) -> str:
    """What git says; empty where it is not here or this is no clone."""
    try:
        said = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return said.stdout.strip()
