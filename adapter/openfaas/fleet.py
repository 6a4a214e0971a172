"""The activator: one function's replicas, the requests that wait for them, and when to start, park and stop.

Decisions are `adapter.policy.scaling`'s; here they are carried out. A request takes a slot in a replica
(`slot`), also in one that still starts or is parked: its entrypoint holds the request, so nothing polls
for readiness and no wake is started twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from adapter.errors import AdapterError, HandlerError, Overloaded, Timeout, Unavailable
from adapter.hosts import Deployment, Host, Replica, ReplicaState
from adapter.policy.scaling import Park, ReplicaView, Start, Stop, decide, next_deadline_s
from adapter.records import Event, EventName, LeasePhase, StartRecord

logger = logging.getLogger(__name__)

_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""After failed starts in a row: no request wakes the function meanwhile."""

STOP_GRACE_S = 35.0
"""Longer than an entrypoint's own drain, so that a drain ends by itself."""


@dataclass(eq=False)
class Member:
    """One replica of the fleet. `rung` is how it last came up; empty until it has."""

    replica: Replica
    began_at_ns: int
    in_flight: int = 0
    idle_since_s: float | None = None
    outdated: bool = False
    stopping: bool = False
    rung: str = ""

    @property
    def state(self) -> ReplicaState:
        return ReplicaState.STOPPING if self.stopping else self.replica.state

    @property
    def takes_work(self) -> bool:
        live = (ReplicaState.STARTING, ReplicaState.SERVING, ReplicaState.PARKED)
        return not self.outdated and self.state in live

    @property
    def lease_phase(self) -> LeasePhase:
        if self.state is ReplicaState.STARTING:
            return LeasePhase.RESTORING
        if self.state in (ReplicaState.STOPPING, ReplicaState.GONE):
            return LeasePhase.DRAINING
        if self.in_flight:
            return LeasePhase.RUNNING
        return LeasePhase.PARKED if self.state is ReplicaState.PARKED else LeasePhase.IDLE


class Observer:
    """What the fleet reports to. Methods do nothing here; a gateway overrides them."""

    def started(self, fleet: Fleet, record: StartRecord) -> None: ...

    def changed(self, fleet: Fleet, member: Member) -> None:
        """Called whenever a member's lease phase may have changed."""

    def ended(self, fleet: Fleet, member: Member) -> None: ...


@dataclass(frozen=True, slots=True)
class Slot:
    """A request's place in a replica. `cold`: it waited for a start, or the replica had to be woken."""

    member: Member
    cold: bool


