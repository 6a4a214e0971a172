"""What a replica says about itself: start records and events, in one versioned JSON form.

The same record is the entrypoint's log line, the host's event, the ledger's row and the CLI's table.
Instants are `int` nanoseconds: ``*_at_ns`` since the epoch; offsets count from the record's own start
on a monotonic clock.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

VERSION = 1
_COUNT_LIMIT = 2**63


class Rung(str, Enum):
    """The ways a replica can come up, fastest first: the start ladder."""

    RESUME = "resume"
    """A parked process was woken."""
    RESTORE = "restore"
    """A process snapshot was restored."""
    START = "start"
    """Started with its weight snapshot."""
    LOAD = "load"
    """Started as the user wrote it."""


class PhaseName(str, Enum):
    """The parts of a start, in the order in which pictures show them."""

    GPU_WAIT = "gpu_wait"
    """Until the reservation ledger granted GPU memory: others held it, or had to be parked first."""
    SCHEDULE = "schedule"
    """The host's own work: from the request's arrival to the entrypoint's first instruction."""
    PULL = "pull"
    BOOT = "boot"
    """Entrypoint and interpreter, until user code is imported or a restore begins."""
    IMPORT = "import"
    """Importing the handler and what it imports."""
    RESTORE = "restore"
    """From asking for the restore until the restored process runs."""
    CUDA_RESTORE = "cuda_restore"
    """The driver's part of waking a process: its device memory copied back, its contexts made anew."""
    LOAD = "load"
    """The handler's `load`, weights included."""
    WEIGHTS = "weights"
    """A weight snapshot, from its file to the device: beside other phases where these need no weights."""
    GRAPHS = "graphs"
    """Compiled code and CUDA graphs: captured, or taken from a cache."""
    WARMUP = "warmup"
    """The examples: run before a snapshot and after a plain load, so the first request is a warm one."""
    HANDOVER = "handover"
    """Hooks, secrets, environment, sockets: from the snapshot point until requests are taken."""
    FIRST_RESPONSE = "first_response"
    """From taking requests to the last byte of the first held request's answer."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase; offsets in nanoseconds from the start of the record. Phases may overlap."""

    name: PhaseName
    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True, slots=True)
class SkippedRung:
    """A faster rung that was not taken. `code` is stable (a metric label), `reason` is for people."""

    rung: Rung
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class StartRecord:
    """How one replica came up. `total_ns` is wall time from `started_at_ns` to the end of the last phase."""

    function: str
    namespace: str
    revision: str
    replica: str
    rung: Rung
    started_at_ns: int
    total_ns: int
    phases: tuple[Phase, ...]
    skipped: tuple[SkippedRung, ...] = ()
    held_requests: int = 0
    """Requests that waited at the entrypoint for this start."""
    error: str = ""
    """Why the start failed; empty when it did not."""
    version: int = VERSION

    @property
    def covered_ratio(self) -> float:
        """Share of the wall time that some phase accounts for, 0 to 1."""
        covered, reached = 0, 0
        for phase in sorted(self.phases, key=lambda p: p.start_ns):
            covered += max(0, phase.end_ns - max(phase.start_ns, reached))
            reached = max(reached, phase.end_ns)
        return covered / self.total_ns if self.total_ns else 1.0

    def with_host_time(self, host_started_at_ns: int) -> StartRecord:
        """The same start seen from the host, which began it earlier: adds the `schedule` phase."""
        return self._after(PhaseName.SCHEDULE, max(0, self.started_at_ns - host_started_at_ns))

    def with_gpu_wait(self, wait_ns: int) -> StartRecord:
        """The same start from when its GPUs were asked for: adds the `gpu_wait` phase before all others."""
        return self._after(PhaseName.GPU_WAIT, max(0, wait_ns))

    def _after(self, name: PhaseName, lead_ns: int) -> StartRecord:
        """With a first phase of `lead_ns`."""
        moved = tuple(replace(p, start_ns=p.start_ns + lead_ns, end_ns=p.end_ns + lead_ns) for p in self.phases)
        return replace(
            self,
            started_at_ns=self.started_at_ns - lead_ns,
            total_ns=self.total_ns + lead_ns,
            phases=(Phase(name, 0, lead_ns), *moved),
        )

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StartRecord:
        """Raises `ValueError`, and nothing else, on a record of another version or with missing or wrong fields."""
        try:
            if data["version"] != VERSION:
                raise ValueError(f"start record version {data['version']}, this gpufn reads {VERSION}")
            fields = dict(data)
            fields["rung"] = Rung(data["rung"])
            fields["phases"] = tuple(
                Phase(PhaseName(p["name"]), _count(p["start_ns"]), _count(p["end_ns"])) for p in data["phases"]
            )
            fields["skipped"] = tuple(
                SkippedRung(Rung(s["rung"]), _text(s["code"]), _text(s["reason"])) for s in data["skipped"]
            )
            record = cls(**fields)
            for text in (record.function, record.namespace, record.revision, record.replica, record.error):
                _text(text)
            for count in (record.started_at_ns, record.total_ns, record.held_requests):
                _count(count)
        except (KeyError, TypeError, RecursionError) as exc:
            raise ValueError(f"not a start record: {type(exc).__name__}: {exc}") from exc
        return record


