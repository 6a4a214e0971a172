"""Asking the GPU helper: blocking with a hard time limit, or from a loop that waits for several things.

    with start_helper(path) as helper, helper.connect() as client:
        answer = client.ask(Operation.PARK, pidfd, size_bytes=lease.bytes)

An answer is what the helper said, its errors included. That it said nothing is raised: `helper-died` and
`helper-timeout`. Then nobody knows what became of the process, and it counts as lost.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from adapter.errors import GpuError
from adapter.gpu.wire import Answer, Operation, Request, listen, receive, send

LOCK_TIMEOUT_S = 10.0
"""For GPU work that was submitted before a park to end."""

_LEAST_COPY_S = 30.0
_LEAST_BYTES_PER_S = 2e9
"""Drivers were seen to copy at 5 GB/s and more; fixed costs of a second and more."""

_START_S = 20.0
"""The first request may wait for the helper to initialise the driver."""


def time_limit_s(operation: Operation, size_bytes: int | None = None) -> float:
    """After that long the helper or the driver hangs. `size_bytes`: GPU memory of the process, where known."""
    copy_s = max(_LEAST_COPY_S, (size_bytes or 0) / _LEAST_BYTES_PER_S)
    work_s = {
        Operation.STATE: 0.0,
        Operation.UNLOCK: 0.0,
        Operation.PARK: LOCK_TIMEOUT_S + copy_s,
        Operation.RESUME: copy_s,
    }[operation]
    return _START_S + work_s


class HelperClient:
    """A connection to the helper. For one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._numbers = itertools.count(1)

    @classmethod
    def connect(cls, path: str) -> HelperClient:
        """Raises `GpuError` where no helper listens."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(path)
        except OSError as exc:
            sock.close()
            raise _died(f"Nothing listens at {path}: {exc.strerror}.") from exc
        return cls(sock)

    def fileno(self) -> int:
        """Readable when `receive` has something."""
        return self._socket.fileno()

    def send(
        self,
        operation: Operation,
        pidfd: int,
        *,
        mapping: Mapping[str, str] | None = None,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> int:
        """Ask, without waiting. Returns the number that the answer will have. Raises `GpuError`."""
        request = Request(next(self._numbers), operation, lock_timeout_s, dict(mapping or {}))
        try:
            send(self._socket, request.to_message(), pidfd)
        except OSError as exc:
            raise _died(f"It takes no request: {exc.strerror}.") from exc
        return request.number

    def receive(self) -> Answer | None:
        """The next answer, of any request; None where there is none yet. Raises `GpuError` (`helper-died`)."""
        try:
            data, _ = receive(self._socket)
        except BlockingIOError:
            return None
        if not data:
            raise _died("It closed the connection.")
        return Answer.from_message(data)

    def ask(
        self,
        operation: Operation,
        pidfd: int,
        *,
        size_bytes: int | None = None,
        mapping: Mapping[str, str] | None = None,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        limit_s: float | None = None,
    ) -> Answer:
        """Ask and wait for the answer, `limit_s` at most (`time_limit_s`). Raises `GpuError`."""
        limit_s = time_limit_s(operation, size_bytes) if limit_s is None else limit_s
        deadline = time.monotonic() + limit_s
        number = self.send(operation, pidfd, mapping=mapping, lock_timeout_s=lock_timeout_s)
        while True:
            if not _readable(self._socket, deadline):
                raise timed_out(operation, limit_s)
            answer = self.receive()
            if answer is not None and answer.number == number:  # others are of requests given up on
                return answer

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> HelperClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HelperProcess:
    """A helper that lives as long as this does, and no longer than this process."""

    def __init__(self, path: str, process: subprocess.Popen[bytes], owner_fd: int) -> None:
        self.path = path
        self.pid = process.pid
        self._process = process
        self._owner_fd = owner_fd

    def connect(self) -> HelperClient:
        return HelperClient.connect(self.path)

    def kill(self) -> None:
        """For one that hangs. Processes that it has locked stay so; the next helper can unlock them."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Ends it, hanging or not."""
        if self._owner_fd >= 0:
            os.close(self._owner_fd)
            self._owner_fd = -1
            self.kill()

    def __enter__(self) -> HelperProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_helper(path: str, *, python: str = sys.executable, environ: Mapping[str, str] | None = None) -> HelperProcess:
    """Start one that listens at `path` when this returns; it initialises the driver meanwhile.

    `python` must have cuda-bindings and find this package. Raises `OSError`.
    """
    sock = listen(path)
    owner_r, owner_w = os.pipe()
    try:
        listener = sock.fileno()
        process = subprocess.Popen(
            [python, "-m", "adapter.gpu.helper", "--listen", str(listener), "--owner", str(owner_r)],
            stdin=subprocess.DEVNULL,
            pass_fds=(listener, owner_r),
            env=None if environ is None else dict(environ),
            start_new_session=True,  # a Ctrl-C is for its owner
        )
    except BaseException:
        os.close(owner_w)
        raise
    finally:
        os.close(owner_r)
        sock.close()
    return HelperProcess(path, process, owner_w)


def timed_out(operation: Operation, limit_s: float) -> GpuError:
    """For a loop that waits for an answer itself: its time limit has passed."""
    return GpuError(
        f"The GPU helper did not {operation.value} the process in {limit_s:g} s.",
        why="The driver hangs, or the process is stopped.",
        hint="Kill the process, and the helper too if it answers nothing else.",
        code="helper-timeout",
    )


def _died(why: str) -> GpuError:
    return GpuError(
        "The GPU helper is gone.",
        why=why,
        hint="Start another one; it finds out what state the process is in. Its log says more.",
        code="helper-died",
    )


def _readable(sock: socket.socket, deadline: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