@dataclass(eq=False)
class Fleet:
    """One function. All methods run on the event loop."""

    host: Host
    deployment: Deployment
    observer: Observer = field(default_factory=Observer)
    clock: Callable[[], float] = time.monotonic
    members: dict[str, Member] = field(default_factory=dict)
    snapshot: dict[str, object] = field(default_factory=dict)
    """The last SNAPSHOT event's fields; empty when there was none."""
    preparing: str = "waiting"
    """Why no replica can be started yet, or empty."""
    problem: AdapterError | None = None
    """Why the deployment cannot be prepared at all."""

    def __post_init__(self) -> None:
        self._waiting: deque[asyncio.Future[Member]] = deque()
        self._pending = 0  # replicas that the host was asked for and has not given yet
        self._extra = 0  # replicas wanted beside what requests call for: a deploy's first ones
        self._failures = 0
        self._failure: AdapterError | None = None
        self._retry_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def available(self) -> int:
        return sum(m.takes_work and m.state is not ReplicaState.STARTING for m in self.members.values())

    @property
    def desired(self) -> int:
        return sum(m.takes_work for m in self.members.values()) + self._pending

    # Requests -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """A place in a replica for one request. Raises `Overloaded`, `Timeout`, `HandlerError`, `Unavailable`."""
        member = self._free_member()
        cold = member is None or member.state is not ReplicaState.SERVING
        if member is None:
            member = await self._wait()
            cold = cold and not member.rung or member.state is not ReplicaState.SERVING
        else:
            self._occupy(member)
        try:
            yield Slot(member, cold)
        finally:
            self._release(member)

    def _free_member(self) -> Member | None:
        """The best replica with room: awake before parked before starting, the fullest first."""
        order = {ReplicaState.SERVING: 0, ReplicaState.PARKED: 1, ReplicaState.STARTING: 2}
        limit = self.deployment.spec.in_flight
        free = [m for m in self.members.values() if m.takes_work and m.in_flight < limit]
        return min(free, key=lambda m: (order[m.state], -m.in_flight), default=None)

    async def _wait(self) -> Member:
        spec = self.deployment.spec
        self._refuse_if_hopeless()
        future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self.evaluate()
        try:
            return await asyncio.wait_for(future, spec.start_timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as exc:
            raise Timeout(
                f"{self.deployment.key} had no free replica within {spec.start_timeout_s:g} s.",
                why=self._where_it_hangs(),
                hint="Raise scale.max, scale.in_flight or limits.start_timeout.",
                code="wake-timeout",
            ) from exc
        finally:
            if future in self._waiting:
                self._waiting.remove(future)
            if future.done() and not future.cancelled() and future.exception() is None:
                pass  # the slot is the caller's
            elif not self._waiting:
                self.evaluate()

    def _refuse_if_hopeless(self) -> None:
        if self.problem is not None:
            raise self.problem
        if self._closing:
            raise Unavailable("This gateway is shutting down.", code="draining", retry_after_s=1)
        wait_s = self._retry_at_s - self.clock()
        if self._failure is not None and wait_s > 0 and not any(m.takes_work for m in self.members.values()):
            failure = self._failure
            raise HandlerError(failure.message, why=failure.why, hint=failure.hint, code=failure.code, retry_after_s=wait_s)
        if len(self._waiting) >= self.deployment.spec.queue:
            raise Overloaded(
                f"Too many requests wait for {self.deployment.key}.",
                why=f"{self.deployment.spec.queue} do already (scale.queue).",
                hint="Retry later, or raise scale.max or scale.in_flight.",
                code="queue-full",
                retry_after_s=1,
            )

    def _where_it_hangs(self) -> str:
        if self.preparing:
            return f"It is being prepared: {self.preparing}."
        states = ", ".join(f"{m.replica.id} is {m.state.value} with {m.in_flight} in flight" for m in self.members.values())
        return f"Replicas: {states or 'none'}; {len(self._waiting)} requests wait."

    def _occupy(self, member: Member) -> None:
        member.in_flight += 1
        member.idle_since_s = None
        self.observer.changed(self, member)

    def _release(self, member: Member) -> None:
        member.in_flight -= 1
        if not member.in_flight:
            member.idle_since_s = self.clock()
        self._dispatch()
        self.observer.changed(self, member)
        self.evaluate()

    def _dispatch(self) -> None:
        """Give free places to those who wait, in order."""
        while self._waiting:
            member = self._free_member()
            if member is None:
                return
            future = self._waiting.popleft()
            if not future.done():
                self._occupy(member)
                future.set_result(member)

    # Scaling ------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Compare what is with what should be, and act. Cheap; called after every change."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._closing or self.preparing or self.problem is not None:
            return
        now = self.clock()
        views = self._views()
        waiting = max(len(self._waiting), self._extra * self.deployment.spec.in_flight)
        for action in decide(self.deployment.spec, views, waiting, now):
            if isinstance(action, Start) and now >= self._retry_at_s:
                for _ in range(action.count):
                    self._pending += 1
                    self._run(self._start())
            elif isinstance(action, Park):
                self.members[action.replica_id].replica.park()
            elif isinstance(action, Stop):
                self._run(self._stop(self.members[action.replica_id], action.reason))
        self._schedule(now)

    def _views(self) -> list[ReplicaView]:
        pending = [ReplicaView(f"pending-{n}", "starting", 0, None) for n in range(self._pending)]
        return pending + [
            ReplicaView(
                m.replica.id, m.state.value, m.in_flight, m.idle_since_s, m.replica.building_snapshot, m.outdated
            )
            for m in self.members.values()
        ]

    def _schedule(self, now: float) -> None:
        deadlines = [next_deadline_s(self.deployment.spec, self._views(), now)]
        if self._retry_at_s > now and (self._waiting or self._extra or self.deployment.spec.min_replicas):
            deadlines.append(self._retry_at_s)
        soonest = min((d for d in deadlines if d is not None), default=None)
        if soonest is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.01, soonest - now + 0.005), self.evaluate)

    async def _start(self) -> None:
        began_at_ns = time.time_ns()
        deployment = self.deployment
        try:
            replica = await self.host.start(deployment, self._on_event)
        except (AdapterError, OSError) as error:
            self._pending -= 1
            self._start_failed(_as_adapter_error(error))
            return
        self._pending -= 1
        self._extra = max(0, self._extra - 1)
        member = Member(replica, began_at_ns, outdated=deployment is not self.deployment)
        self.members[replica.id] = member
        self.observer.changed(self, member)
        self._dispatch()
        self.evaluate()

    async def _stop(self, member: Member, reason: str) -> None:
        if member.stopping:
            return
        member.stopping = True
        logger.info("stopping a replica", extra={"fields": {"replica": member.replica.id, "reason": reason}})
        self.observer.changed(self, member)
        await member.replica.stop(STOP_GRACE_S)

    def _run(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[arg-type, var-annotated]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Events -------------------------------------------------------------------------------------

    def _on_event(self, replica: Replica, event: Event) -> None:
        member = self.members.get(replica.id)
        if event.name is EventName.SNAPSHOT:
            self.snapshot = dict(event.fields)
        if member is None:  # its first words may come before `host.start` has returned
            return
        if event.name is EventName.SERVING:
            member.rung = str(event.fields.get("rung", ""))
            self._failures, self._failure = 0, None
            if not member.in_flight:
                member.idle_since_s = self.clock()
        elif event.name is EventName.STARTED:
            self._record(member, event)
        elif event.name is EventName.PARKED:
            member.idle_since_s = member.idle_since_s or self.clock()
        elif event.name is EventName.FAILED:
            self._record(member, event)
            reason = str(event.fields.get("reason", ""))
            error = HandlerError(
                f"{self.deployment.key} cannot be started.", why=reason,
                hint=f"See its log: gpufn logs {self.deployment.name}", code=str(event.fields.get("code", "failed")),
            )  # fmt: skip
            self._start_failed(error)
            self._run(self._stop(member, "failed"))
        elif event.name is EventName.STOPPED:
            del self.members[replica.id]
            self.observer.ended(self, member)
            self._run(self._soon_evaluate())
            return
        self._dispatch()
        self.observer.changed(self, member)
        self.evaluate()

    async def _soon_evaluate(self) -> None:
        self.evaluate()

    def _record(self, member: Member, event: Event) -> None:
        try:
            record = StartRecord.from_json(event.fields["record"])
        except (KeyError, ValueError):
            logger.exception("a replica's start record cannot be read")
            return
        if member.began_at_ns:
            record = record.with_host_time(member.began_at_ns)
            member.began_at_ns = 0  # later starts of the same replica are its own
        self.observer.started(self, record)

    def _start_failed(self, error: AdapterError) -> None:
        """Everybody who waits hears why; the next try waits longer."""
        self._failure = error
        self._retry_at_s = self.clock() + _BACKOFF_S[min(self._failures, len(_BACKOFF_S) - 1)]
        self._failures += 1
        self._extra = 0
        error.retry_after_s = self._retry_at_s - self.clock()
        logger.warning("a start failed", extra={"fields": {"function": self.deployment.key, "why": error.why or error.message}})
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)

    # Deployments --------------------------------------------------------------------------------

    def update(self, deployment: Deployment) -> None:
        """A new revision: its replicas take all new work, the old ones finish theirs."""
        self.deployment = deployment
        self.preparing = "waiting"
        self.problem = None
        self._failures, self._failure, self._retry_at_s = 0, None, 0.0
        for member in self.members.values():
            member.outdated = True

    def prepared(self, problem: AdapterError | None, *, initial: int) -> None:
        """The host can start it now, `initial` replicas at once; or never will (`problem`)."""
        self.preparing, self.problem = "", problem
        if problem is not None:
            self._start_failed(problem)
            return
        self._extra = initial
        self.evaluate()

    def scale(self, replicas: int) -> None:
        """What `scale-function` asks: up to a number at once, or down to zero as soon as all are idle."""
        if replicas == 0:
            for member in self.members.values():
                if not member.in_flight:
                    self._run(self._stop(member, "scaled to zero"))
        self._extra = max(0, min(replicas, self.deployment.spec.max_replicas) - self.desired)
        self._retry_at_s = 0.0
        self.evaluate()

    async def close(self) -> None:
        """Refuse what waits, let finish what runs."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        self._start_failed(Unavailable("This gateway is shutting down.", code="draining", retry_after_s=1))
        await asyncio.gather(*(self._stop(member, "closing") for member in list(self.members.values())))
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _as_adapter_error(error: Exception) -> AdapterError:
    if isinstance(error, AdapterError):
        return error
    return Unavailable("A replica cannot be started.", why=f"{error}.", code="host-failed")
