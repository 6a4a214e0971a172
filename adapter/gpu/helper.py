"""The one process that holds the initialised CUDA driver and checkpoints others through it.

    python -m adapter.gpu.helper --listen PATH|DESCRIPTOR --owner DESCRIPTOR

Kept apart because a driver takes seconds to initialise, and because it can hang: whoever asks has a time limit
of its own (`client`) and may kill this. It ends when nobody holds the other end of `--owner` any more.

Each request has a thread. Those for one process take turns; one that hangs in the driver stops no other, since
the bindings let go of the interpreter during a call.
"""

from __future__ import annotations

import argparse
import logging
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol

from adapter import logs
from adapter.errors import AdapterError, GpuError
from adapter.gpu.checkpoint import Driver
from adapter.gpu.wire import Answer, Operation, Request, State, Step, listen, receive, send

logger = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

_MASK = "CUDA_VISIBLE_DEVICES"
"""Hides GPUs from us that a process to be restored may be on, and renumbers the rest."""


class Checkpoints(Protocol):
    """What is needed of `Driver`."""

    def state(self, pid: int) -> State: ...
    def lock(self, pid: int, timeout_s: float) -> None: ...
    def checkpoint(self, pid: int) -> None: ...
    def restore(self, pid: int, mapping: Mapping[str, str] | None = None) -> None: ...
    def unlock(self, pid: int) -> None: ...


class Target:
    """The process that a request is about, by its pidfd."""

    def __init__(self, pidfd: int | None) -> None:
        self._pidfd = pidfd

    def pid(self) -> int:
        """Its id in our pid namespace, as long as it has one. Raises `GpuError`."""
        if self._pidfd is None:
            raise GpuError("The request named no process.", hint="Send its pidfd with it.", code="gpu-no-target")
        with open(f"/proc/self/fdinfo/{self._pidfd}") as file:
            found = [int(line.split()[1]) for line in file if line.startswith("Pid:")]
        if not found:
            raise GpuError("What came with the request is no pidfd.", code="gpu-no-target")
        if found[0] == 0:
            raise GpuError(
                "The process cannot be seen from here.",
                why="It is in a pid namespace that is not below the GPU helper's.",
                hint="Run the helper outside the process's pid namespace, not in one beside it.",
                code="gpu-no-target",
            )
        if found[0] < 0:
            raise GpuError("The process has ended.", code="gpu-target-ended")
        return found[0]


class Deed:
    """One request as it is carried out: the steps, and what is known of the process's state."""

    def __init__(self, driver: Checkpoints, target: Target, request: Request) -> None:
        self._driver = driver
        self._target = target
        self._request = request
        self._steps: list[Step] = []
        self._found: State | None = None
        self._reached: State | None = None

    def answer(self) -> Answer:
        error = None
        try:
            self._found = self._reached = self._driver.state(self._target.pid())
            match self._request.operation:
                case Operation.PARK:
                    self._park()
                case Operation.RESUME:
                    self._resume()
                case Operation.UNLOCK:
                    self._unlock()
                case Operation.STATE:
                    pass
        except GpuError as exc:
            error = exc
            if self._found is not None and self._steps:
                self._look_again()
        return Answer(
            self._request.number,
            self._found,
            self._reached,
            tuple(self._steps),
            error,
            error is not None and self._is_lost(),
        )

    def _park(self) -> None:
        if self._reached is State.CHECKPOINTED:
            return
        self._refuse_unless(State.RUNNING, State.LOCKED)
        try:
            if self._reached is State.RUNNING:  # a helper that was killed may have left it locked
                self._step("lock", State.LOCKED, lambda pid: self._driver.lock(pid, self._request.lock_timeout_s))
            self._step("checkpoint", State.CHECKPOINTED, self._driver.checkpoint)
        except GpuError:
            self._look_again()
            if self._reached is State.LOCKED:  # the driver's word that nothing was moved yet
                with suppress(GpuError):
                    self._unlock()
            raise

    def _resume(self) -> None:
        if self._reached is State.RUNNING:
            return
        self._refuse_unless(State.CHECKPOINTED, State.LOCKED)
        if self._reached is State.CHECKPOINTED:  # CRIU's own plugin may have restored it
            self._step("restore", State.LOCKED, lambda pid: self._driver.restore(pid, self._request.mapping or None))
        self._unlock()

    def _unlock(self) -> None:
        if self._reached is State.RUNNING:
            return
        self._refuse_unless(State.LOCKED)
        self._step("unlock", State.RUNNING, self._driver.unlock)

    def _refuse_unless(self, *states: State) -> None:
        if self._reached not in states:
            raise GpuError(
                f"A process that is {self._reached and self._reached.value} cannot be told to {self._request.operation.value}.",
                why=f"That goes from: {', '.join(state.value for state in states)}.",
                hint="One that failed must be killed." if self._reached is State.FAILED else "Ask for its state first.",
                code="gpu-wrong-state",
            )

    def _step(self, name: str, reached: State, call: Callable[[int], None]) -> None:
        pid = self._target.pid()
        started_ns = time.monotonic_ns()
        try:
            call(pid)
        finally:
            self._steps.append(Step(name, started_ns, time.monotonic_ns()))
        self._reached = reached

    def _look_again(self) -> None:
        """After a failed step only the driver knows."""
        try:
            self._reached = self._driver.state(self._target.pid())
        except GpuError:
            self._reached = None

    def _is_lost(self) -> bool:
        """Whether the process is neither as it was found, unharmed, nor running. Nothing done, nothing lost."""
        if self._reached is State.RUNNING or self._found is None:
            return False
        if not self._steps:
            return self._found is State.FAILED
        return not (self._found is self._reached is State.CHECKPOINTED)


