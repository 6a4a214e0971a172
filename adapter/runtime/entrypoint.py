"""The entrypoint: first process of a replica. Holds requests, brings the model process up, watches it, drains it.

    starting ──▶ serving ⇄ parking ─▶ parked     any state ──▶ draining ──▶ gone
       │  ▲         │
       ▼  └─────────┘ (the model process died: start again, behind a back-off)
     failed ──(a request after the back-off)──▶ starting

One thread, one selector. It proxies nothing: the model process is given the listening socket and the
connections that were accepted before it was there (see `front`, `channel`).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError, GpuError, HandlerError, SnapshotError, Timeout, Unavailable
from adapter.gpu.wire import Answer, Operation
from adapter.records import Event, EventName, PhaseName, Rung, SkippedRung
from adapter.replica import Command, ReplicaSettings, user_environment
from adapter.runtime import launch, metrics
from adapter.runtime.background import NO_NEWS, Background
from adapter.runtime.caches import Caches
from adapter.runtime.channel import MAX_DESCRIPTORS, Channel, listen, peer_pid
from adapter.runtime.front import Front, answer
from adapter.runtime.gpu import Gpu, keeps_addresses, visible_device, why_not_park
from adapter.runtime.ladder import PROCESS, Step, Wanted, device_of, plan
from adapter.runtime.lock_file import LockFile
from adapter.runtime.loop import Loop
from adapter.runtime.model_process import ModelProcess
from adapter.runtime.orders import Birth, Orders, Status, error_of
from adapter.runtime.port import STOP_SIGNALS, events_fd, say
from adapter.runtime.start import Start
from adapter.snapshot.process import ProcessFacts
from adapter.spec import read_handler_shape

_RESTORE_LIMIT_S = 30.0
"""A restore that takes longer has hung: half a gigabyte takes a tenth of a second. What a GPU held takes longer."""

_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Between failed starts, by how many there were in a row."""

_PARK_AGAIN_S, _PARK_TRIES = 0.05, 20
"""A park meets a request that is being answered, or none: within a second it is clear which."""

_NOT_LAUNCHED = "start-failed"

_NOT_ITS_FAULT = frozenset(
    {_NOT_LAUNCHED, launch.NO_RIGHTS, launch.NO_CRIU}
    | {"gpu-out-of-memory", "out-of-host-memory", "helper-died", "helper-timeout"}  # of the machine, as it was then
)
"""Failures after which a snapshot is kept."""

_SOCKET_PATH_LIMIT_BYTES = 107


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    PARKING = "parking"
    PARKED = "parked"
    FAILED = "failed"
    DRAINING = "draining"
    GONE = "gone"