def _count(value: object) -> int:
    """A whole number that every reader and every database can keep. Raises `ValueError`."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _COUNT_LIMIT:
        return value
    raise ValueError("one of its numbers is none, or out of bounds")


def _text(value: object) -> str:
    """Raises `ValueError`."""
    if isinstance(value, str):
        return value
    raise ValueError("one of its texts is none")


class EventName(str, Enum):
    """What an entrypoint tells its host, one JSON line each: ``{"event", "at_ns", …fields}``."""

    LISTENING = "listening"
    """Requests are held from now on. Fields: `port`."""
    SERVING = "serving"
    """A model process has the socket. Fields: `rung`."""
    STARTED = "started"
    """A start is over and its first request is answered, or none was held. Fields: `record` (StartRecord)."""
    PARKED = "parked"
    """The process is frozen, and its GPU memory given back; requests are held again. On a CPU they wake it, on a
    GPU the host does (`adapter.replica.Command.RESUME`)."""
    SNAPSHOT = "snapshot"
    """Fields: `state` = building | published | failed | skipped, `key`, `reason`, `bytes`, `seconds`."""
    FAILED = "failed"
    """No rung worked. Fields: `code`, `reason`, `record`."""
    MODEL_EXITED = "model_exited"
    """The model process ended unasked. Fields: `reason`, `in_flight`."""
    LEAVING = "leaving"
    """From a host: others than its gateway end the replica, which drains. No new request should go there."""
    STOPPED = "stopped"
    """Drained; the entrypoint exits next. From a host: nothing of it is left. Fields: `exit_code`, `reason`, and
    `code` where the host ended it because it did not come up."""


@dataclass(frozen=True, slots=True)
class Event:
    """One line from an entrypoint."""

    name: EventName
    at_ns: int
    fields: dict[str, Any] = field(default_factory=dict)

    def to_line(self) -> bytes:
        return json.dumps({"event": self.name.value, "at_ns": self.at_ns, **self.fields}).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Event:
        """Raises `ValueError`, and nothing else, on anything that is no event."""
        try:
            data = json.loads(line)
            return cls(EventName(data.pop("event")), _count(data.pop("at_ns")), data)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as exc:
            raise ValueError(f"not an event: {line[:80]!r}") from exc


class LeasePhase(str, Enum):
    """What a replica does while it holds its GPU (or, without one, its place on the machine)."""

    RESTORING = "restoring"
    RUNNING = "running"
    """At least one request is in flight."""
    IDLE = "idle"
    PARKED = "parked"
    """It holds no GPU memory: the interval's device is where it was."""
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class LeaseInterval:
    """One replica in one phase from `started_at_ns` to `ended_at_ns`; the ledger's unit.

    `id` is deterministic (replica and sequence number), so that a repeated delivery counts once.
    `node` is the Kubernetes node it was on; empty on a machine of its own.
    `share` is the part of `device` held, 0 to 1, or a count of whole devices; `device` is a GPU's UUID (several
    with commas between), `gpu_model` its driver's name for it; or ``cpu`` and empty where a replica holds none,
    and then its seconds are replica-seconds.
    """

    id: str
    function: str
    namespace: str
    revision: str
    replica: str
    tenant: str
    price_class: str
    device: str
    share: float
    phase: LeasePhase
    started_at_ns: int
    ended_at_ns: int
    gpu_model: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class DeviceInterval:
    """One GPU (or MIG slice) that was there from `started_at_ns` to `ended_at_ns`, as its node's agent saw it.

    `held_ns` of that time functions held it, `others_ns` pods that are none; by share, so that half of it for 2 ns
    is 1. The rest it was idle. `id` is deterministic.
    """

    id: str
    node: str
    device: str
    model: str
    started_at_ns: int
    ended_at_ns: int
    held_ns: int
    others_ns: int
