"""The start ladder: which rungs a replica may try, and why the faster ones are left out. Decides, does nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapter.errors import NotFound, SnapshotError, SnapshotMismatch
from adapter.keys import MODEL_DIR
from adapter.records import Rung, SkippedRung
from adapter.replica import ReplicaSettings, user_environment
from adapter.snapshot import image_weights
from adapter.snapshot.identity import Identity, identity_of, weights_identity
from adapter.snapshot.image_weights import KEY_PREFIX, MODEL_FOLDER
from adapter.snapshot.store import Snapshot, Store
from adapter.spec import HandlerShape

PROCESS, WEIGHTS, COMPILED = "process", "weights", "compile"
"""Kinds of snapshots."""


@dataclass(frozen=True, slots=True)
class Step:
    """A rung to try, and the snapshot it starts from."""

    rung: Rung
    snapshot: Snapshot | None = None
    """The store's; what a rung fails with is removed from there."""
    weights: str = ""
    """Folder of the weights that fill a built model."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that a built model is filled from. `snapshot` is the store's; None: they are the image's."""

    path: Path
    key: str
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
    _brought: list[Weights] = field(default_factory=list, compare=False, repr=False)
    """The image's weights once they were found whole: one start looks at them more than once."""

    @classmethod
    def of(cls, settings: ReplicaSettings, shape: HandlerShape, environ: Mapping[str, str]) -> Wanted:
        python = settings.python or sys.executable
        device = device_of(settings, environ)
        shared = shared_variables(settings, shape, environ)
        identity = identity_of(Path(settings.folder), python, shared, device)
        if settings.weights_dir:  # `load` reads them
            identity["weights"] = image_weights.identity_of_weights(Path(settings.weights_dir))
        return cls(settings, shape, python, device, shared, identity)

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
    def uses_weight_snapshots(self) -> bool:
        return self.shape.has_build and self.settings.weight_snapshot != "off"

    @property
    def takes_weight_snapshots(self) -> bool:
        return bool(self.settings.snapshot_dir) and self.uses_weight_snapshots

    @property
    def keeps_compile_caches(self) -> bool:
        return bool(self.settings.snapshot_dir) and self.shape.has_load

    def lacks_snapshots(self, rung: Rung) -> bool:
        """Whether a replica that started by `rung` can have a faster start next time, compile caches left out."""
        if rung is Rung.RESTORE:
            return False
        if rung is Rung.START and self.settings.weights_dir:  # the image's, or better ones: nothing to take
            return self.takes_process_snapshots
        return self.takes_process_snapshots or self.takes_weight_snapshots

    def weights_of(self, snapshot: Snapshot) -> str:
        """The folder of the weights that a process gave up before it was dumped; empty where it has them.

        Raises as `find` does.
        """
        if not snapshot.facts.get("weights_left_out"):
            return ""
        if str(snapshot.facts.get("weights")).startswith(KEY_PREFIX):
            return str(self._image_weights().path)
        return str(self.find(WEIGHTS).path)

    def find(self, kind: str) -> Snapshot:
        """The fitting snapshot of a kind. Raises `NotFound` or `SnapshotError`.

        A process snapshot that maps weights is of no use without them. Finding it also makes those of the store
        the later used of the two, so that it never drops them first.
        """
        store = self.store
        if store is None:
            raise NotFound("There is no snapshot folder.", code="no-store")
        identity = weights_identity(self.identity) if kind == WEIGHTS else self.identity
        snapshot = store.find(self.settings.tenant, self.function, identity, kind)
        mapped = str(snapshot.facts.get("weights") or "") if kind == PROCESS else ""
        if mapped.startswith(KEY_PREFIX):
            if self._image_weights().key != mapped:
                raise SnapshotMismatch("The snapshot maps other weights than the image's.")
        elif mapped:
            self.find(WEIGHTS)
        return snapshot

    def find_weights(self) -> Weights:
        """What `build` is filled from: the store's, which hold all that `load` makes, else the image's.

        Raises `NotFound` or `SnapshotError`.
        """
        try:
            snapshot = self.find(WEIGHTS)
            return Weights(snapshot.path, snapshot.key, snapshot)
        except (NotFound, SnapshotError):
            if not self.settings.weights_dir:
                raise
            try:
                return self._image_weights()
            except NotFound:
                pass
            raise

    def _image_weights(self) -> Weights:
        """Raises `NotFound`, or `SnapshotCorrupt` naming what is damaged."""
        if self._brought:
            return self._brought[0]
        if not self.settings.weights_dir:
            raise NotFound("The image brings no weights.", code="none")
        found = image_weights.find(Path(self.settings.weights_dir))
        record = None
        if self.settings.verify_weights == "auto" and self.store is not None:
            record = self.store.folder(self.settings.tenant, self.function) / f".image-weights-{found.digest}.json"
        if record is not None or self.settings.verify_weights == "on":
            image_weights.verify(found, record)
        self._brought.append(Weights(found.path, f"{KEY_PREFIX}{found.digest}"))
        return self._brought[0]


def wants_process_snapshot(settings: ReplicaSettings, shape: HandlerShape) -> bool:
    return settings.process_snapshot == "on" or (settings.process_snapshot == "auto" and shape.has_load)


def shared_variables(settings: ReplicaSettings, shape: HandlerShape, environ: Mapping[str, str]) -> dict[str, str]:
    """The function's own variables that it sees from its first line on: all of them, or where a snapshot
    may keep them only those that it lists; the others arrive after the snapshot point."""
    own = user_environment(environ)
    brought = {MODEL_DIR: os.path.join(settings.weights_dir, MODEL_FOLDER)} if settings.weights_dir else {}
    if not wants_process_snapshot(settings, shape):
        return {**brought, **own}
    return {**brought, **{name: own[name] for name in (*settings.snapshot_env, *brought) if name in own}}


def device_of(settings: ReplicaSettings, environ: Mapping[str, str], devices: str = "/dev") -> str:
    """A container that was given one GPU of several has its device by the number it has on the machine. One that was
    given none may see them all, and a variable that shows none to CUDA."""
    if settings.device:
        return settings.device
    is_shown = environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and any(map(_is_gpu, os.listdir(devices)))
    return "cuda:0" if is_shown else "cpu"


def _is_gpu(device: str) -> bool:
    return device.startswith("nvidia") and device.removeprefix("nvidia").isdecimal()


def plan(wanted: Wanted) -> tuple[list[Step], list[SkippedRung]]:
    """Steps in the order in which to try them (never empty), and the rungs left out with their reasons."""
    steps: list[Step] = []
    skipped: list[SkippedRung] = []
    rungs: tuple[tuple[Rung, str, Callable[[], Step]], ...] = (
        (Rung.RESTORE, _why_no_restore(wanted), lambda: Step(Rung.RESTORE, wanted.find(PROCESS))),
        (Rung.START, _why_no_start(wanted), lambda: _start_from(wanted.find_weights())),
    )
    for rung, reason, find in rungs:
        if reason:
            skipped.append(SkippedRung(rung, "off", reason))
            continue
        try:
            steps.append(find())
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


def _why_no_start(wanted: Wanted) -> str:
    brings = bool(wanted.settings.weights_dir) and wanted.uses_weight_snapshots
    return "" if wanted.takes_weight_snapshots or brings else "The handler defines no `build`."


def _start_from(weights: Weights) -> Step:
    return Step(Rung.START, weights.snapshot, str(weights.path))
