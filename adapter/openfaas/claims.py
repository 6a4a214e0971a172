"""What one fleet asks of the GPU ledger: for replicas that start, and for parked ones that are to wake.

A function without GPUs never comes here. An ask lasts for as long as somebody wants it: when those who waited
have left, it is withdrawn, so that no neighbour makes room for nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from adapter.hosts import Deployment, ReplicaState
from adapter.openfaas.gpus import Gpus, Grant, Withdrawn
from adapter.openfaas.members import Member
from adapter.policy.grants import ClaimState, Want
from adapter.records import Rung, StartRecord

_START_S = 30.0
_RESUME_S = 0.5
_RESUME_BYTES_PER_S = 5e9
"""What a wake costs before one was measured: a plain start with a model, and the driver's copy of its memory."""


@dataclass(eq=False)
class Ask:
    """One grant that is asked for. `member`: whom it wakes. `firm`: a deploy or a scale wants it, requests or not."""

    grant: Grant
    deployment: Deployment
    member: Member | None = None
    firm: bool = False
    is_withdrawn: bool = False
    began_at_ns: int = field(default_factory=time.time_ns)

    def check(self) -> None:
        """Raises `Withdrawn`."""
        if self.is_withdrawn:
            raise Withdrawn


class Claims:
    """One fleet's asks and grants. `stop` ends a replica, with a reason."""

    def __init__(self, gpus: Gpus, stop: Callable[[Member, str], None]) -> None:
        self.asks: dict[Grant, Ask] = {}
        self._gpus = gpus
        self._stop = stop
        self._took_s: dict[bool, float] = {}  # the latest start, and the latest wake (True)

    # Asking -------------------------------------------------------------------------------------

    def for_start(self, deployment: Deployment, *, firm: bool, replaces: bool = False) -> Ask | None:
        """An ask for a replica that is to start, to be `granted`; None where its function needs no GPU from us."""
        spec = deployment.spec
        if not spec.gpus or not self._gpus.is_ours:
            return None
        want = replace(Want.of(deployment.key, spec), replaces=replaces)
        grant = Grant(want, parks=spec.park_after_s > 0, min_replicas=spec.min_replicas)
        self.asks[grant] = ask = Ask(grant, deployment, firm=firm)
        return ask

    def may_guess(self, deployment: Deployment) -> bool:
        """Whether a replica may be made ready before anybody asks for it. Where another scheduler gives GPUs away, what
        is left of them is not known here."""
        spec = deployment.spec
        return not spec.gpus or (self._gpus.is_ours and self._gpus.is_spare(Want.of(deployment.key, spec)))

    def for_wake(self, member: Member) -> Ask:
        """An ask for a parked replica, to be `granted`."""
        assert member.grant is not None
        self.asks[member.grant] = ask = Ask(member.grant, member.replica.deployment, member)
        return ask

    async def granted(self, ask: Ask) -> int:
        """Returns how many nanoseconds it took. Raises what `Gpus.acquire` does."""
        try:
            ask.check()
            await self._gpus.acquire(ask.grant, ask.deployment.spec.start_timeout_s)
            ask.check()
            return time.time_ns() - ask.began_at_ns
        except Withdrawn:
            self._gpus.parked(ask.grant)  # it may have been given at the last moment
            raise
        finally:
            del self.asks[ask.grant]

    def withdraw(self, surplus: int, is_wanted: Callable[[Deployment], bool]) -> None:
        """Withdraw what nobody wants: asks for a revision that is past, and `surplus` others, the latest first."""
        for ask in reversed(list(self.asks.values())):
            if ask.is_withdrawn or (ask.member is not None and ask.member.in_flight):
                continue
            if not is_wanted(ask.deployment):
                self._withdraw(ask)
            elif surplus > 0 and not ask.firm:
                self._withdraw(ask)
                surplus -= 1

    def withdraw_all(self) -> None:
        for ask in list(self.asks.values()):
            self._withdraw(ask)

    def _withdraw(self, ask: Ask) -> None:
        ask.is_withdrawn = True
        self._gpus.withdraw(ask.grant)

    def loosen(self) -> None:
        """From now on only requests call for what is asked."""
        for ask in self.asks.values():
            ask.firm = False

    @property
    def waking(self) -> int:
        """Parked replicas that wait for their GPUs."""
        return sum(ask.member is not None for ask in self.asks.values())

    def sleepers(self, members: Iterable[Member]) -> list[Member]:
        """Parked replicas that could be woken and are not; those that hold requests first."""
        asleep = [m for m in members if m.asleep and m.grant not in self.asks and not m.stopping]
        return sorted((m for m in asleep if m.takes_work or m.in_flight), key=lambda m: not m.in_flight)

    # Having -------------------------------------------------------------------------------------

    def hold(self, member: Member) -> None:
        """The replica of a grant is there."""
        if member.grant is not None:
            member.grant.holder = _Holder(member, self)

    def parked(self, member: Member) -> None:
        """It gave its memory back: it takes no request until it has some again."""
        if member.grant is not None:
            member.asleep = True
            self._gpus.parked(member.grant)

    def woken(self, member: Member, gpu_wait_ns: int) -> None:
        """It has GPUs again: requests can be sent to it while it comes up."""
        assert member.grant is not None
        member.asleep = False
        member.began_at_ns = time.time_ns()
        member.gpu_wait_ns = gpu_wait_ns
        member.replica.resume(member.grant.uuids)

    def stopping(self, member: Member) -> None:
        """It needs to wake no more."""
        if member.grant is not None:
            ask = self.asks.get(member.grant)
            if ask is not None:
                self._withdraw(ask)
            self._gpus.changed()

    def ended(self, member: Member) -> None:
        if member.grant is not None:
            self.stopping(member)
            self._gpus.release(member.grant)

    def measured(self, record: StartRecord) -> None:
        """How long a replica took to come up, without its waits."""
        if not record.error:
            self._took_s[record.rung is Rung.RESUME] = record.total_ns / 1e9

    def holders(self, deployment: Deployment) -> str:
        """Who has the GPUs, for people."""
        return self._gpus.holders(Want.of(deployment.key, deployment.spec))

    def wake_s(self, grant: Grant, *, parks: bool) -> float:
        copied_s = _RESUME_S + grant.want.bytes_of(grant.devices[0]) / _RESUME_BYTES_PER_S
        return self._took_s.get(parks, copied_s if parks else _START_S)

    def evict(self, member: Member, *, park: bool) -> None:
        if member.in_flight or member.stopping:
            return
        if park:
            member.replica.park()
        else:
            self._stop(member, "evicted")


@dataclass(frozen=True, slots=True)
class _Holder:
    """See `adapter.openfaas.gpus.Holder`."""

    member: Member
    claims: Claims

    @property
    def name(self) -> str:
        return self.member.replica.id

    @property
    def state(self) -> ClaimState:
        member = self.member
        if member.state in (ReplicaState.STOPPING, ReplicaState.GONE):
            return ClaimState.LEAVING
        if member.state is not ReplicaState.SERVING:
            return ClaimState.STARTING  # a parked one that holds its grant is waking
        at_rest = not member.in_flight and not member.replica.building_snapshot
        return ClaimState.IDLE if at_rest else ClaimState.RUNNING

    @property
    def idle_since_s(self) -> float | None:
        return self.member.idle_since_s

    def wake_s(self, *, parks: bool) -> float:
        assert self.member.grant is not None
        return self.claims.wake_s(self.member.grant, parks=parks)

    def evict(self, *, park: bool) -> None:
        self.claims.evict(self.member, park=park)
