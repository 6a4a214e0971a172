"""Replays real requests through `adapter.policy.keep_alive`, beside fixed times and hindsight.

    GPUFN_TRACES=FOLDER python -m benchmarks.keep_alive

The folder has GenTD26's `lora_request_trace.csv` (alibaba/clusterdata, `cluster-trace-v2026-GenAI`) or the part of it
before some day, and for measured wakes its `basemodel_update_latency_anon.tar.gz`. Each model is a function with one
replica; what comes while it answers waits and is not cold. A wake takes no time here: the trace's own answers are as
late as they were. The policy sees only what was before, and starts with nothing.
"""

from __future__ import annotations

import csv
import io
import math
import os
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from statistics import median

from adapter.policy.keep_alive import LEAST_S, History, Wake, keep_alive
from adapter.records import Rung
from adapter.spec import FunctionSpec, parse_spec

Span = tuple[float, float]
"""A gap: when a function became idle, and when somebody called it again, in seconds."""

FIXED_S = (LEAST_S, 60.0, 300.0, 600.0)
PRICES = (0.0, 10.0)
WAKES_S = (2.0, 23.0, 120.0)
"""A restore, the trace's median load of a base model, a large model."""


@dataclass(slots=True)
class Outcome:
    """Totals of one policy. Seconds are of a held GPU."""

    cold: int = 0
    idle_s: float = 0.0
    wake_s: float = 0.0
    changes: int = 0

    def add(self, gap_s: float, kept_s: float, wake_s: float) -> None:
        self.idle_s += min(gap_s, kept_s)
        if gap_s > kept_s:
            self.cold += 1
            self.wake_s += wake_s


def read_gaps(folder: Path) -> tuple[list[list[Span]], int]:
    """Each function's gaps in order, and how many requests there are."""
    (path,) = sorted(folder.glob("*lora_request*.csv"))[:1]
    requests = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            at = datetime.fromisoformat(row["gmt_create"]).replace(tzinfo=timezone.utc).timestamp()
            requests[row["checkpoint_model_version_id"]].append((at, float(row["exec_time_seconds"] or 0)))
    return [list(_gaps(sorted(of))) for of in requests.values()], sum(map(len, requests.values()))


def _gaps(requests: Sequence[tuple[float, float]]) -> Iterator[Span]:
    busy_until = requests[0][0]
    for at, took_s in requests:
        if at > busy_until:
            yield busy_until, at
        busy_until = max(busy_until, at + took_s)


def read_wakes(folder: Path) -> list[float]:
    """Seconds that loads of a base model took, in order; empty where the file is not there."""
    path = folder / "gentd26_basemodel_update_latency_anon.tar.gz"
    path = path if path.exists() else folder / "basemodel_update_latency_anon.tar.gz"
    if not path.exists():
        return []
    with tarfile.open(path) as archive:
        member = next(member for member in archive.getmembers() if member.name.endswith(".csv"))
        file = archive.extractfile(member)
        assert file is not None
        rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")))
    return [float(row["value"]) / 1000 for row in sorted(rows, key=lambda row: float(row["timestamp_anon"]))]


def fixed(functions: Sequence[Sequence[Span]], kept_s: float, wakes: Sequence[float]) -> Outcome:
    outcome, wake = Outcome(), cycle(wakes)
    for gaps in functions:
        outcome.add(math.inf, 0.0, next(wake))  # the first request
        for begin, end in gaps:
            outcome.add(end - begin, kept_s, next(wake))
    return outcome


def hindsight(functions: Sequence[Sequence[Span]], price: float, wakes: Sequence[float]) -> Outcome:
    """Whoever knows each gap beforehand."""
    outcome, wake = Outcome(), cycle(wakes)
    for gaps in functions:
        outcome.add(math.inf, 0.0, next(wake))  # the first request
        for begin, end in gaps:
            wake_s = next(wake)
            outcome.add(end - begin, end - begin if end - begin <= wake_s * (1 + price) else 0.0, wake_s)
    return outcome


def learned(functions: Sequence[Sequence[Span]], spec: FunctionSpec, wakes: Sequence[float]) -> Outcome:
    outcome, wake = Outcome(), cycle(wakes)
    for gaps in functions:
        history, kept_s = History(), None
        wake_s = next(wake)
        outcome.add(math.inf, 0.0, wake_s)
        history.woke(Wake(Rung.RESTORE, wake_s))
        for begin, end in gaps:
            chosen_s = keep_alive(spec, history.habits(begin), current_s=kept_s).seconds
            outcome.changes += kept_s is not None and chosen_s != kept_s
            kept_s, wake_s = chosen_s, next(wake)
            outcome.add(end - begin, kept_s, wake_s)
            if end - begin > kept_s:
                history.woke(Wake(Rung.RESTORE, wake_s))
            history.idle(begin)
            history.busy(end)
    return outcome


def table(folder: Path) -> Iterator[str]:
    """The lines of the report."""
    functions, requests = read_gaps(folder)
    yield f"{requests} requests of {len(functions)} functions; cost = idle + wakes × (1 + cold_price), in GPU-hours"
    measured = read_wakes(folder)
    cases = [(f"{wake_s:g} s", [wake_s]) for wake_s in WAKES_S]
    if measured:
        cases.append((f"as measured, median {median(measured):.1f} s", measured))
    for name, wakes in cases:
        for price in PRICES:
            yield f"\nwake {name}, cold_price {price:g}"
            yield f"  {'kept':<12}{'cold %':>8}{'idle':>9}{'cost':>9}{'changes':>9}"
            spec = parse_spec({"gpu": {"count": 1}, "scale": {"cold_price": price}}, {})
            rows = [(f"{kept_s:g} s", fixed(functions, kept_s, wakes)) for kept_s in FIXED_S]
            rows.append(("learned", learned(functions, spec, wakes)))
            rows.append(("hindsight", hindsight(functions, price, wakes)))
            for kept, outcome in rows:
                cost = (outcome.idle_s + outcome.wake_s * (1 + price)) / 3600
                cold = 100 * outcome.cold / requests
                yield f"  {kept:<12}{cold:>8.1f}{outcome.idle_s / 3600:>9.1f}{cost:>9.1f}{outcome.changes:>9}"


def main() -> int:
    folder = os.environ.get("GPUFN_TRACES")
    if not folder:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    for line in table(Path(folder)):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
