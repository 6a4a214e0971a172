"""Who held which device of a node for how long, and in which phase: added up from observation to observation.

Pure: instants come in, on the clock of the node's boot (CLOCK_BOOTTIME), which nobody steps; the calendar is one instant
on both clocks. Between two tellings times are added up, so that telling later loses nothing and costs no memory; what is
told becomes records with ids that count up, and the state from which another process goes on.

A replica's own words (its phases, its busy seconds) split the time in which it held a device. They neither lengthen nor
shorten it, and nothing that is said of an instant that was told already changes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from adapter.policy.leases import CPU_DEVICE, Holder
from adapter.records import DeviceInterval, LeaseInterval, LeasePhase

UNKNOWN_DEVICE = "unknown"
"""Of a container that was given a GPU which the kubelet does not name."""

STATE_VERSION = 1
_UNREAD = -1
"""Of a counter whose first reading is where it begins."""

Record: TypeAlias = LeaseInterval | DeviceInterval
Key: TypeAlias = tuple[str, str, str]
"""A lease's: pod UID, container, device."""


@dataclass(frozen=True, slots=True)
class Calendar:
    """One instant on the calendar and on the clock of a boot."""

    boot_id: str
    wall_ns: int
    boot_ns: int

    def wall(self, at_ns: int) -> int:
        return self.wall_ns + at_ns - self.boot_ns


@dataclass(slots=True)
class _Lease:
    """`spent_ns` is what is not told yet: from `told_ns` to `since_ns`, where the present phase began."""

    holder: Holder
    phase: LeasePhase
    told_ns: int
    since_ns: int
    sequence: int = 0
    spent_ns: dict[LeasePhase, int] = field(default_factory=dict)
    ended: bool = False

    def move_to(self, phase: LeasePhase, at_ns: int) -> None:
        self.advance(at_ns)
        self.phase = phase

    def advance(self, at_ns: int) -> None:
        if at_ns > self.since_ns:
            self.spent_ns[self.phase] = self.spent_ns.get(self.phase, 0) + at_ns - self.since_ns
            self.since_ns = at_ns

    def shift(self, busy_ns: int) -> int:
        """Of the idle time that is not told yet, so much was running; returns how much that was."""
        moved = min(busy_ns, self.spent_ns.get(LeasePhase.IDLE, 0))
        if moved > 0:
            self.spent_ns[LeasePhase.IDLE] -= moved
            self.spent_ns[LeasePhase.RUNNING] = self.spent_ns.get(LeasePhase.RUNNING, 0) + moved
        return moved


@dataclass(slots=True)
class _Presence:
    model: str
    told_ns: int
    since_ns: int
    sequence: int = 0
    held_share: float = 0.0
    others_share: float = 0.0
    held_ns: float = 0.0
    others_ns: float = 0.0
    ended: bool = False

    def advance(self, at_ns: int) -> None:
        if at_ns > self.since_ns:
            self.held_ns += self.held_share * (at_ns - self.since_ns)
            self.others_ns += self.others_share * (at_ns - self.since_ns)
            self.since_ns = at_ns

    def hold(self, share: float, at_ns: int) -> None:
        """So much more of it is held, or less, since an instant that may be past."""
        self.advance(at_ns)
        self.held_ns += share * (self.since_ns - max(at_ns, self.told_ns))
        self.held_share += share


