"""1,000 wakes of two functions that take turns on one GPU, each parking the other, with faults: `park_1000_*`.

The GPU is the simulated one of tests/stubs, driven by the real bindings; gateway, grants, helper and CRIU are
real. It says nothing about the time that a real driver takes. In one cycle of ten something goes wrong, of every kind that
`FAULTS` has, in turn; hangs are few, since each costs its time limit.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results_file import Bar
from benchmarks.session import REPOSITORY, Session, wait_until_gone

if TYPE_CHECKING:
    from benchmarks.__main__ import Options
    from tests.stubs.simulated import Simulated

COUNT = 1000
NAMES = ("one", "two")
ANNOTATIONS = {"gpufn.dev/initial": "0", "gpufn.dev/gpu": "1", "gpufn.dev/park": "1h", "gpufn.dev/idle": "2h"}
GPU_BYTES = 6 << 20
"""Room for one of them: each holds 4 MiB."""

_CHECKPOINT, _RESTORE = "cuCheckpointProcessCheckpoint 1", "cuCheckpointProcessRestore 1"
FAULTS = {
    "lock fails": "cuCheckpointProcessLock 1 fail 999",
    "lock times out": "cuCheckpointProcessLock 1 fail 600",
    "checkpoint fails": f"{_CHECKPOINT} fail 999",
    "checkpoint loses the process": f"{_CHECKPOINT} failed 999",
    "checkpoint ends the process": f"{_CHECKPOINT} kill-target",
    "helper killed before a checkpoint": f"{_CHECKPOINT} kill-caller",
    "helper killed after a checkpoint": f"{_CHECKPOINT} kill-caller when=after",
    "restore out of memory": f"{_RESTORE} fail 2",
    "restore loses the process": f"{_RESTORE} failed 999",
    "restore ends the process": f"{_RESTORE} kill-target",
    "helper killed before a restore": f"{_RESTORE} kill-caller",
    "helper killed after a restore": f"{_RESTORE} kill-caller when=after",
    "unlock fails": "cuCheckpointProcessUnlock 1 fail 999",
    "slow driver": f"{_RESTORE} delay 300",
    "parked process killed": "",
}
HANG = "cuCheckpointProcessCheckpoint 1 hang"
_UNNOTICED = {"slow driver"}


def run(options: Options) -> Iterable[Bar]:
    from tests.stubs.build import build
    from tests.stubs.simulated import Simulated, StubGpu, uuid_of

    count = COUNT if options.runs >= 10 else 10 * options.runs
    with tempfile.TemporaryDirectory(prefix="gpufn-bench-") as name:
        folder = Path(name)
        (folder / "libraries").mkdir()
        machine = Simulated(folder / "machine", build(folder / "libraries"))
        machine.set(StubGpu(uuid_of(0), bytes=GPU_BYTES))
        variables = {"LD_LIBRARY_PATH": machine.search_path}
        session = Session(folder / "state", functions=REPOSITORY / "tests" / "functions", variables=variables)
        session.start()
        try:
            cycles = Cycles(session, machine)
            cycles.run(count)
            leaked = cycles.leaked()
            session.stop()
        finally:
            session.end()
        leaked += wait_until_gone(folder)
    for line in (*cycles.lost, *cycles.untold, *leaked):
        print(f"  {line}", file=sys.stderr, flush=True)
    facts = {"cycles": count, "faults": dict(cycles.faults), "rungs": dict(cycles.rungs)}
    yield Bar.of("park_1000_lost", len(cycles.lost), "requests", [facts, *cycles.lost])
    yield Bar.of("park_1000_leaked", len(leaked), "things", leaked)
    yield Bar.of("park_1000_untold", len(cycles.untold), "faults", cycles.untold)


class Cycles:
    """Calls in turn, what was lost, and which faults no start record tells of."""

    def __init__(self, session: Session, machine: Simulated) -> None:
        self._session, self._machine = session, machine
        self._choose = random.Random(7)  # noqa: S311  # which cycles, the same in each run
        self.lost: list[str] = []
        self.untold: list[str] = []
        self.faults: Counter[str] = Counter()
        self.rungs: Counter[str] = Counter()
        self._unheard: list[tuple[int, str, dict[str, int]]] = []

    def run(self, count: int) -> None:
        self._session.wait_for_gpus()
        for name in NAMES:
            body = {"service": name, "image": "gpu-memory:latest", "annotations": ANNOTATIONS}
            self._session.api("POST", "/system/functions", body)
            self._session.wait(lambda name=name: not self._session.preparing(name), f"{name} is prepared", 120)  # type: ignore[misc]
        kinds = [kind for _ in range(count) for kind in FAULTS]
        for number in range(count):
            fault = ""
            if number >= len(NAMES) and self._choose.random() < 0.1:
                fault = "driver hangs" if number % 500 == 250 else kinds[sum(self.faults.values())]
            self._cycle(number, NAMES[number % 2], fault)
            if number % 100 == 99:
                print(f"  {number + 1} cycles, {sum(self.faults.values())} faults", file=sys.stderr, flush=True)

    def _cycle(self, number: int, name: str, fault: str) -> None:
        before = self._records()
        if fault:
            self.faults[fault] += 1
            self._inflict(fault)
        answer = self._session.call(name, timeout_s=300)
        if answer.status != 200 or not answer.json().get("whole"):
            self.lost.append(f"cycle {number} of {name}, {fault or 'no fault'}: {answer.status} {answer.body[:200]!r}")
        self._machine.fault()
        if fault and fault not in _UNNOTICED:
            self._unheard.append((number, fault, before))
        self._listen(number - len(NAMES))

    def _listen(self, until: int) -> None:
        """By then both functions were called again: what befell the one that was parked stands in its next start."""
        while self._unheard and self._unheard[0][0] <= until:
            number, fault, before = self._unheard.pop(0)
            if not self._is_told(before):
                self.untold.append(f"cycle {number}: {fault}")

    def _inflict(self, fault: str) -> None:
        if fault == "driver hangs":
            self._machine.fault(HANG)
        elif FAULTS[fault]:
            self._machine.fault(FAULTS[fault])
        else:
            for pid in _stopped_below(self._session.pid):
                os.kill(pid, signal.SIGKILL)

    def _records(self) -> dict[str, int]:
        return {name: len(self._session.starts(name, 10 * COUNT)) for name in NAMES}

    def _is_told(self, before: dict[str, int]) -> bool:
        """In a record since then, a parked process's wake has failed, or what happened to it stands there."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            for name in NAMES:
                records = self._session.starts(name, 10 * COUNT)
                for record in records[: len(records) - before[name]]:
                    if any(skipped["rung"] == "resume" for skipped in record["skipped"]):
                        return True
            time.sleep(0.05)
        return False

    def leaked(self) -> list[str]:
        """What is held once both functions are at zero."""
        for name in NAMES:
            self.rungs.update(record["rung"] for record in self._session.starts(name, 10 * COUNT))
            self._session.to_zero(name)
        held = self._machine.held_bytes()
        nodes = self._session.api("GET", "/gpufn/v1/nodes").json()
        leases = [holder for node in nodes for device in node["devices"] for holder in device["holders"]]
        return [*([f"{held} bytes of GPU memory"] if held else []), *(f"lease: {lease}" for lease in leases)]


def _stopped_below(pid: int) -> list[int]:
    """Processes that are frozen (parked) among all descendants of `pid`."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        found += [int(child)] if state == "T" else _stopped_below(int(child))
    return found
