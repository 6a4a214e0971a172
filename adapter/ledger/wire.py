"""Records as agents send them to the ledger service: one JSON object a line, and what is wrong with one.

    {"seq": 7, "kind": "lease", "node": …, …the fields of `LeaseInterval`}
    {"seq": 8, "kind": "device", "node": …, …the fields of `DeviceInterval`}
    {"seq": 9, "kind": "start", "node": …, "record": …`StartRecord.to_json`}

Pure: the clock is passed in. A line is judged alone, and only the database has the last word after that: whatever gets
through here can be stored. What an agent sends is its own node's: its ids are made the node's by the node's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from typing import Any, TypeVar

from adapter.records import DeviceInterval, LeaseInterval, LeasePhase, StartRecord

Record = LeaseInterval | DeviceInterval | StartRecord

LINE_LIMIT_BYTES = 64 * 1024
AHEAD_LIMIT_NS = 5 * 60 * 10**9
"""A record may end this long after the ledger's own clock: clocks that are kept in step differ by far less."""
_AGE_LIMIT_NS = 90 * 86_400 * 10**9
"""An agent without a way to the ledger spools for days; a clock that has never been set is decades behind."""
_LENGTH_LIMIT_NS = 31 * 86_400 * 10**9
_TEXT_LIMIT = 1024
_SHARE_LIMIT = 64.0
_INTEGER_LIMIT = 2**63

_Interval = TypeVar("_Interval", LeaseInterval, DeviceInterval)


class RefusalCode(str, Enum):
    """Why a record is kept out; a metric's label."""

    NOT_JSON = "not-json"
    TOO_LARGE = "too-large"
    UNKNOWN_KIND = "unknown-kind"
    BAD_FIELD = "bad-field"
    BAD_SHARE = "bad-share"
    NO_LENGTH = "no-length"
    TOO_LONG = "too-long"
    CLOCK_AHEAD = "clock-ahead"
    CLOCK_BEHIND = "clock-behind"
    OTHER_NODE = "other-node"


class _Refused(ValueError):
    def __init__(self, code: RefusalCode, why: str) -> None:
        super().__init__(why)
        self.code = code


@dataclass(frozen=True, slots=True)
class Refusal:
    """One record that is kept out. `seq` is None where it cannot be read."""

    seq: int | None
    code: RefusalCode
    why: str


@dataclass(slots=True)
class Batch:
    """What one delivery holds. `acked`: its highest number, None where no line has one."""

    intervals: list[LeaseInterval] = field(default_factory=list)
    starts: list[StartRecord] = field(default_factory=list)
    devices: list[DeviceInterval] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    acked: int | None = None


def encode(record: Record, node: str) -> dict[str, Any]:
    """The JSON form without its number."""
    if isinstance(record, StartRecord):
        return {"kind": "start", "node": node, "record": record.to_json()}
    if isinstance(record, DeviceInterval):
        return {"kind": "device", **asdict(record), "node": node}
    return {"kind": "lease", **asdict(record), "phase": record.phase.value, "node": node}


def to_line(seq: int, encoded: Mapping[str, Any]) -> bytes:
    return json.dumps({"seq": seq, **encoded}).encode() + b"\n"


def read_batch(body: bytes, node: str, now_ns: int) -> Batch:
    """What the agent of `node` has sent. Never raises: a line that is no record is one that is refused."""
    batch = Batch()
    for line in body.split(b"\n"):
        if not line.strip():
            continue
        seq = None
        try:
            data = _object(line)
            seq = _seq(data)
            batch.acked = seq if batch.acked is None else max(seq, batch.acked)
            _keep(batch, _record(data, node, now_ns))
        except _Refused as refused:
            batch.refused.append(Refusal(seq, refused.code, str(refused)))
    return batch


def _keep(batch: Batch, record: Record) -> None:
    if isinstance(record, LeaseInterval):
        batch.intervals.append(record)
    elif isinstance(record, DeviceInterval):
        batch.devices.append(record)
    else:
        batch.starts.append(record)


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > LINE_LIMIT_BYTES:
        raise _Refused(RefusalCode.TOO_LARGE, f"It has {len(line)} bytes, more than {LINE_LIMIT_BYTES}.")
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise _Refused(RefusalCode.NOT_JSON, "It is no JSON object.") from exc
    if not isinstance(data, dict):
        raise _Refused(RefusalCode.NOT_JSON, "It is no JSON object.")
    return data


