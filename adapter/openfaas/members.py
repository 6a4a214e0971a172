"""What a fleet knows of each of its replicas, and a request's place in one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from adapter.hosts import Replica, ReplicaState
from adapter.openfaas.gpus import Grant
from adapter.policy.scaling import ReplicaView
from adapter.records import LeasePhase

_RUNG_LIMIT_S = 0.1
"""An answer may overtake the event that says how its replica came up, by about a millisecond."""

_LIVE = frozenset({ReplicaState.STARTING, ReplicaState.SERVING, ReplicaState.PARKED})
_ORDER = {ReplicaState.SERVING: 0, ReplicaState.PARKED: 1, ReplicaState.STARTING: 2}


@dataclass(eq=False)
class Member:
    """One replica of a fleet."""

    replica: Replica
    began_at_ns: int
    """When its start was asked for; 0 once a record has told of it."""
    in_flight: int = 0
    idle_since_s: float | None = None
    outdated: bool = False
    """Gets no new requests, and goes when it has none."""
    upcoming: bool = False
    """Of a revision that takes over once this replica serves."""
    stopping: bool = False
    rung: str = ""
    """How it last came up; empty until it has."""
    lives: int = 0
    """How often a model process took the port: requests sent before the next time are only held."""
    exits: int = 0
    """How often its model process ended: a request that was with it may have had its effects."""
    awake: asyncio.Event = field(default_factory=asyncio.Event)
    grant: Grant | None = None
    """Its hold on GPUs, where its function needs any."""
    asleep: bool = False
    """Parked, and its GPUs may be another's: gets no requests until it has some again."""
    gpu_wait_ns: int = 0
    """How long its GPUs were waited for; 0 once a record has told of it."""

    @property
    def state(self) -> ReplicaState:
        return ReplicaState.STOPPING if self.stopping else self.replica.state

    @property
    def takes_work(self) -> bool:
        return not self.outdated and not self.upcoming and self.state in _LIVE

    @property
    def preference(self) -> tuple[int, int]:
        """Awake before parked before starting, the fullest first: the others may rest."""
        return (_ORDER[self.state], -self.in_flight)

    @property
    def lease_phase(self) -> LeasePhase:
        if self.state is ReplicaState.STARTING:
            return LeasePhase.RESTORING
        if self.state in (ReplicaState.STOPPING, ReplicaState.GONE):
            return LeasePhase.DRAINING
        if self.grant is not None and self.state is ReplicaState.PARKED:
            return LeasePhase.PARKED if self.asleep else LeasePhase.RESTORING
        if self.in_flight:
            return LeasePhase.RUNNING
        return LeasePhase.PARKED if self.state is ReplicaState.PARKED else LeasePhase.IDLE

    def view(self) -> ReplicaView:
        return ReplicaView(
            id=self.replica.id,
            state=self.state.value,
            in_flight=self.in_flight,
            idle_since_s=self.idle_since_s,
            building_snapshot=self.replica.building_snapshot,
            outdated=self.outdated,
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """A request's place in a replica. `cold`: the replica had to start, or to be woken, for it."""

    member: Member
    cold: bool
    lives: int
    """The member's, when the place was given."""

    @property
    def is_held(self) -> bool:
        """No handler can have seen the request yet: it may be sent somewhere else."""
        return self.cold and self.member.lives == self.lives

    async def rung(self) -> str:
        """How the replica came up for this request; empty when it was up."""
        if not self.cold:
            return ""
        if not self.member.awake.is_set():
            try:
                await asyncio.wait_for(self.member.awake.wait(), _RUNG_LIMIT_S)
            except asyncio.TimeoutError:  # it failed: there is no rung
                return ""
        return self.member.rung
