"""What an entrypoint tells the model process it starts or restores, and what it hears back.

Two messages go in: `Birth` in an environment variable, for the part before the snapshot point, and
`Orders` as one JSON line on descriptor 0, for the part after it. Only what both kinds of replica share
is in `Birth`, since a process snapshot keeps it; secrets and the replica's environment are in `Orders`.
Out come JSON lines on descriptor 3 (`Status`).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from adapter.errors import AdapterError, HandlerError
from adapter.records import PhaseName, Rung

BIRTH_VARIABLE = "GPUFN_BIRTH"
ORDERS_FD, STATUS_FD = 0, 3
_ORDERS_LIMIT_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Birth:
    """For the part before the snapshot point. `weights` is the folder of a weight snapshot to fill from,
    `save_weights` one to write; either may be empty. `keeps_addresses`: see `adapter.snapshot.weights.fill`."""

    folder: str
    device: str
    rung: Rung
    body_limit_bytes: int
    weights: str = ""
    save_weights: str = ""
    for_snapshot: bool = False
    keeps_addresses: bool = True

    def to_variable(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_variable(cls, text: str) -> Birth:
        data = json.loads(text)
        return cls(**{**data, "rung": Rung(data["rung"])})


@dataclass(frozen=True, slots=True)
class Orders:
    """For the part after the snapshot point."""

    channel: str
    restored: bool
    weights: str
    """Folder of the weights that a restored process gave up before it was dumped; empty: it has them."""
    environment: dict[str, str] = field(repr=False)
    secrets_dir: str
    hostname: str
    in_flight: int
    queue: int
    exec_timeout_s: float
    drain_timeout_s: float
    ready_path: str
    log_call_id: bool

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls) -> Orders | None:
        """Blocks at the snapshot point until orders come; None when whoever gives them is gone."""
        line = bytearray()
        while not line.endswith(b"\n"):
            part = os.read(ORDERS_FD, 65536)
            if not part or len(line) > _ORDERS_LIMIT_BYTES:
                return None
            line += part
        return cls(**json.loads(line))


class Status(str, Enum):
    """Kinds of lines on descriptor 3."""

    PHASE = "phase"
    """Fields: `name` (PhaseName), `start_ns`, `end_ns` on the monotonic clock."""
    SNAPSHOT_POINT = "snapshot_point"
    WOKE = "woke"
    """Orders have come. When is for the reader to say: a restored process has a monotonic clock of its own,
    which goes on from the dump (a time namespace)."""
    FAILED = "failed"
    """Fields: `code`, `message`, `why`, `hint`."""


def report(kind: Status, **fields: Any) -> None:
    """Write one status line. A parent that is gone is no concern of the model's."""
    try:
        os.write(STATUS_FD, json.dumps({"kind": kind.value, **fields}).encode() + b"\n")
    except OSError:
        pass


def report_error(error: AdapterError) -> None:
    report(Status.FAILED, code=error.code, message=error.message, why=error.why, hint=error.hint)


def error_of(line: dict[str, Any]) -> HandlerError:
    """The error of a FAILED line."""
    return HandlerError(line["message"], why=line["why"], hint=line["hint"], code=line["code"])


class phase:  # noqa: N801  # reads as a statement: with phase(PhaseName.IMPORT): ...
    """Times a block and reports it, also when it raises."""

    def __init__(self, name: PhaseName) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._start_ns = time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        report(Status.PHASE, name=self._name.value, start_ns=self._start_ns, end_ns=time.monotonic_ns())
