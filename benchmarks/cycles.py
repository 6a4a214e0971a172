"""100 cycles of wake, answer, kill -9: `cycles_100_wrong`, `cycles_100_leaked`.

What is killed changes from cycle to cycle: the outermost process of a replica, its entrypoint, its model
process; and every tenth time `gpufn up` itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results_file import Bar
from benchmarks.session import Session, wait_until_gone
from benchmarks.wakes import ZERO, embed

if TYPE_CHECKING:
    from benchmarks.__main__ import Options

COUNT = 100


def run(options: Options) -> Iterable[Bar]:
    del options
    subject, choose = embed(), random.Random(7)  # noqa: S311  # which victim, the same in each run
    wrong, kills, leaks = 0, [], []
    with tempfile.TemporaryDirectory(prefix="gpufn-bench-") as folder:
        state = Path(folder) / "state"
        temporary(state).mkdir()
        session = Session(state, variables={"TMPDIR": str(temporary(state))})
        session.start()
        session.deploy("embed", ZERO)
        session.call("embed", subject.body)
        session.wait_for_snapshot("embed")
        session.to_zero("embed")
        before = outside(state)
        files = stored(state)
        for number in range(COUNT):
            answer = session.call("embed", subject.body)
            wrong += answer.status != 200 or not subject.is_right(answer)
            tree = replica_processes(state)
            if number % 10 == 9:
                kills.append("gateway")
                session.kill()
                session.start()
            else:
                kills.append(kill_one(tree, choose))
                session.to_zero("embed")
            leaks += [f"cycle {number}, killed {kills[-1]}: {left}" for left in still_alive(tree)]
        leaks += sorted(stored(state) - files)
        session.stop()
        leaks += wait_until_gone(Path(folder))
        leaks += sorted(outside(state) - before)
    for leak in leaks:
        print(f"  {leak}", file=sys.stderr, flush=True)
    yield Bar.of("cycles_100_wrong", wrong, "answers", [{"victims": kills}])
    yield Bar.of("cycles_100_leaked", len(leaks), "things", leaks)


def replica_processes(state: Path) -> dict[int, str]:
    """Processes of all replicas that have a model process, the outermost first, with what they are.

    A standby has none: only its entrypoint, and what mounts its folder, which ends by itself.
    """
    tree: dict[int, str] = {}
    for file in (state / "replicas").glob("*/pid"):
        pid, _ = json.loads(file.read_text())
        below = descendants(pid)
        if any(map(is_model, below)):
            tree[pid] = "outermost"
            tree |= {child: "entrypoint" if i == 0 else "model" for i, child in enumerate(below)}
    return tree


def is_model(pid: int) -> bool:
    with contextlib.suppress(OSError):  # ended meanwhile
        return b"adapter.runtime.model" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def kill_one(tree: dict[int, str], choose: random.Random) -> str:
    """Kill a process of `tree`; helpers of a restore, which may end by themselves meanwhile, are passed over."""
    for victim in choose.sample(sorted(tree), len(tree)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            return tree[victim]
    raise RuntimeError("the replica that just answered has no process")


def still_alive(tree: dict[int, Any], limit_s: float = 20) -> list[str]:
    """Processes of `tree` that have not ended within `limit_s`."""
    deadline = time.monotonic() + limit_s
    alive = set(tree)
    while alive and time.monotonic() < deadline:
        alive = {pid for pid in alive if Path(f"/proc/{pid}").exists()}
        time.sleep(0.01)
    return [f"process {pid} ({tree[pid]})" for pid in sorted(alive)]


def stored(state: Path) -> set[str]:
    """What must not grow in number: unfinished snapshots, and folders of replicas beside the standby's."""
    inside = (
        path for path in (state / "snapshots").glob("*/*/*") if path.suffix != ".lock"
    )  # one a snapshot, for good
    drafts = {str(path) for path in inside if not (path / "manifest.json").exists()}
    return drafts | {str(path) for path in (state / "replicas").glob("*") if not is_standby(path)}


def is_standby(home: Path) -> bool:
    """Whether the process that a replica's folder names lives, and has no model process."""
    with contextlib.suppress(OSError, ValueError):
        pid, _ = json.loads((home / "pid").read_text())
        return Path(f"/proc/{pid}").exists() and not any(map(is_model, descendants(pid)))
    return False


def outside(state: Path) -> set[str]:
    """What a replica could leave on the rest of the machine: temporary files, shared memory, mounts."""
    places = [temporary(state), Path("/dev/shm"), Path("/run")]  # noqa: S108  # looked at, not used
    files = {str(path) for place in places if place.is_dir() for path in place.iterdir()}
    return files | {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def temporary(state: Path) -> Path:
    """Where the gateway's processes put temporary files, apart from those of everybody else."""
    return state.with_name("tmp")
