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
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError, ConfigError, GpuError, NotFound, SnapshotError, SnapshotMismatch, Timeout
from adapter.gpu.checkpoint import load_bindings
from adapter.gpu.client import HelperClient, start_helper
from adapter.gpu.wire import Operation
from adapter.records import Rung
from adapter.replica import ReplicaSettings
from adapter.runtime.caches import Caches
from adapter.runtime.gpu import keeps_addresses, visible_device
from adapter.runtime.ladder import COMPILED, PROCESS, WEIGHTS, Wanted, Weights
from adapter.runtime.launch import Launched, model_environment, start_model
from adapter.runtime.orders import Birth, Status, error_of
from adapter.runtime.port import STOP_SIGNALS
from adapter.snapshot import compile_caches
from adapter.snapshot.identity import Identity, differing_fields, weights_identity
from adapter.snapshot.image import map_memory
from adapter.snapshot.process import ProcessFacts, dump, find_criu, raise_process_ids
from adapter.snapshot.rights import give_up
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
        self._birth = Birth(
            settings.folder,
            self._wanted.device,
            Rung.LOAD,
            settings.body_limit_bytes,
            keeps_addresses=not self._on_gpu or keeps_addresses(settings.gpu_capabilities),
        )
        self._caches = Path()  # while it runs: where its processes keep what they compile
        self._compiled: Snapshot | None = None

    def run(self) -> dict[str, Any]:
        """What was published: ``{"key", "bytes", "seconds", …}``. Raises `AdapterError`, `OSError`."""
        started = time.monotonic()
        parent = self._wanted.settings.runtime_dir or None
        with tempfile.TemporaryDirectory(prefix="compile-", dir=parent, ignore_cleanup_errors=True) as folder:
            self._caches = Path(folder)
            snapshot = self._all()
        copied = {name: snapshot.facts[name] for name in ("copied_bytes",) if name in snapshot.facts}
        seconds = round(time.monotonic() - started, 3)
        return {"key": snapshot.key, "bytes": snapshot.size_bytes, **copied, "seconds": seconds}

    def _all(self) -> Snapshot:
        """The one that helps most of those that are there now."""
        weights = self._weights()
        try:
            return self._from_weights(weights)
        except AdapterError as error:
            if weights is None or weights.snapshot is not None or error.code != SnapshotMismatch.default_code:
                raise
            print(f"gpufn: the image's weights are not used: {error.message} {error.why}", file=sys.stderr, flush=True)
        return self._from_weights(self._own_weights())

    def _from_weights(self, weights: Weights | None) -> Snapshot:
        if self._wanted.takes_process_snapshots:
            return self._process(weights)
        if self._compiled is None and self._wanted.keeps_compile_caches:
            self._warm_for_caches(weights)
        best = (weights.snapshot if weights else None) or self._compiled
        if best is None:
            raise ConfigError("This function takes no snapshots.", code="snapshots-off")
        return best

    def _weights(self) -> Weights | None:
        """What `build` is filled from, made where there are none; None where the function has no `build`."""
        if not self._wanted.takes_weight_snapshots:
            return None
        with suppress(NotFound):
            return self._wanted.find_weights()
        return self._own_weights()

    def _own_weights(self) -> Weights:
        with self._building(weights_identity(self._wanted.identity), WEIGHTS) as draft:
            model = self._warm(replace(self._birth, save_weights=str(draft.path)))
            model.close()  # the end of its orders ends it
            os.waitpid(model.pid, 0)
            snapshot = draft.publish({})
        return Weights(snapshot.path, snapshot.key, snapshot)

    def _process(self, weights: Weights | None) -> Snapshot:
        try:
            criu = find_criu(self._environ)
            if self._on_gpu and not self._wanted.settings.gpu_helper:
                load_bindings()  # what our own helper needs: no model is to hold a GPU for nothing
        except (SnapshotError, GpuError):
            if Caches(Path(self._wanted.settings.runtime_dir)).are_new(self._wanted):
                self._warm_for_caches(weights)
            raise
        birth = replace(self._from(weights), for_snapshot=True)
        with self._building(self._wanted.identity, PROCESS) as draft:
            images = draft.path / "images"
            images.mkdir(mode=0o700)
            raise_process_ids(_LEAST_PROCESS_ID)
            model = self._warm(birth)
            try:
                gpu = self._give_gpu_back(model.pid) if self._on_gpu else ""
                pipes = dump(criu, model.pid, images)
            finally:
                _end(model)
            memory = map_memory(images, model.pid, going=self._caches)
            rights = give_up(images)
            (images / "dump.log").unlink()
            for path in images.iterdir():
                path.chmod(0o400)
            self._check_unchanged()
            facts = ProcessFacts(
                criu=criu.path,
                criu_version=criu.version,
                pid=model.pid,
                pipes=tuple(pipes),
                mapped_bytes=memory.mapped_bytes,
                copied_bytes=memory.copied_bytes,
                weights=weights.key if weights else "",
                weights_left_out=weights is not None and self._on_gpu,
                keeps_addresses=weights is not None and self._on_gpu and birth.keeps_addresses,
                gpu=gpu,
                rights=rights,
            )
            return draft.publish(asdict(facts))

    def _check_unchanged(self) -> None:
        """Raises `SnapshotError` where the process may have read other code than the key says."""
        wanted = self._wanted
        now = Wanted.of(wanted.settings, wanted.shape, self._environ).identity
        fields = differing_fields(now, wanted.identity)
        if fields:
            raise SnapshotError(
                "The function changed while its snapshot was taken.",
                why=f"Differs in: {', '.join(fields)}.",
                hint="The next warm start takes one of what is there then.",
                code="changed",
            )

    @property
    def _on_gpu(self) -> bool:
        return self._wanted.device.startswith("cuda")

    def _give_gpu_back(self, pid: int) -> str:
        """Checkpoint what the process has on the GPU, so that the dump meets no device. Returns where it was.

        Empty where it has not used CUDA. Raises `SnapshotError`.
        """
        path = self._wanted.settings.gpu_helper
        try:
            with ExitStack() as stack:
                helper = stack.enter_context(start_helper(str(self._caches / "gpu"))) if not path else None
                client = stack.enter_context(HelperClient.connect(helper.path if helper else path))
                pidfd = os.pidfd_open(pid)
                stack.callback(os.close, pidfd)
                error = client.ask(Operation.PARK, pidfd).error
        except GpuError as exc:
            error = exc
        if error is not None and error.code == "gpu-no-cuda-process":
            return ""
        if error is not None:
            raise SnapshotError(
                "The process keeps its GPU.", why=f"{error.message} {error.why}", hint=error.hint, code=error.code
            )
        return visible_device(self._environ) or "the only one"

    def _from(self, weights: Weights | None) -> Birth:
        return replace(self._birth, rung=Rung.START, weights=str(weights.path)) if weights else self._birth

    def _warm_for_caches(self, weights: Weights | None) -> None:
        """Compile once more where nobody's requests are: what is kept is code."""
        _end(self._warm(self._from(weights)))

    def _keep_compiled(self) -> None:
        """Publish what the process that has just warmed up compiled, if anything; once."""
        if self._compiled is not None or not compile_caches.is_used(self._caches):
            return
        with self._building(self._wanted.identity, COMPILED) as draft:
            compile_caches.pack(self._caches, draft.path / compile_caches.BUNDLE)
            self._compiled = draft.publish({})

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
            model_environment(self._environ, self._wanted.shared, birth, self._caches),
            output=(output[1], errors[1]),
        )
        os.close(output[1])
        os.close(errors[1])
        try:
            _await_snapshot_point(model, (output[0], errors[0]), self._wanted.settings.start_timeout_s)
            self._keep_compiled()
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


def _hear_stop_signals() -> None:
    """As a container's first process, which no signal ends by itself, end at once and take all in there along: a
    function's pod may wait for its GPU. The draft that is left is swept by the next builder."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def main() -> int:
    _hear_stop_signals()
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
