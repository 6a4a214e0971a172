"""Takes the snapshots of a function: a process of its own beside the one that serves.

It starts a second model process that has never seen a secret or a replica's environment, lets it warm
up, and dumps it at its snapshot point. So the caller of a first request waits for nothing, and serving
goes on. Secrets that lie where `load` could read them are covered first. What dies half-way leaves a draft that the next builder sweeps.

    python -m adapter.runtime.snapshotter      settings as the entrypoint's; result: one JSON line on stdout
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import sys
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError, ConfigError, NotFound, SnapshotError, Timeout
from adapter.records import Rung
from adapter.replica import ReplicaSettings
from adapter.runtime.ladder import PROCESS, WEIGHTS, Wanted
from adapter.runtime.launch import Launched, model_environment, start_model
from adapter.runtime.orders import Birth, Status, error_of
from adapter.snapshot.identity import Identity, weights_identity
from adapter.snapshot.image import map_memory
from adapter.snapshot.process import dump, find_criu, raise_process_ids
from adapter.snapshot.store import Draft, Snapshot
from adapter.spec import read_handler_shape

_LEAST_PROCESS_ID = 5000
"""Process ids below are given out in a fresh namespace before a restore needs its own."""

# linux/sched.h, linux/mount.h
_CLONE_NEWNS = 0x20000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 1 << 14, 1 << 18


class Snapshotter:
    """One function's snapshots on this machine."""

    def __init__(self, settings: ReplicaSettings, environ: dict[str, str]) -> None:
        self._environ = environ
        self._wanted = Wanted.of(settings, read_handler_shape(Path(settings.folder)), environ)
        self._birth = Birth(settings.folder, self._wanted.device, Rung.LOAD, settings.body_limit_bytes)

    def run(self) -> dict[str, Any]:
        """What was published: ``{"key", "bytes", "seconds", …}``. Raises `AdapterError`, `OSError`."""
        started = time.monotonic()
        weights = self._weights()
        if not self._wanted.takes_process_snapshots:
            if weights is None:
                raise ConfigError("This function takes no snapshots.", code="snapshots-off")
            return {"key": weights.key, "bytes": weights.size_bytes, "seconds": round(time.monotonic() - started, 3)}
        snapshot = self._process(weights)
        return {
            "key": snapshot.key,
            "bytes": snapshot.size_bytes,
            "copied_bytes": snapshot.facts["copied_bytes"],
            "seconds": round(time.monotonic() - started, 3),
        }

    def _weights(self) -> Snapshot | None:
        """The weight snapshot, made where there is none; None where the function has no `build`."""
        if not self._wanted.takes_weight_snapshots:
            return None
        with suppress(NotFound):
            return self._wanted.find(WEIGHTS)
        with self._building(weights_identity(self._wanted.identity), WEIGHTS) as draft:
            model = self._warm(replace(self._birth, save_weights=str(draft.path)))
            model.close()  # the end of its orders ends it
            os.waitpid(model.pid, 0)
            return draft.publish({})

    def _process(self, weights: Snapshot | None) -> Snapshot:
        criu = find_criu(self._environ)
        birth = replace(self._birth, for_snapshot=True)
        if weights is not None:
            birth = replace(birth, rung=Rung.START, weights=str(weights.path))
        with self._building(self._wanted.identity, PROCESS) as draft:
            images = draft.path / "images"
            images.mkdir(mode=0o700)
            raise_process_ids(_LEAST_PROCESS_ID)
            model = self._warm(birth)
            try:
                pipes = dump(criu, model.pid, images)
            finally:
                _end(model)
            memory = map_memory(images, model.pid)
            (images / "dump.log").unlink()
            for path in images.iterdir():
                path.chmod(0o400)
            facts = {
                "criu": criu.path,
                "criu_version": criu.version,
                "pipes": pipes,
                "pid": model.pid,
                "mapped_bytes": memory.mapped_bytes,
                "copied_bytes": memory.copied_bytes,
                "weights": weights.key if weights else "",
            }
            return draft.publish(facts)

    def _building(self, identity: Identity, kind: str) -> AbstractContextManager[Draft]:
        wanted = self._wanted
        if wanted.store is None:
            raise ConfigError("There is no snapshot folder.", hint="Set GPUFN_SNAPSHOT_DIR.")
        return wanted.store.building(wanted.settings.tenant, wanted.function, identity, kind)

    def _warm(self, birth: Birth) -> Launched:
        """A model process at its snapshot point. Raises the handler's error, or `Timeout`."""
        output = os.pipe()
        errors = os.pipe()
        model = start_model(
            self._wanted.python,
            model_environment(self._environ, self._wanted.shared, birth),
            output=(output[1], errors[1]),
        )
        os.close(output[1])
        os.close(errors[1])
        try:
            _await_snapshot_point(model, (output[0], errors[0]), self._wanted.settings.start_timeout_s)
        except BaseException:
            _end(model)
            raise
        return model


def _await_snapshot_point(model: Launched, outputs: tuple[int, int], timeout_s: float) -> None:
    """Copy what the process prints to our standard error until it says that it is there."""
    deadline = time.monotonic() + timeout_s
    buffer = b""
    with selectors.DefaultSelector() as selector:
        for descriptor in (model.status_fd, *outputs):
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                raise Timeout(f"The function was not warm after {timeout_s:g} s.", code="start-timeout")
            for key, _ in events:
                data = os.read(key.fd, 65536)
                if key.fd != model.status_fd:
                    if data:
                        os.write(2, data)
                    else:
                        selector.unregister(key.fd)
                    continue
                if not data:
                    raise SnapshotError("The function ended before it was warm.", code="handler-exited")
                buffer += data
                *lines, buffer = buffer.split(b"\n")
                for line in map(json.loads, lines):
                    if line["kind"] == Status.SNAPSHOT_POINT.value:
                        return
                    if line["kind"] == Status.FAILED.value:
                        raise error_of(line)


def cover_secrets(folder: str) -> None:
    """See an empty folder there from now on, we and what we start. Raises `SnapshotError` where that is refused.

    Our mount namespace is a new one: the replica beside us, whose folder it is, sees no change.
    """
    if not os.path.isdir(folder) or not os.listdir(folder):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    read_only = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    if (
        libc.unshare(_CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        or libc.mount(b"none", os.fsencode(folder), b"tmpfs", read_only, b"size=4k")
    ):
        raise SnapshotError(
            "No process snapshot is taken where secrets are in sight.",
            why=f"Those in {folder} cannot be covered: {os.strerror(ctypes.get_errno())}.",
            hint="Allow CAP_SYS_ADMIN, or take the snapshot where the secrets are not: gpufn snapshot create",
            code="secrets-in-sight",
        )


def _end(model: Launched) -> None:
    model.close()
    with suppress(ProcessLookupError):
        os.kill(model.pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(model.pid, 0)


def main() -> int:
    os.nice(5)  # serving goes first
    try:
        settings = ReplicaSettings.from_env(os.environ)
        cover_secrets(settings.secrets_dir)
        result: dict[str, Any] = {"state": "published", **Snapshotter(settings, dict(os.environ)).run()}
    except AdapterError as error:
        state = "skipped" if error.code in {"snapshot-busy", "criu-missing"} else "failed"
        result = {"state": state, "code": error.code, "reason": f"{error.message} {error.why}".strip()}
    except OSError as error:
        result = {"state": "failed", "code": "os-error", "reason": str(error)}
    print(json.dumps(result), flush=True)
    return 0 if result["state"] == "published" else 1


if __name__ == "__main__":
    sys.exit(main())
