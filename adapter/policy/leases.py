"""Leases as intervals: what a replica held, in which phase, from when to when.

Pure: the monotonic clock is passed in. Wall time comes from one anchor, taken once a process, so that a
stepped wall clock makes no interval negative and none overlap. A heartbeat closes the open interval and
opens the next one, so that a crash loses at most one heartbeat.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from adapter.records import LeaseInterval, LeasePhase

CPU_DEVICE = "cpu"
"""The device of replicas without a GPU: their seconds are replica-seconds."""

_REMEMBERED = 10_000
"""Ended replicas that are still known as such: many times what one process has about to end at once."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds what: the facts of a lease that do not change while it lasts."""

    function: str
    namespace: str
    revision: str
    replica: str
    tenant: str
    price_class: str
    device: str = CPU_DEVICE
    share: float = 1.0


@dataclass(slots=True)
class _Open:
    holder: Holder
    phase: LeasePhase
    since_ns: int
    sequence: int = 0


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
        """The replica is in `phase` now; returns the interval that ends with that, if one does."""
        lease = self._open.get(holder.replica)
        if lease is None and holder.replica in self._ended:
            return []
        if lease is None:
            self._open[holder.replica] = _Open(holder, phase, now_ns)
            return []
        if lease.phase is phase:
            return []
        return self._close(lease, phase, now_ns)

    def heartbeat(self, now_ns: int) -> list[LeaseInterval]:
        """Every open lease up to now."""
        return [interval for lease in self._open.values() for interval in self._close(lease, lease.phase, now_ns)]

    def end(self, replica: str, now_ns: int) -> list[LeaseInterval]:
        """The replica is gone; returns its last interval."""
        self._ended[replica] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        lease = self._open.pop(replica, None)
        return [] if lease is None else self._close(lease, lease.phase, now_ns)

    def _close(self, lease: _Open, phase: LeasePhase, now_ns: int) -> list[LeaseInterval]:
        started_ns, sequence = lease.since_ns, lease.sequence
        closed_phase, lease.phase = lease.phase, phase
        if now_ns <= started_ns:  # a phase without length: the next one takes its place
            return []
        lease.since_ns, lease.sequence = now_ns, sequence + 1
        holder = lease.holder
        return [
            LeaseInterval(
                id=f"{holder.replica}:{sequence}",
                function=holder.function,
                namespace=holder.namespace,
                revision=holder.revision,
                replica=holder.replica,
                tenant=holder.tenant,
                price_class=holder.price_class,
                device=holder.device,
                share=holder.share,
                phase=closed_phase,
                started_at_ns=self._wall(started_ns),
                ended_at_ns=self._wall(now_ns),
            )
        ]

    def _wall(self, monotonic_ns: int) -> int:
        return self.wall_anchor_ns + monotonic_ns - self.monotonic_anchor_ns
