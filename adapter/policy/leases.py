"""Leases as intervals: what a replica held, in which phase, from when to when.

Pure: the clocks are passed in. Durations are the monotonic one's; when they were, an anchor says, one instant on
both clocks. A lease follows the calendar ahead only, so that a stepped wall clock makes no interval negative, longer
or shorter, and none overlap. A heartbeat closes every open interval and opens the next one, so that a crash loses at
most one heartbeat.

A busy replica may change between running and idle thousands of times a second. Between two heartbeats those
times are added up, and stand in the ledger as one interval each, one after the other: rows stay few, sums
exact, and only the order within that time is lost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from adapter.records import LeaseInterval, LeasePhase

CPU_DEVICE = "cpu"
"""The device of replicas without a GPU: their seconds are replica-seconds."""

_REMEMBERED = 10_000
"""Ended replicas that are still known as such: many times what one process has about to end at once."""

_STEP_NS = 10**9
"""Clocks that differ by less are the same: so long may pass between two looks at them."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds what. Only the GPU may change while a lease lasts: a parked replica can wake on another one."""

    function: str
    namespace: str
    revision: str
    replica: str
    tenant: str
    price_class: str
    device: str = CPU_DEVICE
    share: float = 1.0
    gpu_model: str = ""
    node: str = ""


_ADDED_UP = frozenset({LeasePhase.RUNNING, LeasePhase.IDLE})


@dataclass(slots=True)
class _Open:
    """`spent_ns` is what no interval tells yet: from `told_ns` to `since_ns`, where the present phase began.
    `ahead_ns`: of the monotonic clock, in which all of these are, the calendar is so much."""

    holder: Holder
    ahead_ns: int
    phase: LeasePhase
    since_ns: int
    told_ns: int
    sequence: int = 0
    spent_ns: dict[LeasePhase, int] = field(default_factory=dict)

    def move_to(self, phase: LeasePhase, now_ns: int) -> None:
        """Time that goes backwards, as threads may see it, counts as none."""
        if now_ns > self.since_ns:
            self.spent_ns[self.phase] = self.spent_ns.get(self.phase, 0) + now_ns - self.since_ns
            self.since_ns = now_ns
        self.phase = phase


@dataclass(slots=True)
class LeaseTracker:
    """Open leases. `wall_anchor_ns` and `monotonic_anchor_ns` are one instant on both clocks.

    Repeated and late news are harmless: of a phase that lasts, of an instant that is past, of a replica that
    has ended. A replica's name is never used again, also not after a restart: the intervals' ids rest on it.
    """

    wall_anchor_ns: int
    monotonic_anchor_ns: int
    _open: dict[str, _Open] = field(default_factory=dict)
    _ended: dict[str, None] = field(default_factory=dict)

    def observe(self, holder: Holder, phase: LeasePhase, now_ns: int) -> list[LeaseInterval]:
        """`holder`'s replica is in `phase` now; returns the intervals that end with that."""
        lease = self._open.get(holder.replica)
        if lease is None and holder.replica in self._ended:
            return []
        if lease is None:
            self._open[holder.replica] = _Open(holder, self._ahead_ns, phase, now_ns, now_ns)
            return []
        if lease.holder != holder:
            return self._change_holder(lease, holder, phase, now_ns)
        if lease.phase is phase:
            return []
        before = lease.phase
        lease.move_to(phase, now_ns)
        return [] if {before, phase} <= _ADDED_UP else self._tell(lease)

    def _change_holder(self, lease: _Open, holder: Holder, phase: LeasePhase, now_ns: int) -> list[LeaseInterval]:
        lease.move_to(phase, now_ns)
        intervals = self._tell(lease)
        lease.holder = holder
        return intervals

    def heartbeat(self, now_ns: int) -> list[LeaseInterval]:
        """Every open lease up to now."""
        intervals = []
        for lease in self._open.values():
            lease.move_to(lease.phase, now_ns)
            intervals += self._tell(lease)
        return intervals

    def set_calendar(self, wall_ns: int, now_ns: int) -> None:
        """The present instant on both clocks: the calendar may have been set, or this machine may have slept."""
        ahead_ns = wall_ns - now_ns
        if abs(ahead_ns - self._ahead_ns) >= _STEP_NS:
            self.wall_anchor_ns, self.monotonic_anchor_ns = wall_ns, now_ns
            for lease in self._open.values():
                lease.ahead_ns = max(lease.ahead_ns, ahead_ns)

    def untold(self, now_ns: int) -> list[LeaseInterval]:
        """What no interval tells yet, up to now: to look at, another call tells it."""
        intervals = []
        for lease in self._open.values():
            copy = replace(lease, spent_ns=dict(lease.spent_ns))
            copy.move_to(copy.phase, now_ns)
            intervals += self._tell(copy)
        return intervals

    def end(self, replica: str, now_ns: int) -> list[LeaseInterval]:
        """The replica is gone; returns its last intervals."""
        self._ended[replica] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        lease = self._open.pop(replica, None)
        if lease is None:
            return []
        lease.move_to(lease.phase, now_ns)
        return self._tell(lease)

    def _tell(self, lease: _Open) -> list[LeaseInterval]:
        """What is not told yet, in the order in which its phases first came; none of them has no length."""
        intervals = []
        for phase, nanoseconds in lease.spent_ns.items():
            end_ns = lease.told_ns + nanoseconds
            intervals.append(self._interval(lease, phase, end_ns))
            lease.told_ns, lease.sequence = end_ns, lease.sequence + 1
        lease.spent_ns.clear()
        return intervals

    def _interval(self, lease: _Open, phase: LeasePhase, end_ns: int) -> LeaseInterval:
        return LeaseInterval(
            id=f"{lease.holder.replica}:{lease.sequence}",
            **asdict(lease.holder),
            phase=phase,
            started_at_ns=lease.told_ns + lease.ahead_ns,
            ended_at_ns=end_ns + lease.ahead_ns,
        )

    @property
    def _ahead_ns(self) -> int:
        return self.wall_anchor_ns - self.monotonic_anchor_ns