class Entrypoint:
    """One replica. `run` returns the exit code, 0, after a drain; a handler that fails is a state, not an exit."""

    def __init__(
        self, settings: ReplicaSettings, environ: dict[str, str], began_ns: int, listener: socket.socket
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._environ = environ
        self._began_ns = began_ns
        self._loop = Loop()
        self._state = State.STARTING
        self._start: Start | None = None
        self._park_asked = False
        self._park_tries = 0
        self._can_park = True
        self._draining_wanted = False
        self._lingers = True
        self._failures = 0
        self._retry_at = 0.0
        self._failure: AdapterError | None = None
        self._snapshotter = Background(self._loop, self._park_once_alone)
        self._events_fd = events_fd(settings)
        self._metrics = metrics.Metrics(settings.function, settings.namespace)
        self._temporary = ExitStack()  # folders that go with us
        self._runtime_dir = Path(settings.runtime_dir or self._temporary_folder())
        self._model = ModelProcess(self._loop, self._runtime_dir, self._on_status)
        self._caches = Caches(self._runtime_dir)
        self._wanted: Wanted | None = None
        self._gpu = None
        if device_of(settings, environ).startswith("cuda"):
            self._gpu = Gpu(self._loop, settings.gpu_helper, self._runtime_dir, environ)
        self._gpu_is_away = False  # the process's GPU memory is not in its place yet
        self._keeps_addresses = False  # of weights on the GPU
        self._gpu_of_parked = ""
        self._hello_waits = False
        self._snapshots_due = False
        self._lock_file = LockFile(wanted=settings.listen_fd < 0 and not settings.suppress_lock)

    # The loop -----------------------------------------------------------------------------------

    def run(self) -> int:
        for descriptor in (self._settings.listen_fd, self._settings.events_fd, self._settings.commands_fd):
            if descriptor > 2:
                os.set_inheritable(descriptor, False)  # ours alone: user code must not hold the port
        self._front = Front(
            self._listener,
            self._loop.selector,
            self._settings.held,
            probe=self._probe,
            refuse=self._refuse,
            on_held=self._on_held,
        )
        self._front.accept_here(True)
        self._lock_file.write()
        self._loop.watch_signals((*STOP_SIGNALS, signal.SIGCHLD), self._on_signals)
        self._watch_commands()
        self._listen_for_models()
        self._listen_for_scrapes()
        self._begin_start(self._began_ns)
        with self._temporary:
            while self._state is not State.GONE:
                self._loop.turn()
        self._say(EventName.STOPPED)
        return 0

    def _temporary_folder(self) -> str:
        return self._temporary.enter_context(tempfile.TemporaryDirectory(prefix="gpufn-", ignore_cleanup_errors=True))

    def _say(self, name: EventName, **fields: Any) -> None:
        say(self._events_fd, Event(name, time.time_ns(), fields))

    # Sockets and signals ------------------------------------------------------------------------

    def _on_signals(self, numbers: set[int]) -> None:
        if signal.SIGCHLD in numbers:
            self._reap()
        if numbers & set(STOP_SIGNALS):
            self._begin_drain(linger=True)

    def _watch_commands(self) -> None:
        descriptor = self._settings.commands_fd
        if descriptor < 0:
            return

        def heard() -> None:
            words = os.read(descriptor, 4096)
            if not words:
                self._loop.forget(descriptor)
            for line in words.splitlines(keepends=True) or [Command.STOP]:
                self._obey(line)

        self._loop.watch(descriptor, heard)

    def _obey(self, line: bytes) -> None:
        if line == Command.STOP:
            self._begin_drain(linger=False)  # who says so sends no more requests
        elif line == Command.PARK:
            self._begin_park()
        elif line.startswith(Command.RESUME):
            self._environ["CUDA_VISIBLE_DEVICES"] = ",".join(Command.devices_in(line))
            if self._state is State.PARKED:
                self._resume()

    def _listen_for_models(self) -> None:
        path = str(self._runtime_dir / "c")
        if len(path.encode()) > _SOCKET_PATH_LIMIT_BYTES:
            path = self._temporary_folder() + "/c"
        self._channel_path = path
        listener = listen(path)
        self._loop.watch(listener.fileno(), lambda: self._meet_model(listener))

    def _listen_for_scrapes(self) -> None:
        if not self._settings.metrics_port:
            return
        try:
            listener = socket.create_server(("0.0.0.0", self._settings.metrics_port))  # noqa: S104
        except OSError as error:
            print(f"gpufn: no metrics on port {self._settings.metrics_port}: {error}", file=sys.stderr)
            return
        self._loop.watch(listener.fileno(), lambda: self._metrics.scrape(listener, self._loop, self._ask_stats))

    def _ask_stats(self) -> bool:
        return self._state is State.SERVING and self._model.say("stats")

    # What the front asks ------------------------------------------------------------------------

    def _probe(self, readiness: bool) -> bytes:
        if self._draining_wanted:
            return answer(503, b"draining")
        if not readiness:
            return answer(200, b"OK")
        if self._state in (State.PARKING, State.PARKED):
            return answer(200, b"OK")  # a request wakes it
        return answer(503, self._state.value.encode())

    def _refuse(self) -> AdapterError | None:
        if self._state is State.DRAINING:
            return Unavailable("This replica is shutting down.", hint="Retry.", code="draining", retry_after_s=1)
        if self._failure is not None and time.monotonic() < self._retry_at:
            return self._failed_error()
        return None

    def _failed_error(self) -> AdapterError:
        assert self._failure is not None
        wait_s = max(1.0, self._retry_at - time.monotonic())
        failure = self._failure
        return HandlerError(
            failure.message, why=failure.why, hint=failure.hint, code=failure.code, retry_after_s=wait_s
        )

    def _on_held(self) -> None:
        if self._state is State.PARKED and self._settings.resume == "held":
            self._resume()
        elif self._state is State.PARKING and self._snapshotter.pid:
            self._snapshotter.kill()  # requests go first; the next park takes the snapshot
            self._snapshotter.tried, self._snapshots_due = False, True
        elif self._state is State.FAILED:
            self._begin_start(time.monotonic_ns())

    # Starting -----------------------------------------------------------------------------------

    def _begin_start(self, began_ns: int, skipped: tuple[SkippedRung, ...] = ()) -> None:
        """`skipped`: what has failed already, for the record."""
        self._state = State.STARTING
        try:
            shape = read_handler_shape(Path(self._settings.folder))
            self._wanted = Wanted.of(self._settings, shape, self._environ)
            steps, left_out = plan(self._wanted)
        except (AdapterError, OSError) as error:
            self._start = Start(self._settings, began_ns, [], [*skipped])
            return self._give_up(_as_handler_error(error))
        self._start = Start(self._settings, began_ns, steps, [*skipped, *left_out])
        return self._try_next()

    def _try_next(self) -> None:
        start = self._start
        assert start is not None
        step = start.next_step()
        if step is None:
            return self._give_up(start.last_error or HandlerError("The function cannot be started."))
        self._gpu_is_away = self._hello_waits = False
        try:
            self._launch(step)
        except Exception as error:  # boundary: whatever a rung meets, the next one serves the same requests
            return self._rung_failed(_as_handler_error(error))
        start.launched()
        restores_quickly = step.rung is Rung.RESTORE and not self._gpu_is_away
        limit_s = _RESTORE_LIMIT_S if restores_quickly else self._settings.start_timeout_s
        self._loop.after(limit_s, lambda: self._start_took_too_long(start, step, limit_s))
        return None

    def _launch(self, step: Step) -> None:
        wanted = self._wanted
        assert wanted is not None
        if self._gpu is not None:
            self._gpu.prepare()
        if step.rung is Rung.RESTORE:
            assert step.snapshot is not None
            facts = ProcessFacts.of(step.snapshot.facts)
            self._gpu_is_away, self._keeps_addresses = bool(facts.gpu), facts.keeps_addresses
            weights = wanted.weights_of(step.snapshot)
            if weights:
                _read_ahead(weights)
            orders = self._orders(restored=True, weights=weights)
            self._model.restore(step.snapshot, self._environ, orders)
            return
        birth = Birth(
            self._settings.folder,
            wanted.device,
            step.rung,
            self._settings.body_limit_bytes,
            weights=step.weights,
            keeps_addresses=self._gpu is None or keeps_addresses(self._settings.gpu_capabilities),
        )
        self._keeps_addresses = self._gpu is not None and bool(step.weights) and birth.keeps_addresses
        if step.weights:
            _read_ahead(step.weights)
        self._caches.bring(wanted)
        environment = launch.model_environment(self._environ, wanted.shared, birth, self._caches.folder)
        self._model.start(wanted.python, environment, self._orders(restored=False))

    def _orders(self, *, restored: bool, weights: str = "") -> Orders:
        settings = self._settings
        return Orders(
            channel=self._channel_path,
            restored=restored,
            weights=weights,
            environment={**self._caches.variables, **user_environment(self._environ)},
            secrets_dir=settings.secrets_dir,
            hostname=self._environ.get("HOSTNAME", settings.replica),
            in_flight=settings.in_flight,
            queue=settings.queue,
            exec_timeout_s=settings.exec_timeout_s,
            drain_timeout_s=settings.write_timeout_s,
            ready_path=settings.ready_path,
            log_call_id=settings.log_call_id,
        )

    def _on_status(self, line: dict[str, Any]) -> None:
        if self._start is None:
            return
        if line["kind"] == Status.PHASE.value:
            self._start.reported(PhaseName(line["name"]), line["start_ns"], line["end_ns"])
        elif line["kind"] == Status.FAILED.value:
            self._start.last_error = error_of(line)
        elif line["kind"] == Status.WOKE.value:
            self._start.woke()

    def _meet_model(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        # One of a rung that was given up may have connected just before it was killed: what it is given is lost.
        is_ours = peer_pid(connection) == self._model.pid
        if not is_ours or self._model.channel is not None or self._state is not State.STARTING:
            connection.close()
            return
        channel = Channel(connection)
        self._model.meet(channel, lambda: self._hear(channel))

    def _start_took_too_long(self, start: Start, step: Step, limit_s: float) -> None:
        if self._start is start and start.step is step and self._state is State.STARTING:
            self._rung_failed(
                Timeout(
                    f"The function was not up after {limit_s:g} s ({step.rung.value}).",
                    hint="Raise limits.start_timeout, or see what `load` waits for: gpufn logs NAME",
                    code="start-timeout",
                )
            )

    def _rung_failed(self, error: AdapterError) -> None:
        start = self._start
        assert start is not None
        self._model.drop()
        start.failed(error)
        self._metrics.count_skipped(start.rung.value, error.code)
        if start.rung is Rung.RESUME:
            return self._restart(error, tuple(start.skipped))
        step, store = start.step, self._wanted.store if self._wanted else None
        if step is not None and step.snapshot is not None and store is not None and error.code not in _NOT_ITS_FAULT:
            store.remove(step.snapshot)  # it failed once; a new one is taken from the next warm start
        return self._try_next()

    def _give_up(self, error: AdapterError) -> None:
        start = self._start
        assert start is not None
        self._failures += 1
        self._retry_at = time.monotonic() + _backoff_s(self._failures)
        self._failure = error
        self._state = State.FAILED
        start.held = len(self._front.held)
        record = start.record(error)
        self._front.refuse_held(self._failed_error())
        self._metrics.count_start(record, ok=False)
        reason = f"{error.message} {error.why}".strip()
        self._say(EventName.FAILED, code=error.code, reason=reason, record=record.to_json())
        if self._draining_wanted:
            self._drained()

    # Serving ------------------------------------------------------------------------------------

    def _hear(self, channel: Channel) -> None:
        message, descriptors = channel.receive()
        op = message.get("op")
        if op is None:
            self._loop.forget(channel.fileno())
            return
        if op == "hello":
            self._hello_waits = self._gpu_is_away
            if not self._gpu_is_away:
                self._hand_over()
        elif op == "serving":
            self._now_serving()
        elif op == "answered":
            self._start_is_over(answered=True)
        elif op == "connections":
            for descriptor in descriptors:
                self._front.adopt(socket.socket(fileno=descriptor))
        elif op == "parked":
            self._now_idle()
        elif op == "busy":
            self._park_later()
        elif op == "stats":
            self._metrics.answer_scrapes(message["requests"], message["in_flight"], message["busy_ns"])
        elif op in ("stuck", "wrong"):
            self._replace_model(op, str(message.get("reason", "")))

    def _hand_over(self) -> None:
        """Give the model process the port and every connection that waits here."""
        channel = self._model.channel
        assert channel is not None
        assert self._start is not None
        self._front.accept_here(False)
        self._start.held = len(self._front.held)
        waiting = self._front.take_all()
        descriptors = [self._front.listener.fileno(), *(sock.fileno() for sock in waiting)]
        for at in range(0, len(descriptors), MAX_DESCRIPTORS):
            batch = descriptors[at : at + MAX_DESCRIPTORS]
            channel.send({"op": "serve", "listener": at == 0}, batch)
        for sock in waiting:
            sock.close()

    def _now_serving(self) -> None:
        start = self._start
        assert start is not None
        self._state = State.SERVING
        self._failure = None
        start.handed_over()
        self._say(EventName.SERVING, rung=start.rung.value)
        if self._draining_wanted:
            self._model.say("closing")
        if not start.held:
            self._start_is_over(answered=False)
        if self._draining_wanted:
            self._drain_model()

    def _start_is_over(self, *, answered: bool) -> None:
        start = self._start
        if start is None or self._state not in (State.SERVING, State.DRAINING):
            return
        if answered:
            self._failures = 0
            start.answered()
        record = start.record()
        self._start = None
        self._metrics.count_start(record, ok=True)
        self._say(EventName.STARTED, record=record.to_json())
        if record.rung is not Rung.RESUME:
            self._consider_snapshots(record.rung)

    def _replace_model(self, op: str, reason: str) -> None:
        """Its threads all hang, or it answers its examples wrongly after a restore: start anew without it."""
        wanted = self._wanted
        if op == "wrong" and wanted is not None and wanted.store is not None:
            with suppress(AdapterError, OSError):
                wanted.store.remove(wanted.find(PROCESS))
        error = HandlerError(
            "The model process was replaced.",
            why=reason,
            code="stuck" if op == "stuck" else "wrong-answer",
        )
        print(f"gpufn: {error.message} {error.why}", file=sys.stderr, flush=True)
        self._model.drop()
        self._restart(error)

    # Parking ------------------------------------------------------------------------------------

    def _begin_park(self) -> None:
        if self._park_asked or not self._can_park:
            return
        refusal = None
        if self._gpu is not None:
            refusal = why_not_park(self._settings.gpu_capabilities, keeps_addresses=self._keeps_addresses)
        if refusal is not None:
            self._can_park = False
            self._count_not_parked(refusal)
            return
        self._park_asked = True
        self._try_to_park(_PARK_TRIES)

    def _count_not_parked(self, error: GpuError) -> None:
        print(f"gpufn: {error.message} {error.why}", file=sys.stderr, flush=True)
        self._metrics.count_skipped(Rung.RESUME.value, error.code)

    def _try_to_park(self, tries: int) -> None:
        """Whoever asks has seen the last answer, which this process and the model's may still be counting."""
        self._park_tries = tries
        if self._state is not State.SERVING or not tries:
            self._park_asked = False
        elif self._start is not None:
            self._park_later()
        else:
            self._model.say("park")

    def _park_later(self) -> None:
        self._loop.after(_PARK_AGAIN_S, lambda: self._try_to_park(self._park_tries - 1))

    def _now_idle(self) -> None:
        """The model process has given back what it had: requests are held from now on."""
        self._park_asked = False
        if self._state is not State.SERVING:
            return None
        self._state = State.PARKING
        self._front.accept_here(True)
        if self._gpu is None:
            return self._now_parked()
        self._gpu_of_parked = visible_device(self._environ)
        return self._gpu.ask(Operation.PARK, self._model.pid, self._gpu_parked)

    def _gpu_parked(self, said: Answer) -> None:
        if self._state is not State.PARKING:
            return
        if said.error is not None:
            self._park_failed(said.error, lost=said.committed)
        elif self._snapshots_due and not self._front.held:
            self._start_snapshotter()  # its GPU memory is free for the process that is dumped
        else:
            self._now_parked()

    def _now_parked(self) -> None:
        self._model.signal(signal.SIGSTOP)
        self._state = State.PARKED
        self._say(EventName.PARKED)
        if self._front.held:
            self._on_held()

    def _park_failed(self, error: GpuError, *, lost: bool) -> None:
        self._count_not_parked(error)
        skipped = SkippedRung(Rung.RESUME, error.code, f"It was not parked: {error.message} {error.why}")
        if lost and not self._front.held:
            self._say(EventName.MODEL_EXITED, code=error.code, reason=skipped.reason)
            return self._drained()  # nobody waits: the next start is a clean one
        if lost:
            self._model.drop()
            return self._restart(error, (skipped,))
        self._can_park = error.code != "gpu-checkpoint-unsupported"
        return self._woken(self._begin_resume([skipped]))

    def _resume(self) -> None:
        start = self._begin_resume([])
        if self._gpu is None:
            return self._woken(start)
        self._gpu_is_away = True
        return self._bring_gpu_back(start, self._gpu_of_parked)

    def _begin_resume(self, skipped: list[SkippedRung]) -> Start:
        start = self._start = Start(self._settings, time.monotonic_ns(), [Step(Rung.RESUME)], skipped)
        start.next_step()
        self._state = State.STARTING
        self._model.signal(signal.SIGCONT)
        start.launched()
        return start

    def _woken(self, start: Start) -> None:
        start.woke()
        self._hand_over()
        step = start.step
        assert step is not None
        self._loop.after(_RESTORE_LIMIT_S, lambda: self._start_took_too_long(start, step, _RESTORE_LIMIT_S))

    def _bring_gpu_back(self, start: Start, was_on: str) -> None:
        """The driver's part of waking a process that was parked, or dumped while it was."""
        assert self._gpu is not None
        now_on = visible_device(self._environ)
        mapping = {was_on: now_on} if was_on.startswith("GPU-") and now_on and was_on != now_on else {}
        self._gpu.ask(Operation.RESUME, self._model.pid, lambda said: self._gpu_back(start, said), mapping=mapping)

    def _gpu_back(self, start: Start, said: Answer) -> None:
        if self._start is not start or self._state is not State.STARTING or not self._gpu_is_away:
            return
        assert self._gpu is not None
        start.skipped += [SkippedRung(Rung.RESUME, e.code, f"{e.message} {e.why}") for e in self._gpu.take_overcome()]
        for step in said.steps:
            start.add(PhaseName.CUDA_RESTORE, step.started_ns, step.ended_ns)
        if said.error is not None:
            self._rung_failed(said.error)
            return
        self._gpu_is_away = False
        if start.rung is Rung.RESUME:
            self._woken(start)
        elif self._hello_waits:
            self._hand_over()

    # Snapshots ----------------------------------------------------------------------------------

    def _consider_snapshots(self, rung: Rung) -> None:
        """In the background, once a life, where a faster start next time can be had.

        A host that takes them knows when there is room for a second process. On a GPU we do it when this replica is
        parked: before, that process would take memory that nobody granted.
        """
        wanted = self._wanted
        if wanted is None or self._snapshotter.tried or self._state is not State.SERVING:
            return
        if rung is Rung.RESTORE or not (wanted.lacks_snapshots(rung) or self._caches.are_new(wanted)):
            return
        if self._settings.snapshot_by == "host":
            self._snapshotter.tried = True
            self._say(EventName.SNAPSHOT, state="due", **NO_NEWS)
            return
        self._snapshots_due = True
        if self._gpu is None:
            self._start_snapshotter()

    def _start_snapshotter(self) -> None:
        self._snapshots_due = False
        own = {"GPUFN_RUNTIME_DIR": str(self._runtime_dir)}
        if self._gpu is not None:
            own["GPUFN_GPU_HELPER"] = self._gpu.path
        try:
            self._snapshotter.start({**self._environ, **own})
        except OSError as error:  # no process or descriptor left for it: serving goes on
            return self._snapshot_is_over({**NO_NEWS, "state": "failed", "code": "os-error", "reason": str(error)})
        return self._say(EventName.SNAPSHOT, state="building", **NO_NEWS)

    def _snapshotter_ended(self) -> None:
        self._snapshot_is_over(self._snapshotter.ended())

    def _snapshot_is_over(self, news: dict[str, Any]) -> None:
        self._metrics.count_snapshot(str(news["state"]))
        self._say(EventName.SNAPSHOT, **news)
        self._park_once_alone()

    def _park_once_alone(self) -> None:
        """Who hears that we are parked gives the GPU to others, and to us when we wake: nobody may hold it then."""
        if self._state is State.PARKING and self._snapshotter.is_gone:
            self._now_parked()

    # The model process's end --------------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._snapshotter.pid:
                self._snapshotter_ended()
            elif self._model.is_restorer(pid):
                self._restorer_ended(status)
            elif pid == self._model.pid:
                self._model_ended(os.waitstatus_to_exitcode(status))

    def _restorer_ended(self, status: int) -> None:
        if self._state is not State.STARTING or self._start is None:
            return
        if status == 0 and self._gpu_is_away:
            step = self._start.step
            assert step is not None
            assert step.snapshot is not None
            self._bring_gpu_back(self._start, ProcessFacts.of(step.snapshot.facts).gpu)
        elif status != 0 and self._model.channel is None:
            self._restore_failed(status)

    def _restore_failed(self, status: int) -> None:
        why = self._model.restorer_said()
        self._rung_failed(
            SnapshotError(
                "CRIU could not restore the process.",
                why=why or f"It ended with code {os.waitstatus_to_exitcode(status)}.",
                code="restore-failed",
            )
        )

    def _model_ended(self, code: int) -> None:
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        self._model.ended()
        if self._state is State.DRAINING:
            self._state = State.GONE
        elif self._state in (State.PARKING, State.PARKED) and self._gpu is not None:
            self._say(EventName.MODEL_EXITED, code="model-exited", reason=f"It was parked, and ended {how}.")
            self._drained()  # a start would take GPU memory that this replica has given back
        elif self._state is State.STARTING and self._start is not None and self._start.rung is not Rung.RESUME:
            self._model.read_status()
            said = self._start.last_error
            ended = HandlerError(
                "The function ended while it started.", why=f"Its process ended {how}.", code="handler-exited"
            )
            self._start.last_error = None
            self._rung_failed(said or ended)
        else:
            self._model.drop()
            self._restart(HandlerError("The function's process ended.", why=f"It ended {how}.", code="model-exited"))

    def _restart(self, error: AdapterError, skipped: tuple[SkippedRung, ...] = ()) -> None:
        """At once the first time; behind a back-off where nothing was answered since the last time."""
        self._metrics.count_exit(error.code)
        self._say(EventName.MODEL_EXITED, code=error.code, reason=error.why)
        self._front.accept_here(True)
        self._start = None
        self._park_asked = False  # whom it was asked of is gone
        self._failures += 1
        if self._failures == 1:
            return self._begin_start(time.monotonic_ns(), skipped)
        self._state = State.FAILED
        self._failure = error
        self._retry_at = time.monotonic() + _backoff_s(self._failures)
        return None

    # Draining -----------------------------------------------------------------------------------

    def _begin_drain(self, *, linger: bool) -> None:
        """`linger`: clients may not know yet, so that a request may still come on a kept connection."""
        if self._draining_wanted:
            return
        self._draining_wanted = True
        self._lingers = linger
        self._lock_file.remove()
        if self._state is State.SERVING:
            self._model.say("closing")
        self._snapshotter.kill()
        grace_s = self._settings.healthcheck_interval_s + self._settings.write_timeout_s
        self._loop.after(grace_s, self._drained)
        if self._state is State.STARTING and self._front.held:
            return  # those were promised an answer: they get it, then the drain goes on
        self._loop.after(self._settings.healthcheck_interval_s, self._drain_model)

    def _drain_model(self) -> None:
        was, self._state = self._state, State.DRAINING
        if was is not State.SERVING or not self._model.say("drain", linger=self._lingers):
            self._drained()

    def _drained(self) -> None:
        if self._state is State.GONE:
            return
        self._front.refuse_held(Unavailable("This replica is shutting down.", code="draining", retry_after_s=1))
        self._model.drop()
        if self._gpu is not None:
            self._gpu.close()
        self._lock_file.remove()
        self._front.close()
        self._state = State.GONE


def _read_ahead(weights: str) -> None:
    """The disk brings the weights while the interpreter, or CRIU, brings the rest."""
    from adapter.snapshot.weights import read_ahead

    read_ahead(Path(weights))


def _as_handler_error(error: BaseException) -> AdapterError:
    if isinstance(error, AdapterError):
        return error
    return HandlerError("The function cannot be started.", why=f"{error}.", code=_NOT_LAUNCHED)


def _backoff_s(failures: int) -> float:
    return _BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1]
