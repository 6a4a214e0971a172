"""One function on the GPU from zero, by each rung of the start ladder, every answer checked.

A GPU function's snapshots are taken once it is parked, so it parks a second after each answer here.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator

from benchmarks.gpu.bench import Bench
from benchmarks.results_file import Bar
from benchmarks.session import Session
from benchmarks.wakes import Subject, wake

ON_GPU = {"gpufn.dev/initial": "0", "gpufn.dev/gpu": "1", "gpufn.dev/idle": "1h"}
PLAIN = {**ON_GPU, "gpufn.dev/park": "0", "gpufn.dev/snapshot": "off", "gpufn.dev/weights": "off"}
WITH_WEIGHTS = {**ON_GPU, "gpufn.dev/park": "0", "gpufn.dev/snapshot": "off"}
PARKING = {**ON_GPU, "gpufn.dev/park": "1s"}

RUNS = 3
_PARK_S = 150.0
"""The first park comes after its snapshots were taken."""
_TOLD_S = 10.0
"""A start's record comes after its answer."""


def by_rung(
    bench: Bench, session: Session, subject: Subject, called: str, *, has_build: bool, facts: Iterable[object] = ()
) -> Iterator[Bar]:
    """``gpu_<called>_<rung>_s``: a bar after each wake, so that what is measured before the limit is kept.

    Raises `RuntimeError` for a wrong answer, and for one that came by another rung.
    """
    name, seconds = subject.name, defaultdict[str, list[float]](list)

    def measured(rung: str, took_s: float) -> Bar:
        seconds[rung].append(round(took_s, 4))
        bench.starts[f"{called} {rung}"] = session.starts(name, 1)[0]
        runs = [*facts, *seconds[rung]]
        return Bar.of(f"gpu_{called}_{rung}_s", statistics.median(seconds[rung]), "s", runs)

    session.deploy(name, PLAIN)
    yield measured("load", wake(session, name, subject, rung="load"))
    session.deploy(name, PARKING)
    answer = session.call(name, subject.body, headers=subject.headers)
    if not subject.is_right(answer):
        raise RuntimeError(f"{name} answered {answer.status} {answer.body[:300]!r}")
    for _ in range(RUNS):
        yield measured("resume", resume(session, subject))
    session.wait_for_snapshot(name)  # it is there, or its news say why not
    session.to_zero(name)
    wake(session, name, subject, rung="restore")  # checks the snapshot's files, which no later one does
    for _ in range(RUNS):
        yield measured("restore", wake(session, name, subject, rung="restore"))
    if has_build:
        session.deploy(name, WITH_WEIGHTS)
        yield measured("start", wake(session, name, subject, rung="start"))


def resume(session: Session, subject: Subject) -> float:
    """Seconds of one call while the function is parked. Raises `RuntimeError`."""
    name = subject.name
    session.wait(lambda: [r["state"] for r in session.replicas(name)] == ["parked"], f"{name} is parked", _PARK_S)
    before = session.starts(name, 1)[0]
    answer = session.call(name, subject.body, headers=subject.headers)
    if answer.status != 200 or not subject.is_right(answer):
        raise RuntimeError(f"{name} answered {answer.status} {answer.body[:300]!r} after it was parked")
    session.wait(lambda: session.starts(name, 1)[0] != before, f"{name} has told of its start", _TOLD_S)
    record = session.starts(name, 1)[0]
    if record["rung"] != "resume":
        raise RuntimeError(f"{name} came up by {record['rung']}, not by resume: {record}")
    return subject.seconds(answer)
