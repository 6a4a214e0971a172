"""kill -9 of everything that takes part in a wake, at every moment of it: `gpu_kills_*`.

Two functions take turns. While one is woken, and the other parked for it, one of these is killed: the GPU helper,
the process that parks, the process that wakes. Faults inside the driver need a simulated one: `benchmarks.parks`.
"""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.bench import END_S, Bench, left_behind
from benchmarks.gpu.machine import memory_bytes
from benchmarks.gpu.turns import is_whole, sharing
from benchmarks.results_file import Bar
from benchmarks.session import Answer, Session

NAMES = ("one", "two")
VICTIMS = ("helper", "parking", "waking")
MOMENTS, SIMULATED_MOMENTS = 5, 2
"""Spread over the time of a wake, from its beginning on; as many as there is time for."""

_LIMIT_S = 90.0
_MET_S = 2.0
"""How long a victim is waited for."""


def run(bench: Bench) -> Iterable[Bar]:
    moments = SIMULATED_MOMENTS if bench.simulated else MOMENTS
    used = memory_bytes()[1]
    with sharing(bench, NAMES) as session:
        kills = Kills(session)
        wake_s = kills.usual_wake_s()
        for number in range(moments):
            for victim in VICTIMS:
                if bench.left_s() > END_S:
                    kills.one(victim, wake_s * number / moments)
        leaked = left_behind(session, NAMES, used)
    missed = set(VICTIMS) - set(kills.killed)
    if missed:  # then nothing that is counted below could be anything but good
        raise RuntimeError(f"never met, so never killed: {', '.join(sorted(missed))}")
    facts = {"wake_s": round(wake_s, 4), "killed": dict(kills.killed), "told": kills.told}
    yield Bar.of("gpu_kills_lost", len(kills.lost), "requests", [facts, *kills.lost])
    yield Bar.of("gpu_kills_longest_s", max(kills.seconds.values(), default=0), "s", [kills.seconds])
    yield Bar.of("gpu_kills_leaked", len(leaked), "things", leaked)


class Kills:
    """Calls during which something is killed, and what became of them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._turn = 0
        self.killed: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.lost: list[str] = []
        self.told: list[str] = []
        """Calls that were refused because the process that was to answer them had been killed: that may be."""

    def usual_wake_s(self) -> float:
        """Both are up after it, one of them parked. Raises `RuntimeError`."""
        took = []
        for _ in range(3):
            for _ in NAMES:
                answer = self._session.call(self._next(), timeout_s=_LIMIT_S)
                if not is_whole(answer):
                    raise RuntimeError(f"with nothing killed: {answer.status} {answer.body[:200]!r}")
                took.append(answer.seconds)
        return statistics.median(took[len(NAMES) :])

    def _next(self) -> str:
        """The one that is parked."""
        self._turn += 1
        return NAMES[self._turn % len(NAMES)]

    def one(self, victim: str, after_s: float) -> None:
        """Kill it so long after the call began. The call after this one has to be right in any case."""
        name, what = self._next(), f"{victim} after {after_s * 1000:.0f} ms"
        self._park(name)
        pids = self._met(victim)
        answers: list[Answer] = []
        call = threading.Thread(target=lambda: answers.append(self._session.call(name, timeout_s=_LIMIT_S)))
        call.start()
        time.sleep(after_s)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.killed[victim] += 1
        call.join()
        for answer in answers:
            self.seconds[what] = round(answer.seconds, 4)
        if not answers:
            self.lost.append(f"{what}: no answer")
        elif not is_whole(answers[0]):
            was_told = victim == "waking" and answers[0].status >= 500
            (self.told if was_told else self.lost).append(f"{what}: {answers[0].status} {answers[0].body[:200]!r}")
        again = self._session.call(name, timeout_s=_LIMIT_S)
        if not is_whole(again):
            self.lost.append(f"{what}, the call after it: {again.status} {again.body[:200]!r}")

    def _park(self, name: str) -> None:
        """By a call of the other one. What was killed before has to start again for that."""
        for each in (name, *(other for other in NAMES if other != name)):
            answer = self._session.call(each, timeout_s=_LIMIT_S)
            if not is_whole(answer):
                self.lost.append(f"{each}, before anything was killed: {answer.status} {answer.body[:200]!r}")

    def _met(self, victim: str) -> list[int]:
        """Its processes, as soon as there are any: what is parked is stopped a little after its GPU is free."""
        until = time.monotonic() + _MET_S
        while not (pids := list(victims(self._session.pid, victim))) and time.monotonic() < until:
            time.sleep(0.01)
        return pids


def victims(gateway: int, kind: str) -> Iterator[int]:
    """Ids of the processes below the gateway that are meant: before the wake, the one that parks still runs."""
    for pid in below(gateway):
        with suppress(OSError):  # ended meanwhile
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if kind == "helper":
                found = b"adapter.gpu.helper" in command
            else:
                found = b"adapter.runtime.model" in command and is_stopped(pid) == (kind == "waking")
            if found:
                yield pid


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] == "T"


def below(pid: int) -> Iterator[int]:
    """All descendants of a process."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text(encoding="ascii").split()):
                yield child
                yield from below(child)
