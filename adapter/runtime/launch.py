"""Bringing up a model process: started from nothing, or restored from a process snapshot.

Standard library only, and no fork of this process: `posix_spawn` starts interpreter or CRIU in a few
milliseconds. A launched process has pipes for orders (0) and status (3), the replica's own output as 1
and 2, and no other descriptor.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapter.errors import SnapshotError
from adapter.replica import base_environment, shim_path
from adapter.runtime.orders import BIRTH_VARIABLE, Birth
from adapter.snapshot import compile_caches
from adapter.snapshot.process import ProcessFacts, candidates, open_memory, restore_command, restore_environment
from adapter.snapshot.rights import why_no_restore
from adapter.snapshot.store import Snapshot

_FIRST_INHERITED = 20
"""CRIU gets the pipes of the process it restores from this descriptor on, clear of its own."""

NO_CRIU = "criu-missing"
NO_RIGHTS = "no-rights"
"""Code of a restore that was not tried: nothing is wrong with the snapshot."""

_CLEAR_OF_TARGETS = 100
_F_SETPIPE_SZ = 1031  # fcntl.F_SETPIPE_SZ, from Python 3.10 on some builds only


@dataclass
class Launched:
    """A process on its way up. `pid` is the model process, or the CRIU that restores it (`criu`)."""

    pid: int
    orders_fd: int
    status_fd: int
    criu: bool
    log: Path | None = None

    def close(self) -> None:
        for descriptor in (self.orders_fd, self.status_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.orders_fd = self.status_fd = -1


def model_environment(
    environ: Mapping[str, str], shared: Mapping[str, str], birth: Birth, caches: Path
) -> dict[str, str]:
    """What a model process has before its snapshot point: the machine's variables and the `shared` ones.

    Its compilers' caches are in `caches`, unless `shared` says otherwise.
    """
    env = {**base_environment(environ), **compile_caches.variables(caches), **shared}
    env["PYTHONPATH"] = python_path(environ)
    env["PYTHONUNBUFFERED"] = "1"
    env[BIRTH_VARIABLE] = birth.to_variable()
    return env


def python_path(environ: Mapping[str, str]) -> str:
    """Where an interpreter finds this package, and what its user put on the path."""
    parts = [shim_path(), *environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(part for part in parts if part))


def start_model(python: str, environment: Mapping[str, str], *, output: tuple[int, int] = (1, 2)) -> Launched:
    """Start the model process. Raises `OSError`."""
    orders_r, orders_w = _orders_pipe()
    status_r, status_w = os.pipe()
    try:
        pid = _spawn(
            [python, "-m", "adapter.runtime.model"], environment, {0: orders_r, 1: output[0], 2: output[1], 3: status_w}
        )
    except OSError:
        os.close(orders_w)
        os.close(status_r)
        raise
    finally:
        os.close(orders_r)
        os.close(status_w)
    return Launched(pid, orders_w, status_r, criu=False)


def restore_model(snapshot: Snapshot, runtime_dir: Path, environ: Mapping[str, str]) -> Launched:
    """Start CRIU on a process snapshot; the restored process becomes this process-id namespace's own.

    Raises `OSError` and `SnapshotError`: a manifest names no program of its own to be run.
    """
    facts = ProcessFacts.of(snapshot.facts)
    why_not = why_no_restore(facts.rights)
    if why_not:
        raise SnapshotError("It cannot be restored with the rights of this process.", why=why_not, code=NO_RIGHTS)
    criu = _criu_for(facts, environ)
    images = snapshot.path / "images"
    memory = open_memory(images)
    orders_r, orders_w = _orders_pipe()
    status_r, status_w = os.pipe()
    first = _FIRST_INHERITED
    inherited = {first: orders_r, first + 1: 1, first + 2: 2, first + 3: status_w}
    if memory >= 0:
        inherited[first + 4] = memory
    log = runtime_dir / "restore.log"
    command = restore_command(
        criu, images, facts.pipes, range(first, first + 4), first + 4 if memory >= 0 else -1, log=log
    )
    try:
        environment = restore_environment(base_environment(environ), images)
        pid = _spawn(command, environment, {0: orders_r, 1: 1, 2: 2, **inherited})
    except OSError:
        os.close(orders_w)
        os.close(status_r)
        raise
    finally:
        for descriptor in (orders_r, status_w, *([memory] if memory >= 0 else [])):
            os.close(descriptor)
    return Launched(pid, orders_w, status_r, criu=True, log=log)


def _criu_for(facts: ProcessFacts, environ: Mapping[str, str]) -> str:
    """The one that dumped it where that is ours too, else ours: on another node it lies at another place."""
    ours = candidates(environ)
    if not ours:
        raise SnapshotError("There is no CRIU here.", why=f"It was taken with {facts.criu}.", code=NO_CRIU)
    return facts.criu if facts.criu in ours else ours[0]


def _orders_pipe() -> tuple[int, int]:
    """A pipe that takes the whole orders (an environment can be large) before anybody reads."""
    read_end, write_end = os.pipe()
    with suppress(PermissionError):  # above the user's pipe limit: the default of 64 KiB has to do
        fcntl.fcntl(write_end, _F_SETPIPE_SZ, 2**20)
    return read_end, write_end


def _spawn(command: list[str], environment: Mapping[str, str], descriptors: Mapping[int, int]) -> int:
    """Start `command` in a session of its own with exactly `descriptors` (theirs -> ours) open."""
    # Clear of every target number, so that no dup2 overwrites a source that a later one needs.
    sources = [fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, _CLEAR_OF_TARGETS) for ours in descriptors.values()]
    try:
        actions = [(os.POSIX_SPAWN_DUP2, source, theirs) for theirs, source in zip(descriptors, sources, strict=True)]
        return os.posix_spawn(command[0], command, environment, file_actions=actions, setsid=True)
    finally:
        for source in sources:
            os.close(source)