def _seq(data: Mapping[str, Any]) -> int:
    seq = data.get("seq")
    if not _is_count(seq):
        raise _Refused(RefusalCode.BAD_FIELD, "seq is no whole number, zero or more.")
    assert isinstance(seq, int)
    return seq


def _record(data: Mapping[str, Any], node: str, now_ns: int) -> Record:
    kind = data.get("kind")
    if kind not in ("lease", "device", "start"):
        raise _Refused(RefusalCode.UNKNOWN_KIND, f"{str(kind)[:40]!r} is neither lease, device nor start.")
    if data.get("node") != node:
        raise _Refused(
            RefusalCode.OTHER_NODE, f"It is of node {str(data.get('node'))[:80]!r}, its sender is of {node}."
        )
    if kind == "lease":
        return _lease(data, now_ns)
    if kind == "device":
        return _device(data, now_ns)
    return _start(data.get("record"), now_ns)


def _lease(data: Mapping[str, Any], now_ns: int) -> LeaseInterval:
    lease = _interval(LeaseInterval, data, now_ns)
    if not 0 < lease.share <= _SHARE_LIMIT:
        raise _Refused(RefusalCode.BAD_SHARE, f"share is {lease.share}: more than 0, at most {_SHARE_LIMIT:g}.")
    return lease


def _device(data: Mapping[str, Any], now_ns: int) -> DeviceInterval:
    device = _interval(DeviceInterval, data, now_ns)
    if device.held_ns + device.others_ns > device.ended_at_ns - device.started_at_ns:
        raise _Refused(RefusalCode.BAD_SHARE, "It was held for longer than it was there.")
    return device


def _interval(kind: type[_Interval], data: Mapping[str, Any], now_ns: int) -> _Interval:
    names = {item.name: str(item.type) for item in fields(kind)}
    record = kind(**{name: _value(name, of, data.get(name)) for name, of in names.items()})
    length_ns = record.ended_at_ns - record.started_at_ns
    if length_ns <= 0:
        raise _Refused(RefusalCode.NO_LENGTH, "It does not end after it starts.")
    if length_ns > _LENGTH_LIMIT_NS:
        raise _Refused(RefusalCode.TOO_LONG, f"It lasts {length_ns / 86_400e9:.0f} days.")
    _check_clock(record.ended_at_ns, now_ns)
    return replace(record, id=f"{record.node}/{record.id}")


def _start(data: object, now_ns: int) -> StartRecord:
    try:
        record = StartRecord.from_json(data)  # type: ignore[arg-type]
    except ValueError as exc:
        raise _Refused(RefusalCode.BAD_FIELD, f"{exc}"[:200]) from exc
    for name in ("function", "namespace", "revision", "replica"):  # columns of their own
        _value(name, "str", getattr(record, name))
    if record.total_ns > _LENGTH_LIMIT_NS:
        raise _Refused(RefusalCode.TOO_LONG, f"It lasts {record.total_ns / 86_400e9:.0f} days.")
    _check_clock(record.started_at_ns + record.total_ns, now_ns)
    return record


def _check_clock(at_ns: int, now_ns: int) -> None:
    if at_ns > now_ns + AHEAD_LIMIT_NS:
        raise _Refused(RefusalCode.CLOCK_AHEAD, f"It ends {(at_ns - now_ns) / 1e9:.0f} s after the ledger's clock.")
    if at_ns < now_ns - _AGE_LIMIT_NS:
        raise _Refused(RefusalCode.CLOCK_BEHIND, f"It ended {(now_ns - at_ns) / 86_400e9:.0f} days ago.")


def _value(name: str, of: str, value: object) -> Any:
    """`value` as the field `name` has it, for every database to keep."""
    if of == "str" and isinstance(value, str) and len(value) <= _TEXT_LIMIT and _is_text(value):
        return value
    if of == "int" and _is_count(value):
        return value
    if of == "float" and isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value):
        return float(value)
    if of == "LeasePhase" and value in [phase.value for phase in LeasePhase]:
        return LeasePhase(value)
    raise _Refused(RefusalCode.BAD_FIELD, f"{name} is {str(value)[:80]!r}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _INTEGER_LIMIT


def _is_finite(value: float) -> bool:
    return -1e18 < value < 1e18 and math.isfinite(value)


def _is_text(value: str) -> bool:
    """PostgreSQL keeps neither NUL nor halves of surrogate pairs."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
