"""What is asked of the GPU helper and what it answers: one JSON object a message, over SOCK_SEQPACKET.

The process that is meant comes with the request as a pidfd (SCM_RIGHTS), not as a number: it means the same
process in every pid namespace, and never a later one that got the same number.
"""

from __future__ import annotations

import array
import json
import os
import socket
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from adapter.errors import ConfigError, GpuError

_MESSAGE_BYTES = 16 * 1024
_MAX_DESCRIPTORS = 8
"""More than the one that is meant, so that the rest can be closed."""


class State(str, Enum):
    """Of a process that uses CUDA. Restoring leads to `LOCKED`; only unlocking lets it run."""

    RUNNING = "running"
    LOCKED = "locked"
    """Its calls wait; all that was submitted is done."""
    CHECKPOINTED = "checkpointed"
    """Its GPU memory is in host memory, and it holds no GPU."""
    FAILED = "failed"
    """Lost: it must be killed."""
    CHECKPOINTING = "checkpointing"
    RESTORING = "restoring"


class Operation(str, Enum):
    STATE = "state"
    PARK = "park"
    """Lock and checkpoint: the process keeps all but its GPU memory, and its CUDA calls wait."""
    RESUME = "resume"
    """Restore and unlock, or what of it is still to do."""
    UNLOCK = "unlock"


@dataclass(frozen=True, slots=True)
class Request:
    """`mapping`: UUIDs of GPUs, old to new, for `RESUME` elsewhere."""

    number: int
    operation: Operation
    lock_timeout_s: float
    mapping: dict[str, str] = field(default_factory=dict)

    def to_message(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_message(cls, data: bytes) -> Request:
        """Raises `ConfigError` for anything that `to_message` does not make."""
        try:
            message: dict[str, Any] = json.loads(data)
            number, timeout_s, mapping = message["number"], message["lock_timeout_s"], message["mapping"]
            operation = Operation(message["operation"])
        except (ValueError, KeyError, TypeError) as exc:
            raise ConfigError(f"The GPU helper does not understand this: {exc}.", code="bad-request") from exc
        if (
            type(number) is not int
            or type(timeout_s) not in {int, float}
            or not 0 < timeout_s < 3600
            or not isinstance(mapping, dict)
            or not all(isinstance(uuid, str) for pair in mapping.items() for uuid in pair)
        ):
            raise ConfigError("The GPU helper was asked with values of the wrong kind.", code="bad-request")
        return cls(number, operation, float(timeout_s), mapping)


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the driver; instants of CLOCK_MONOTONIC."""

    name: str
    started_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class Answer:
    """`found` and `reached`: states before and after, None where they could not be known.

    With an `error`, `committed` says whether the point of no return was passed. If not, the process is as it
    was before: running, or still parked. If it was, the process is lost and must be killed.
    """

    number: int
    found: State | None = None
    reached: State | None = None
    steps: tuple[Step, ...] = ()
    error: GpuError | None = None
    committed: bool = False

    def to_message(self) -> bytes:
        error = self.error
        message: dict[str, Any] = {
            "number": self.number,
            "found": self.found,
            "reached": self.reached,
            "steps": [asdict(step) for step in self.steps],
            "error": error and {"code": error.code, "message": error.message, "why": error.why, "hint": error.hint},
            "committed": self.committed,
        }
        return json.dumps(message).encode()

    @classmethod
    def from_message(cls, data: bytes) -> Answer:
        message = json.loads(data)
        error = message["error"]
        return cls(
            number=message["number"],
            found=State(message["found"]) if message["found"] else None,
            reached=State(message["reached"]) if message["reached"] else None,
            steps=tuple(Step(**step) for step in message["steps"]),
            error=GpuError(error.pop("message"), **error) if error else None,
            committed=message["committed"],
        )


def send(sock: socket.socket, data: bytes, pidfd: int | None = None) -> None:
    """Raises `OSError`, `BlockingIOError` included: an end that does not read is not waited for."""
    rights = [] if pidfd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))]
    sock.sendmsg([data], rights, socket.MSG_DONTWAIT)  # socket.send_fds forgets its flags


def receive(sock: socket.socket) -> tuple[bytes, int | None]:
    """The next message and what came with it, for the caller to close; ``(b"", None)`` at the end.

    Raises `BlockingIOError` where there is none yet.
    """
    try:
        data, descriptors, flags, _ = socket.recv_fds(sock, _MESSAGE_BYTES, _MAX_DESCRIPTORS, socket.MSG_DONTWAIT)
    except BlockingIOError:
        raise
    except OSError:
        return b"", None
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    for descriptor in descriptors[:1]:
        os.set_inheritable(descriptor, False)
    return (b"{}" if flags & socket.MSG_TRUNC else data), (descriptors[0] if descriptors else None)


def listen(path: str) -> socket.socket:
    """A listening socket at `path` (at most 107 bytes) that only this user can connect to. Raises `OSError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    old = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(old)
    sock.listen(16)
    return sock