class Turns:
    """One at a time for each key."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken: set[int] = set()

    @contextmanager
    def of(self, key: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: key not in self._taken)
            self._taken.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._taken.discard(key)
                self._changed.notify_all()


class Helper:
    """Serves until its owner is gone."""

    def __init__(self, listener: socket.socket, owner_fd: int, initialise: Callable[[], Checkpoints] = Driver) -> None:
        self._listener = listener
        self._owner_fd = owner_fd
        self._initialise = initialise
        self._initialising = threading.Lock()
        self._driver: Checkpoints | None = None
        self._turns = Turns()
        self._selector = selectors.DefaultSelector()

    def serve(self) -> None:
        """Returns once the owner is gone, whatever is still going on: end the process then."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._owner_fd, selectors.EVENT_READ)
        _thread(self._prepare)
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                key.data()

    def _prepare(self) -> None:
        """Initialise now rather than at the first request, which would wait; its error is for that request."""
        with suppress(GpuError):
            self._initialised()

    def _initialised(self) -> Checkpoints:
        with self._initialising:
            if self._driver is None:
                self._driver = self._initialise()
            return self._driver

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in {0, os.geteuid()}:
            logger.warning("connection refused", extra={"fields": {"uid": uid}})
            connection.close()
            return
        self._selector.register(connection, selectors.EVENT_READ, partial(self._read, connection))

    def _read(self, connection: socket.socket) -> None:
        try:
            data, pidfd = receive(connection)
        except BlockingIOError:
            return
        if not data:
            self._drop(connection)
            return
        try:
            request = Request.from_message(data)
        except AdapterError as exc:
            logger.warning("request refused", extra={"fields": {"reason": exc.message}})
            self._drop(connection)
            if pidfd is not None:
                os.close(pidfd)
            return
        _thread(self._answer, connection, request, pidfd)

    def _drop(self, connection: socket.socket) -> None:
        """The descriptor itself stays until nobody has the socket any more: a thread may be about to answer."""
        self._selector.unregister(connection)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, connection: socket.socket, request: Request, pidfd: int | None) -> None:
        try:
            answer = self._carry_out(request, Target(pidfd))
        except Exception as exc:
            logger.exception("request failed")
            answer = Answer(
                request.number,
                error=GpuError("The GPU helper failed.", why=f"{type(exc).__name__}: {exc}", code="helper-failed"),
                committed=request.operation is not Operation.STATE,
            )
        finally:
            if pidfd is not None:
                os.close(pidfd)
        with suppress(OSError):  # nobody waits for it any more
            send(connection, answer.to_message())

    def _carry_out(self, request: Request, target: Target) -> Answer:
        try:
            driver = self._initialised()
            pid = target.pid()
        except GpuError as exc:
            return Answer(request.number, error=exc)
        with self._turns.of(pid):
            return Deed(driver, target, request).answer()


def _thread(work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m adapter.gpu.helper", description="Checkpoints GPU processes.")
    parser.add_argument("--listen", required=True, metavar="PATH|DESCRIPTOR")
    parser.add_argument("--owner", required=True, type=int, metavar="DESCRIPTOR", help="its end ends this process")
    arguments = parser.parse_args()
    logs.setup()
    os.environ.pop(_MASK, None)
    place: str = arguments.listen
    listener = socket.socket(fileno=int(place)) if place.isdigit() else listen(place)
    listener.setblocking(False)
    Helper(listener, arguments.owner).serve()
    sys.stderr.flush()
    os._exit(0)  # threads may hang in the driver


if __name__ == "__main__":
    sys.exit(main())
