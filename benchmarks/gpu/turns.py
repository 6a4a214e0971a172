"""Twenty functions take turns on one GPU, each parking the one before: `gpu_turns_*`. Nothing goes wrong here."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from benchmarks.gpu.bench import END_S, Bench, left_behind
from benchmarks.gpu.environments import TAKES_TURNS
from benchmarks.gpu.machine import memory_bytes
from benchmarks.results_file import Bar
from benchmarks.session import Answer, Session

COUNT, SIMULATED_COUNT = 20, 4
ROUNDS = 2
"""One in which all are loaded, one in which all are woken."""

ANNOTATIONS = {
    "gpufn.dev/initial": "0",
    "gpufn.dev/gpu": "1",
    "gpufn.dev/park": "1h",
    "gpufn.dev/idle": "2h",
    "gpufn.dev/snapshot": "off",
}


def run(bench: Bench) -> Iterable[Bar]:
    names = [f"turn-{number}" for number in range(SIMULATED_COUNT if bench.simulated else COUNT)]
    used, lost, seconds = memory_bytes()[1], [], defaultdict(list)
    with sharing(bench, names) as session:
        for number in range(ROUNDS):
            for name in names:
                if bench.left_s() < END_S:
                    break
                answer = session.call(name, timeout_s=60)
                if not is_whole(answer):
                    lost.append(f"round {number}, {name}: {answer.status} {answer.body[:200]!r}")
                seconds[number].append(round(answer.seconds, 4))
        rungs = Counter(record["rung"] for name in names for record in session.starts(name))
        bench.starts |= {"turns resume": session.starts(names[0], 1)[0]}
        leaked = left_behind(session, names, used)
    facts = {"functions": len(names), "calls": [len(calls) for calls in seconds.values()], "rungs": dict(rungs)}
    yield Bar.of("gpu_turns_lost", len(lost), "requests", [facts, *lost])
    yield Bar.of("gpu_turns_leaked", len(leaked), "things", leaked)
    if woken := seconds[ROUNDS - 1]:
        yield Bar.of("gpu_turns_wake_s", statistics.median(woken), "s", woken)


@contextmanager
def sharing(bench: Bench, names: Iterable[str]) -> Iterator[Session]:
    """A gateway with a function of each name, which hold a few MiB each and want the whole GPU."""
    with bench.session(TAKES_TURNS.parent) as session:
        for name in names:
            session.deploy(name, ANNOTATIONS, image=TAKES_TURNS.name)
        yield session


def is_whole(answer: Answer) -> bool:
    return answer.status == 200 and bool(answer.json().get("whole"))