class Meter:
    """One node's. `origin` makes ids of this meter's own: another one that knows nothing of it repeats none."""

    def __init__(self, node: str, calendar: Calendar, origin: str) -> None:
        self.node, self.calendar, self.origin = node, calendar, origin
        self.told_ns = calendar.boot_ns
        """When all was told last: a lease that is not known began later."""
        self._leases: dict[Key, _Lease] = {}
        self._sequences: dict[Key, int] = {}
        self._presences: dict[str, _Presence] = {}
        self._device_sequences: dict[str, int] = {}
        self._busy_ns: dict[str, int] = {}

    # Leases -------------------------------------------------------------------------------------

    def holds(self, key: Key) -> bool:
        return key in self._leases and not self._leases[key].ended

    def knows(self, pod: str, container: str) -> bool:
        """The container has, or had, a lease."""
        return any(key[:2] == (pod, container) for key in (*self._leases, *self._sequences))

    def held(self) -> list[Key]:
        """Of leases that have not ended."""
        return [key for key, lease in self._leases.items() if not lease.ended]

    def hold(self, key: Key, holder: Holder, phase: LeasePhase, since_ns: int) -> None:
        """`holder` has the device since then, and no sooner than it was told that nobody had: one who has it already
        goes on."""
        if key in self._leases:
            return
        _, _, device = key
        if since_ns < self.told_ns:  # its counter has counted before, nobody knows what
            self._busy_ns.setdefault(key[0], _UNREAD)
            since_ns = self.told_ns
        if holder.share >= 1 and device not in (CPU_DEVICE, UNKNOWN_DEVICE):  # it was free by then
            since_ns = max([since_ns, *(lease.since_ns for (_, _, d), lease in self._leases.items() if d == device)])
        self._leases[key] = _Lease(holder, phase, since_ns, since_ns, self._sequences.pop(key, 0))
        if device in self._presences:
            self._presences[device].hold(holder.share, since_ns)

    def move(self, pod: str, phase: LeasePhase, at_ns: int) -> None:
        """Every lease of the pod is in `phase` since then. One that drains comes up no more."""
        for lease in self._of(pod):
            if lease.phase not in (phase, LeasePhase.DRAINING):
                lease.move_to(phase, at_ns)

    def busy(self, pod: str, counter_ns: int, now_ns: int) -> None:
        """The pod's counter of busy time stands at `counter_ns`: what it grew by since it was last told was not idle.

        One that went back has begun anew.
        """
        before = self._busy_ns.get(pod, 0)
        grown_ns = 0 if before == _UNREAD else counter_ns - before if counter_ns >= before else counter_ns
        self._busy_ns[pod] = counter_ns
        for lease in self._of(pod):
            lease.advance(now_ns)
            lease.shift(grown_ns)

    def release(self, key: Key, at_ns: int) -> None:
        """It has the device no more since then; what was told of it stays told."""
        lease = self._leases.get(key)
        if lease is None or lease.ended:
            return
        _, _, device = key
        lease.advance(at_ns)
        lease.ended = True
        if device in self._presences:
            self._presences[device].hold(-lease.holder.share, lease.since_ns)

    def _of(self, pod: str) -> Iterable[_Lease]:
        return [lease for (uid, _, _), lease in self._leases.items() if uid == pod and not lease.ended]

    # Devices ------------------------------------------------------------------------------------

    def present(self, models: Mapping[str, str], now_ns: int) -> None:
        """The devices that are there now, by UUID, with their models."""
        began_ns = now_ns if self._presences or self._device_sequences else self.told_ns
        for device, presence in self._presences.items():
            if device not in models and not presence.ended:
                presence.advance(now_ns)
                presence.ended = True
        for device, model in models.items():
            known = self._presences.get(device)
            if known is None:
                sequence = self._device_sequences.pop(device, 0)
                presence = self._presences[device] = _Presence(model, began_ns, began_ns, sequence)
                for (_, _, held), lease in self._leases.items():
                    if held == device and not lease.ended:
                        presence.hold(lease.holder.share, began_ns)
            elif known.ended:  # gone and back between two tellings: it is told first
                continue
            else:
                known.model = model or known.model

    def others(self, shares: Mapping[str, float], now_ns: int) -> None:
        """What pods that are no functions hold of each device."""
        for device, presence in self._presences.items():
            share = min(1.0, shares.get(device, 0.0))
            if share != presence.others_share:
                presence.advance(now_ns)
                presence.others_share = share

    # Telling ------------------------------------------------------------------------------------

    def tell(self, now_ns: int) -> list[Record]:
        """All that is not told yet, up to now."""
        records: list[Record] = []
        for key, lease in list(self._leases.items()):
            if not lease.ended:
                lease.advance(now_ns)
            records += self._told_lease(key, lease)
            if lease.ended:
                del self._leases[key]
                self._sequences[key] = lease.sequence
        for device, presence in list(self._presences.items()):
            if not presence.ended:
                presence.advance(now_ns)
            records += self._told_presence(device, presence)
            if presence.ended:
                del self._presences[device]
                self._device_sequences[device] = presence.sequence
        self.told_ns = max(self.told_ns, now_ns)
        return records

    def forget(self, pods: Iterable[str]) -> None:
        """Of all but these pods nothing more will come: their numbers need not be kept."""
        there = set(pods) | {uid for uid, _, _ in self._leases}
        self._sequences = {key: n for key, n in self._sequences.items() if key[0] in there}
        self._busy_ns = {pod: ns for pod, ns in self._busy_ns.items() if pod in there}

    def _told_lease(self, key: Key, lease: _Lease) -> Iterable[LeaseInterval]:
        for phase, nanoseconds in lease.spent_ns.items():
            if nanoseconds:
                end_ns = lease.told_ns + nanoseconds
                yield self._interval(key, lease.holder, lease.sequence, phase, lease.told_ns, end_ns)
                lease.told_ns, lease.sequence = end_ns, lease.sequence + 1
        lease.spent_ns.clear()

    def _interval(
        self, key: Key, holder: Holder, sequence: int, phase: LeasePhase, start_ns: int, end_ns: int
    ) -> LeaseInterval:
        return LeaseInterval(
            id=f"{'/'.join(key)}:{self.origin}.{sequence}",
            **asdict(holder),
            phase=phase,
            started_at_ns=self.calendar.wall(start_ns),
            ended_at_ns=self.calendar.wall(end_ns),
        )

    def _told_presence(self, device: str, presence: _Presence) -> Iterable[DeviceInterval]:
        length_ns = presence.since_ns - presence.told_ns
        if not length_ns:
            return
        held_ns = min(max(round(presence.held_ns), 0), length_ns)
        yield DeviceInterval(
            id=f"{device}:{self.origin}.{presence.sequence}",
            node=self.node,
            device=device,
            model=presence.model,
            started_at_ns=self.calendar.wall(presence.told_ns),
            ended_at_ns=self.calendar.wall(presence.since_ns),
            held_ns=held_ns,
            others_ns=min(round(presence.others_ns), length_ns - held_ns),
        )
        presence.told_ns, presence.sequence = presence.since_ns, presence.sequence + 1
        presence.held_ns = presence.others_ns = 0.0

    # Going on -----------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """All of it, also what is not told yet."""
        return {
            "version": STATE_VERSION,
            "origin": self.origin,
            "calendar": asdict(self.calendar),
            "told_ns": self.told_ns,
            "leases": [
                {
                    "key": list(key),
                    **asdict(lease),
                    "phase": lease.phase.value,
                    "spent_ns": {phase.value: ns for phase, ns in lease.spent_ns.items()},
                }
                for key, lease in self._leases.items()
            ],
            "presences": {device: asdict(presence) for device, presence in self._presences.items()},
            "sequences": [[*key, n] for key, n in self._sequences.items()],
            "device_sequences": self._device_sequences,
            "busy_ns": self._busy_ns,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], node: str) -> Meter:
        """Raises `ValueError` on what is no state of this version."""
        try:
            if data["version"] != STATE_VERSION:
                raise ValueError(f"state version {data['version']}")
            meter = cls(node, Calendar(**data["calendar"]), str(data["origin"]))
            meter.told_ns = int(data["told_ns"])
            for item in data["leases"]:
                facts = dict(item)
                uid, container, device = facts.pop("key")
                facts["holder"] = Holder(**facts["holder"])
                facts["phase"] = LeasePhase(facts["phase"])
                facts["spent_ns"] = {LeasePhase(phase): ns for phase, ns in facts["spent_ns"].items()}
                meter._leases[uid, container, device] = _Lease(**facts)
            meter._presences = {device: _Presence(**facts) for device, facts in data["presences"].items()}
            meter._sequences = {(uid, name, device): n for uid, name, device, n in data["sequences"]}
            meter._device_sequences = dict(data["device_sequences"])
            meter._busy_ns = dict(data["busy_ns"])
        except (KeyError, TypeError, AttributeError) as exc:
            raise ValueError(f"not a meter's state: {exc!r}") from exc
        return meter

    def reboot(self, calendar: Calendar) -> list[Record]:
        """The node has started anew, and nobody knows when it stopped: what was held and there ended when it was told
        last. Returns what is to be told of the boot before."""
        records: list[Record] = []
        for key, lease in self._leases.items():
            records += self._told_lease(key, lease)
            self._sequences[key] = lease.sequence
        for device, presence in self._presences.items():
            records += self._told_presence(device, presence)
            self._device_sequences[device] = presence.sequence
        self._leases.clear()
        self._presences.clear()
        self._busy_ns.clear()
        self.calendar, self.told_ns = calendar, calendar.boot_ns
        return records
