"""The start ladder: which rungs a replica may try, and why the faster ones are left out. Decides, does nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapter.errors import NotFound, SnapshotError
from adapter.records import Rung, SkippedRung
from adapter.replica import ReplicaSettings, user_environment
from adapter.snapshot.identity import Identity, identity_of, weights_identity
from adapter.snapshot.store import Snapshot, Store
from adapter.spec import HandlerShape

PROCESS, WEIGHTS, COMPILED = "process", "weights", "compile"
"""Kinds of snapshots."""


@dataclass(frozen=True, slots=True)
class Step:
    """A rung to try, and the snapshot it starts from."""

    rung: Rung
    snapshot: Snapshot | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a function's snapshots are for: settings, machine and code, reduced to what finds them."""

    settings: ReplicaSettings
    shape: HandlerShape
    python: str
    device: str
    shared: dict[str, str]
    identity: Identity

    @classmethod
    def of(cls, settings: ReplicaSettings, shape: HandlerShape, environ: Mapping[str, str]) -> Wanted:
        python = settings.python or sys.executable
        device = device_of(settings)
        shared = shared_variables(settings, shape, environ)
        return cls(settings, shape, python, device, shared, identity_of(Path(settings.folder), python, shared, device))

    @property
    def function(self) -> str:
        return f"{self.settings.function}.{self.settings.namespace}"

    @property
    def store(self) -> Store | None:
        if not self.settings.snapshot_dir:
            return None
        return Store(Path(self.settings.snapshot_dir), self.settings.snapshot_limit_bytes)

    @property
    def takes_process_snapshots(self) -> bool:
        return bool(self.settings.snapshot_dir) and wants_process_snapshot(self.settings, self.shape)

    @property
    def takes_weight_snapshots(self) -> bool:
        return bool(self.settings.snapshot_dir) and self.shape.has_build and self.settings.weight_snapshot != "off"

    @property
    def keeps_compile_caches(self) -> bool:
        return bool(self.settings.snapshot_dir) and self.shape.has_load

    def weights_of(self, snapshot: Snapshot) -> str:
        """The folder of the weights that a process gave up before it was dumped; empty where it has them.

        Raises as `find` does.
        """
        return str(self.find(WEIGHTS).path) if snapshot.facts.get("weights_left_out") else ""

    def find(self, kind: str) -> Snapshot:
        """The fitting snapshot of a kind. Raises `NotFound` or `SnapshotError`.

        A process snapshot that maps a weight snapshot is of no use without it. Finding it also makes the
        weights the later used of the two, so that the store never drops them first.
        """
        store = self.store
        if store is None:
            raise NotFound("There is no snapshot folder.", code="no-store")
        identity = weights_identity(self.identity) if kind == WEIGHTS else self.identity
        snapshot = store.find(self.settings.tenant, self.function, identity, kind)
        if kind == PROCESS and snapshot.facts.get("weights"):
            self.find(WEIGHTS)
        return snapshot


def wants_process_snapshot(settings: ReplicaSettings, shape: HandlerShape) -> bool:
    return settings.process_snapshot == "on" or (settings.process_snapshot == "auto" and shape.has_load)


def shared_variables(settings: ReplicaSettings, shape: HandlerShape, environ: Mapping[str, str]) -> dict[str, str]:
    """The function's own variables that it sees from its first line on: all of them, or where a snapshot
    may keep them only those that it lists; the others arrive after the snapshot point."""
    own = user_environment(environ)
    if not wants_process_snapshot(settings, shape):
        return own
    return {name: own[name] for name in settings.snapshot_env if name in own}


def device_of(settings: ReplicaSettings) -> str:
    return settings.device or ("cuda:0" if os.path.exists("/dev/nvidia0") else "cpu")


def plan(wanted: Wanted) -> tuple[list[Step], list[SkippedRung]]:
    """Steps in the order in which to try them (never empty), and the rungs left out with their reasons."""
    steps: list[Step] = []
    skipped: list[SkippedRung] = []
    rungs: tuple[tuple[Rung, str, Callable[[], str]], ...] = (
        (Rung.RESTORE, PROCESS, lambda: _why_no_restore(wanted)),
        (Rung.START, WEIGHTS, lambda: "" if wanted.takes_weight_snapshots else "The handler defines no `build`."),
    )
    for rung, kind, why_not in rungs:
        reason = why_not()
        if reason:
            skipped.append(SkippedRung(rung, "off", reason))
            continue
        try:
            steps.append(Step(rung, wanted.find(kind)))
        except (NotFound, SnapshotError) as error:
            skipped.append(SkippedRung(rung, error.code, f"{error.message} {error.why}".strip()))
        except Exception as error:  # boundary: a snapshot that cannot be read, in whatever way, is not used
            skipped.append(SkippedRung(rung, "unreadable", f"{error!r}"))
    return [*steps, Step(Rung.LOAD)], skipped


def _why_no_restore(wanted: Wanted) -> str:
    if not wants_process_snapshot(wanted.settings, wanted.shape):
        return "Process snapshots are off, or the handler defines no `load`."
    if not wanted.settings.snapshot_dir:
        return "There is no snapshot folder."
    if os.getpid() != 1:
        return "The entrypoint is not the first process of its own process-id namespace."
    return ""
