"""How many replicas one function should have, and which of them may rest.

Pure: observed replicas in, actions out, the clock (any monotonic one, in seconds) passed in. Growth is at
once, shrinking only after idle time since the last request: that asymmetry is the hysteresis. How much idle time
that is says `adapter.policy.keep_alive`; here it is given, as `keep_alive_s`.

The bounds count replicas of the current revision. Outdated ones drain beside them, get no new work and
count neither as capacity nor against the maximum, so that a new revision starts while the old one finishes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from adapter.spec import FunctionSpec

SNAPSHOT_GRACE_S = 120.0
"""How much longer an idle replica is spared because a snapshot is being taken beside it: several times
what a dump of a large process takes, and short enough that one which hangs costs little."""

STARTING, SERVING, PARKED = "starting", "serving", "parked"
_LIVE = frozenset({STARTING, SERVING, PARKED})


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as the policy sees it. `state` is a value of `adapter.hosts.ReplicaState`.

    `idle_since_s` is when it last had nothing to do: the end of its last request, or of its start when
    none has come yet. None while it is busy or still starts.
    """

    id: str
    state: str
    in_flight: int
    idle_since_s: float | None
    building_snapshot: bool = False
    outdated: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Start `count` new replicas of the current revision."""

    count: int


@dataclass(frozen=True, slots=True)
class Park:
    """Freeze a replica; a request sent to it wakes it."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Drain and end a replica. `reason` is a fixed phrase for logs and metrics."""

    replica_id: str
    reason: str


Action: TypeAlias = Start | Park | Stop


def decide(
    spec: FunctionSpec, replicas: Iterable[ReplicaView], waiting: int, now_s: float, *, keep_alive_s: float
) -> list[Action]:
    """What to do now. `waiting` counts requests that no replica has yet; after `keep_alive_s` of idleness a replica
    is stopped, 0: never.

    Deterministic and idempotent: once the actions show in `replicas`, the same call answers nothing.
    Requests may be sent to starting and parked replicas (both hold them), so these count as capacity.
    """
    ordered = sorted(replicas, key=_longest_idle_first)
    live = [r for r in ordered if r.state in _LIVE and not r.outdated]
    needed = needed_replicas(spec, waiting + sum(r.in_flight for r in live))
    actions: list[Action] = [
        Stop(r.id, "outdated") for r in ordered if r.state in _LIVE and r.outdated and _is_free(r, now_s)
    ]
    if len(live) < needed:
        actions.append(Start(needed - len(live)))
    surplus = _surplus(spec, live, now_s)
    actions.extend(Stop(r.id, "above max") for r in surplus)
    actions.extend(_rest(spec, [r for r in live if r not in surplus], needed, now_s, keep_alive_s))
    return actions


def needed_replicas(spec: FunctionSpec, requests: int) -> int:
    """How many replicas requests, waiting or being handled, and the minimum call for, within the maximum."""
    return min(spec.max_replicas, max(spec.min_replicas, math.ceil(requests / spec.in_flight)))


def next_deadline_s(
    spec: FunctionSpec, replicas: Iterable[ReplicaView], now_s: float, *, keep_alive_s: float
) -> float | None:
    """The next instant at which `decide` may answer differently though nothing else has changed.

    On the clock of `now_s`, and always after it; None when time alone changes nothing.
    """
    instants: list[float] = []
    for r in replicas:
        if r.state not in _LIVE or r.in_flight or r.idle_since_s is None:
            continue
        limits = (0.0,) if r.outdated else (spec.park_after_s, keep_alive_s, 0.0)
        instants.extend(_due_s(r, r.idle_since_s, after_s) for after_s in limits)
    return min((instant for instant in instants if instant > now_s), default=None)


def _longest_idle_first(r: ReplicaView) -> tuple[float, str]:
    return (math.inf if r.idle_since_s is None else r.idle_since_s, r.id)


def _due_s(r: ReplicaView, idle_since_s: float, after_s: float) -> float:
    """When `after_s` of idleness are over; later while a snapshot is being taken."""
    return idle_since_s + after_s + (SNAPSHOT_GRACE_S if r.building_snapshot else 0.0)


def _is_free(r: ReplicaView, now_s: float) -> bool:
    """Whether stopping it loses neither a request nor, within the grace time, a snapshot."""
    if r.in_flight:
        return False
    if not r.building_snapshot:
        return True
    return r.idle_since_s is not None and _due_s(r, r.idle_since_s, 0.0) <= now_s


def _surplus(spec: FunctionSpec, live: Sequence[ReplicaView], now_s: float) -> list[ReplicaView]:
    """Free replicas above a maximum that was lowered: parked ones first, then the longest idle."""
    free = sorted((r for r in live if _is_free(r, now_s)), key=lambda r: r.state != PARKED)
    return free[: max(0, len(live) - spec.max_replicas)]


def _rest(
    spec: FunctionSpec, live: Sequence[ReplicaView], needed: int, now_s: float, keep_alive_s: float
) -> list[Action]:
    """Park or stop what has been idle long enough, keeping `needed` replicas, and as many awake if they are."""

    def is_due(r: ReplicaView, after_s: float) -> bool:
        return bool(after_s) and r.idle_since_s is not None and _due_s(r, r.idle_since_s, after_s) <= now_s

    actions: list[Action] = []
    total = len(live)
    awake = sum(r.state != PARKED for r in live)
    for r in live:
        if r.state == STARTING or r.in_flight:
            continue
        parked = r.state == PARKED
        if not (total if parked else awake) > needed:
            continue
        if is_due(r, keep_alive_s):
            actions.append(Stop(r.id, "idle"))
            total -= 1
            awake -= not parked
        elif not parked and is_due(r, spec.park_after_s):
            actions.append(Park(r.id))
            awake -= 1
    return actions
