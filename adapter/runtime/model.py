"""The model process: user code, warm, with no socket until the entrypoint hands it some.

    birth ─▶ import ─▶ load (or build + weight snapshot) ─▶ examples ─▶ SNAPSHOT POINT ─▶ orders ─▶ serve

A plain start runs from left to right; a process snapshot is taken at the snapshot point; a restored
process wakes there. So both serve through the very same code. Descriptors: 0 orders, 1 and 2 the
function's output, 3 status lines.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError, HandlerError
from adapter.records import PhaseName
from adapter.runtime.app import Watched
from adapter.runtime.channel import MAX_DESCRIPTORS, Channel
from adapter.runtime.examples import Example, load_examples
from adapter.runtime.handler import Handler, import_handler, make_app, user_code
from adapter.runtime.orders import BIRTH_VARIABLE, Birth, Orders, Status, phase, report, report_error
from adapter.runtime.reseed import reseed
from adapter.runtime.worker import Gunicorn, ModelWorker


def main() -> int:
    """Exit code 0 after a drain, 1 when the handler failed (said on the status descriptor)."""
    birth = Birth.from_variable(os.environ.pop(BIRTH_VARIABLE))
    try:
        handler, app, examples, gunicorn = prepare(birth)
    except AdapterError as error:
        report_error(error)
        return 1
    report(Status.SNAPSHOT_POINT)
    orders = Orders.read()
    if orders is None:
        return 0
    report(Status.WOKE)
    try:
        return serve(orders, handler, app, gunicorn, examples)
    except AdapterError as error:
        report_error(error)
        return 1


def prepare(birth: Birth) -> tuple[Handler, Any, list[Example], Gunicorn]:
    """Everything before the snapshot point. Raises `HandlerError`, `SnapshotError`."""
    folder = Path(birth.folder)
    with phase(PhaseName.IMPORT):
        handler = import_handler(folder)
    with phase(PhaseName.LOAD):
        handler.context.model = _make_model(handler, birth)
    with phase(PhaseName.WARMUP):  # the app, with Flask's import, included
        app = make_app(handler, birth.body_limit_bytes)
        gunicorn = Gunicorn()
        examples = load_examples(folder)
        _warm_up(app, examples, strict=birth.for_snapshot)
    if birth.save_weights:
        from adapter.snapshot import weights

        weights.save(handler.context.model, Path(birth.save_weights))
    if birth.for_snapshot:
        handler.call_hook("before_snapshot")
        if birth.weights and birth.device.startswith("cuda"):
            from adapter.snapshot import weights

            weights.release(handler.context.model, Path(birth.weights))
        reseed()  # its first time imports and looks up what later times need not
        gc.collect()
        gc.freeze()  # what is here now stays: later collections need not touch (and unshare) its pages
    return handler, app, examples, gunicorn


def _make_model(handler: Handler, birth: Birth) -> Any:
    if birth.weights:
        from adapter.snapshot import weights

        model = handler.make("build", birth.device)
        weights.fill(model, Path(birth.weights), birth.device, keeps_addresses=birth.keeps_addresses)
        return model
    return handler.make("load", birth.device) if handler.shape.has_load else None


def _warm_up(app: Any, examples: list[Example], *, strict: bool) -> None:
    """Ask each example. A changed answer is said in the log; where the process will be kept, it is an error."""
    for example in examples:
        difference = ask(app, example)
        if not difference:
            continue
        print(
            f"gpufn: example {example.name} has another answer than expected: {difference}", file=sys.stderr, flush=True
        )
        if strict:
            raise HandlerError(
                f"Example {example.name} has another answer than expected.",
                why=f"{difference}.",
                hint=f"Mend the handler, or the expected answer in examples/{example.name}.json.",
                code="example-changed",
            )


def ask(app: Any, example: Example) -> str:
    """What differs from the expected answer; empty when nothing does. Goes through the whole app."""
    with user_code(f"example {example.name}"):
        response = app.test_client().open(
            example.path, method=example.method, headers=example.headers, data=example.body
        )
        return example.check(response.status_code, dict(response.headers), response.get_data())


def serve(orders: Orders, handler: Handler, app: Any, gunicorn: Gunicorn, examples: list[Example]) -> int:
    """Everything after the snapshot point; returns when drained."""
    os.environ.update(orders.environment)
    handler.context.hostname = orders.hostname
    handler.context.secrets_dir = orders.secrets_dir
    if orders.restored:
        reseed()
        if orders.weights:
            from adapter.snapshot import weights

            with phase(PhaseName.WEIGHTS):
                weights.refill(handler.context.model, Path(orders.weights))
        handler.call_hook("after_restore")
    channel = Channel.connect(orders.channel)
    return Session(channel, orders, app, gunicorn, examples if orders.restored else []).run()


class Session:
    """One conversation with the entrypoint, from hello to drain.

    `to_check` are examples to ask once more: after the first answer, so that nobody waits for them, in a
    thread of the worker, so that no more than `in_flight` calls of the handler ever run.
    """

    def __init__(self, channel: Channel, orders: Orders, app: Any, gunicorn: Gunicorn, to_check: list[Example]) -> None:
        self._channel = channel
        self._app = app
        self._to_check = to_check
        self._answered = False
        self._watched = Watched(
            app,
            ready_path=orders.ready_path,
            log_call_id=orders.log_call_id,
            on_answering=self._on_answering,
            on_answered=self._on_answered,
            on_timeout=lambda sock, timeout_s: self._worker.shorten(sock, timeout_s),  # noqa: PLW0108
            was_ended=lambda sock: self._worker.was_ended(sock),  # noqa: PLW0108
        )
        self._worker = ModelWorker(
            gunicorn,
            self._watched,
            threads=orders.in_flight,
            queue=orders.queue,
            exec_timeout_s=orders.exec_timeout_s,
            drain_timeout_s=orders.drain_timeout_s,
            on_stuck=lambda reason: self._say("stuck", reason=reason),
            on_refused=lambda method: self._watched.stats.add(method, "429", 0.0),
        )

    def run(self) -> int:
        self._worker.watch(self._channel.fileno(), self._hear)
        self._say("hello")
        self._worker.init_process()
        self._say("drained")
        return 0

    def _say(self, op: str, **fields: Any) -> None:
        self._channel.send({"op": op, **fields})

    def _on_answering(self, sock: Any, length_is_known: bool) -> None:
        self._worker.answering.add(sock)
        if length_is_known:
            self._worker.ending.add(sock)

    def _on_answered(self) -> None:
        """The first answer after a handover ends the start record; a race of threads only repeats it."""
        if not self._answered:
            self._answered = True
            self._say("answered")
            self._check_soon()

    def _check_soon(self) -> None:
        examples, self._to_check = self._to_check, []
        if examples:
            self._worker.tpool.submit(self._check, examples)

    def _check(self, examples: list[Example]) -> None:
        """Ask the examples of a restored process; one wrong answer and the entrypoint replaces it."""
        for example in examples:
            try:
                difference = ask(self._app, example)
            except HandlerError as error:
                difference = error.why
            if difference:
                self._say("wrong", reason=f"Example {example.name} after the restore: {difference}.")
                return

    def _hear(self) -> None:
        message, descriptors = self._channel.receive()
        op = message.get("op")
        if op == "serve":
            self._serve(descriptors, with_listener=bool(message.get("listener")))
        elif op == "park":
            self._park()
        elif op == "stats":
            stats = self._watched.stats
            self._say("stats", requests=stats.to_json(), in_flight=self._worker.busy, busy_ns=stats.busy_ns)
        elif op == "closing":
            self._watched.closing = self._worker.closing = True
        elif op == "drain":
            self._worker.stop(linger=bool(message.get("linger")))
        elif op is None:  # the entrypoint is gone, and with it whoever could be answered
            os._exit(1)

    def _serve(self, descriptors: list[int], *, with_listener: bool) -> None:
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        if with_listener:
            self._answered = False
            self._say("serving")  # before any thread has a request: "answered" must not overtake it
        listener = sockets.pop(0) if with_listener else None
        self._worker.serve(listener, sockets)
        if not sockets:
            self._check_soon()

    def _park(self) -> None:
        """Give back the idle connections, unless a request is in flight: then say so and go on."""
        if self._worker.in_flight:
            return self._say("busy")
        idle = self._worker.give_back()
        for at in range(0, len(idle), MAX_DESCRIPTORS):
            batch = idle[at : at + MAX_DESCRIPTORS]
            self._channel.send({"op": "connections"}, [sock.fileno() for sock in batch])
        for sock in idle:
            sock.close()
        return self._say("parked")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing to tidy up, and some libraries take their time to do it
