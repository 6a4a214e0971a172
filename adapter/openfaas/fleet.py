"""One function's replicas: who gets which request, and when replicas start, park and stop.

Decisions are `adapter.policy.scaling`'s; here they are carried out, after every change and at the next
deadline that the policy names. A request takes a slot in a replica, also in one that still starts or is
parked: its entrypoint holds the request, so nothing polls for readiness and no wake is begun twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from adapter.errors import (
    AdapterError,
    HandlerError,
    Overloaded,
    Timeout,
    Unavailable,
)
from adapter.hosts import Deployment, EventSink, Host, Replica, ReplicaState
from adapter.hosts.background import Background
from adapter.openfaas.activator import Waiters
from adapter.openfaas.claims import Ask, Claims
from adapter.openfaas.gpus import RETRY_AFTER_S, Gpus, Withdrawn
from adapter.openfaas.members import Member, Slot
from adapter.openfaas.rollout import Rollout
from adapter.openfaas.setbacks import Setbacks, for_caller
from adapter.openfaas.wire import shutting_down, unknown_function
from adapter.policy.budget import SPENT_CODE, Budget, unbounded
from adapter.policy.keep_alive import History, KeepAlive, Wake, keep_alive
from adapter.policy.scaling import Park, ReplicaView, Start, decide, needed_replicas, next_deadline_s
from adapter.records import Event, EventName, Rung, SkippedRung, StartRecord
from adapter.spec import FunctionSpec

logger = logging.getLogger(__name__)

STOP_GRACE_S = 35.0
"""Longer than an entrypoint's own drain, so that a drain ends by itself."""

SPENT_RETRY_S = 60.0
"""While a budget is spent, until it is looked again whether what is to run may: a minimum, or a revision that is to
follow, where a cluster's webhook refuses it."""

_TIMER_SLACK_S = 0.005
"""Timers may fire a little early; what is due then must be due."""


class Observer:
    """What a fleet reports to. Does nothing here."""

    def started(self, fleet: Fleet, record: StartRecord) -> None: ...

    def changed(self, fleet: Fleet, member: Member) -> None:
        """The member's lease phase may have changed."""

    def ended(self, fleet: Fleet, member: Member) -> None: ...


@dataclass(eq=False)
class Fleet:
    """One function. Everything runs on the event loop."""

    host: Host
    deployment: Deployment
    observer: Observer = field(default_factory=Observer)
    gpus: Gpus = field(default_factory=Gpus)
    budget_of: Callable[[str, float], Budget] = unbounded
    """Of a function (``name.namespace``) and its limit: see `adapter.ledger.held.HeldToday.budget`."""
    clock: Callable[[], float] = time.monotonic
    members: dict[str, Member] = field(default_factory=dict)
    snapshot: dict[str, object] = field(default_factory=dict)
    """The last SNAPSHOT event's fields; empty when there was none."""

    def __post_init__(self) -> None:
        self.rollout = Rollout(self.deployment)
        self._waiters: Waiters[Slot] = Waiters(lambda slot: self._release(slot.member))
        self._early: dict[str, list[Event]] = {}  # events of replicas that `host.start` has not returned yet
        self._pending = 0  # replicas that the host was asked for and has not given yet
        self._unwanted = 0  # how many of these are not wanted any more
        self._floor = 0  # replicas wanted beside what requests call for, until so many are asked for
        self._setbacks = Setbacks()
        self._timer: asyncio.TimerHandle | None = None
        self._background = Background()
        self._claims = Claims(self.gpus, self._stop)
        self._lost_park: SkippedRung | None = None
        self._history = History()
        self._requests = 0  # that wait or have a slot
        self.keep_alive: KeepAlive = keep_alive(self.deployment.spec, self._history.habits(self.clock()))
        self._closing: Callable[[str], AdapterError] | None = None
        self._left: asyncio.Event | None = None
        """Set when no request is under way any more, once somebody waits for that."""

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    @property
    def available(self) -> int:
        return sum(m.takes_work and m.state is not ReplicaState.STARTING for m in self.members.values())

    @property
    def desired(self) -> int:
        return self._capable() + self._pending

    @property
    def status(self) -> str:
        """For people: ``preparing: …``, ``failed: …``, ``waiting: …`` where nothing runs because of that, or empty."""
        if self.rollout.status or self._capable():
            return self.rollout.status
        now_ns = time.time_ns()
        if self._budget_refusal(now_ns) is not None:
            return f"waiting: {self.budget.text(now_ns)}"
        error = self._setbacks.error
        return "" if error is None else f"failed: {error.message} {error.why}".strip()

    def _capable(self) -> int:
        return sum(m.takes_work for m in self.members.values())

    # Requests -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """A place in a replica for one request. Raises `Overloaded`, `Timeout`, `HandlerError`, `Unavailable`."""
        if (spent := self._budget_refusal(time.time_ns())) is not None:
            raise spent  # not heard of as traffic: who comes again and again would teach when not to rest
        self._enter()
        try:
            member = None if self._waiters else self._free_member()
            slot = await self._wait() if member is None else self._occupy(member)
            try:
                yield slot
            finally:
                self._release(slot.member)
        finally:
            self._leave()

    def _enter(self) -> None:
        self._requests += 1
        if self._requests == 1 and self._history.busy(self.clock()):
            self._choose_keep_alive()

    def _leave(self) -> None:
        self._requests -= 1
        if not self._requests:
            self._history.idle(self.clock())

    def _free_member(self) -> Member | None:
        limit = self.deployment.spec.in_flight
        free = (m for m in self.members.values() if m.takes_work and m.in_flight < limit and not m.asleep)
        return min(free, key=lambda m: m.preference, default=None)

    async def _wait(self) -> Slot:
        refusal = self._refusal()
        if refusal is not None:
            raise refusal
        limit_s = self.deployment.spec.start_timeout_s
        ticket = self._waiters.enter()
        self.evaluate()
        try:
            return await self._waiters.claim(ticket, limit_s)
        except asyncio.TimeoutError as exc:
            raise self._waited_too_long(limit_s) from exc
        finally:
            self._look_whether_left()
            if self._claims.asks:  # one fewer may wait for them
                self.evaluate()

    def _refusal(self) -> AdapterError | None:
        """Why a request need not wait."""
        if self.rollout.broken is not None:
            return for_caller(self.rollout.broken, self.deployment)
        if self._closing is not None:
            return self._closing(self.deployment.key)
        now = self.clock()
        if self._setbacks.error is not None and self._setbacks.holds(now) and not self.desired:
            return self._setbacks.for_caller(self.deployment, now)
        spec = self.deployment.spec
        startable = max(0, spec.max_replicas - self._capable()) * spec.in_flight  # who waits for a start is no queue
        if len(self._waiters) >= spec.queue + startable:
            return Overloaded(
                f"Too many requests wait for {self.deployment.key}.",
                why=f"{len(self._waiters)} do already (scale.queue = {spec.queue}).",
                hint="Retry later, or raise scale.max or scale.in_flight.",
                code="queue-full",
                retry_after_s=1,
            )
        return None

    def _waited_too_long(self, limit_s: float) -> Timeout:
        members = [m for m in self.members.values() if m.takes_work]
        if self._claims.asks:
            return Timeout(
                f"{self.deployment.key} had no GPU within {limit_s:g} s.",
                why=f"It waited for one (gpu_wait). {self._claims.holders(self.deployment)}",
                hint="Retry later; see who holds what: gpufn nodes",
                code="gpu-wait-timeout",
                retry_after_s=RETRY_AFTER_S,
            )
        if self.rollout.preparing:
            phase, why = "prepare", f"It is being prepared: {self.rollout.preparing}."
        elif not members or all(m.state is ReplicaState.STARTING for m in members):
            hindrance = self.host.hindrance(self.deployment.key)
            started = "Its replicas were starting all the time." if members else "No replica has started."
            phase, why = "start", f"Its start waits: {hindrance}." if hindrance else started
        else:
            phase, why = "queue", f"{len(members)} replicas were busy, and {len(self._waiters)} requests wait."
        return Timeout(
            f"{self.deployment.key} had no free replica within {limit_s:g} s.",
            why=why,
            hint="Raise scale.max, scale.in_flight or limits.start_timeout.",
            code=f"{phase}-timeout",
        )

    def _occupy(self, member: Member) -> Slot:
        member.in_flight += 1
        member.idle_since_s = None
        self.observer.changed(self, member)
        return Slot(member, cold=member.state is not ReplicaState.SERVING, lives=member.lives)

    def _release(self, member: Member) -> None:
        member.in_flight -= 1
        if not member.in_flight:
            member.idle_since_s = self.clock()
            if member.grant is not None:
                self.gpus.changed()
        self._dispatch()
        self._look_whether_left()
        if member.replica.id in self.members:  # it may have ended under its requests
            self.observer.changed(self, member)
        self.evaluate()

    def _dispatch(self) -> None:
        """Give free places to those who wait, in order."""
        while self._waiters:
            member = self._free_member()
            if member is None:
                return
            slot = self._occupy(member)
            if not self._waiters.give(slot):
                self._release(member)

    def discard(self, member: Member, reason: str) -> None:
        """A replica that refuses connections is of no use to anybody."""
        self._stop(member, reason)
        self.evaluate()

    # Scaling ------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Compare what is with what should be, and act. Cheap; called after every change."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._closing is not None or self.rollout.preparing or self.rollout.broken is not None:
            return
        if self.rollout.is_ready and not self._capable():
            self._switch()
        now = self.clock()
        spec = self.deployment.spec
        if (floor := max(self._floor, self._expected(now))) > spec.min_replicas:
            spec = replace(spec, min_replicas=min(spec.max_replicas, floor))
        held, wall_ns = self._setbacks.holds(now), time.time_ns()
        spent_s = self.budget.opens_in_s(wall_ns)
        for action in decide(spec, self._views(), len(self._waiters), now, keep_alive_s=self.keep_alive.seconds):
            if isinstance(action, Start):
                if not held and not spent_s:
                    self._start_more(action.count)
            elif isinstance(action, Park):
                self.members[action.replica_id].replica.park()
            elif action.replica_id in self.members:
                self._stop(self.members[action.replica_id], action.reason)
            else:
                self._unwanted += 1  # one of those that are not there yet
        if spec.gpus or self._claims.asks:
            self._ask_for_gpus(spec, held=held, spent=spent_s > 0)
        if not held:
            self._floor = 0  # asked for
        if self._waiters and (refusal := self._budget_refusal(wall_ns)) is not None:
            self._waiters.fail(lambda: for_caller(refusal, self.deployment))
        self._schedule(now, spent_s)

    def _views(self) -> list[ReplicaView]:
        pending = [ReplicaView(f"pending-{n}", "starting", 0, None) for n in range(self._pending - self._unwanted)]
        return pending + [m.view() for m in self.members.values() if m.outdated or not m.upcoming]

    def _schedule(self, now: float, spent_s: float) -> None:
        keep_alive_s = self.keep_alive.seconds
        deadlines = [next_deadline_s(self.deployment.spec, self._views(), now, keep_alive_s=keep_alive_s)]
        if self._setbacks.holds(now) and (self._waiters or self._floor or self.deployment.spec.min_replicas):
            deadlines.append(self._setbacks.retry_at_s)
        if spent_s and self.deployment.spec.min_replicas:
            deadlines.append(now + min(spent_s, SPENT_RETRY_S))  # the calendar may jump meanwhile
        deadlines += [instant for instant in self._expectation() if instant > now]
        soonest = min((d for d in deadlines if d is not None), default=None)
        if soonest is not None:
            self._timer = asyncio.get_running_loop().call_later(soonest - now + _TIMER_SLACK_S, self.evaluate)

    def _choose_keep_alive(self) -> None:
        """Whenever there is something new to choose by."""
        habits, current_s = self._history.habits(self.clock()), self.keep_alive.seconds
        self.keep_alive = keep_alive(self.deployment.spec, habits, current_s=current_s, may_prewarm=True)

    def _expectation(self) -> tuple[float, ...]:
        """From when until when a caller is expected, so that a replica should be ready; empty where none is."""
        idle_since_s, prewarm = self._history.idle_since_s, self.keep_alive.prewarm
        if idle_since_s is None or prewarm is None:
            return ()
        return idle_since_s + prewarm.after_s, idle_since_s + prewarm.until_s

    def _expected(self, now: float) -> int:
        """How many replicas should be ready for callers who have not come yet."""
        expectation = self._expectation()
        if not expectation or not expectation[0] <= now < expectation[1]:
            return 0
        awake = self._pending or any(m.takes_work and not m.asleep for m in self.members.values())
        return int(bool(awake) or self._claims.may_guess(self.deployment))

    def _start_more(self, count: int) -> None:
        for _ in range(count):
            self._pending += 1
            self._run_start(self.deployment, firm=self._floor > 0)

    def _run_start(self, deployment: Deployment, *, firm: bool, upcoming: bool = False) -> None:
        ask = self._claims.for_start(deployment, firm=firm, replaces=upcoming)
        self._background.run(self._start(deployment, ask, time.time_ns(), upcoming=upcoming))

    async def _start(self, deployment: Deployment, ask: Ask | None, began_at_ns: int, *, upcoming: bool) -> None:
        replica, gpu_wait_ns = None, 0
        grant = None if ask is None else ask.grant
        try:
            if ask is not None:
                gpu_wait_ns, began_at_ns = await self._claims.granted(ask), time.time_ns()
            replica = await self.host.start(deployment, self._on_event, grant.uuids if grant else ())
        except Withdrawn:
            pass
        except (AdapterError, OSError) as error:
            self._start_failed(deployment, _as_adapter_error(error))
        finally:
            self._pending -= not upcoming
            if grant is not None and replica is None:
                self.gpus.release(grant)
        if replica is None:
            self._unwanted = min(self._unwanted, self._pending)
            self.evaluate()
            return
        outdated = not self.rollout.wants(deployment)
        follows = upcoming and deployment is not self.deployment  # the one before may have ended meanwhile
        member = Member(replica, began_at_ns, upcoming=follows, outdated=outdated, grant=grant, gpu_wait_ns=gpu_wait_ns)
        self._claims.hold(member)
        if self._unwanted and not upcoming:
            self._unwanted -= 1
            member.outdated = True
        self.members[replica.id] = member
        self._changed(member)
        for event in self._early.pop(replica.id, []):
            self._on_event(replica, event)
        if self._closing is not None:
            self._stop(member, "closing")

    def _ask_for_gpus(self, spec: FunctionSpec, *, held: bool, spent: bool) -> None:
        """Wake as many parked replicas as are needed, and withdraw what is asked above that."""
        able = [m for m in self.members.values() if m.takes_work]
        needed = needed_replicas(spec, len(self._waiters) + sum(m.in_flight for m in able))
        reach = sum(not m.asleep for m in able) + self._pending - self._unwanted + self._claims.waking
        self._claims.withdraw(reach - needed, self.rollout.wants)
        if held:
            return
        for member in self._claims.sleepers(self.members.values()):
            if member.in_flight or (reach < needed and not spent):
                reach += 1
                self._background.run(self._wake(member, self._claims.for_wake(member)))

    async def _wake(self, member: Member, ask: Ask) -> None:
        try:
            self._claims.woken(member, await self._claims.granted(ask))
        except Withdrawn:
            pass
        except AdapterError as error:
            self._start_failed(member.replica.deployment, error)
        if member.replica.id in self.members:
            self._changed(member)

    def _changed(self, member: Member) -> None:
        self._dispatch()
        self.observer.changed(self, member)
        self.evaluate()

    def _stop(self, member: Member, reason: str) -> None:
        if member.stopping:
            return
        member.stopping = True
        self._claims.stopping(member)
        logger.info("stopping a replica", extra={"fields": {"replica": member.replica.id, "reason": reason}})
        self.observer.changed(self, member)
        self._background.run(member.replica.stop(STOP_GRACE_S))

    # Its budget: spent, nothing is started or woken but for a request that a replica has, or for a rollout ------

    @property
    def budget(self) -> Budget:
        """As far as is known what it held."""
        return self.budget_of(self.deployment.key, self.deployment.spec.budget_gpu_s)

    def _budget_refusal(self, now_ns: int) -> AdapterError | None:
        """Why nobody will have a replica; None where one runs, or may."""
        runs = self._pending or self._claims.waking or any(m.takes_work and not m.asleep for m in self.members.values())
        return None if runs else self.budget.refusal(now_ns)

    # Events -------------------------------------------------------------------------------------

    def _on_event(self, replica: Replica, event: Event) -> None:
        member = self.members.get(replica.id)
        if event.name is EventName.SNAPSHOT:
            self.snapshot = dict(event.fields)
            logger.info("news of a snapshot", extra={"fields": {"function": self.deployment.key, **event.fields}})
        if member is None:
            self._early.setdefault(replica.id, []).append(event)
            return
        if event.name is EventName.SERVING:
            self._serves(member, str(event.fields.get("rung", "")))
        elif event.name is EventName.PARKED:
            member.awake.clear()
            self._claims.parked(member)
            self._learn_parking()
        elif event.name is EventName.MODEL_EXITED:
            member.awake.clear()
            member.exits += 1
            self._note_lost_park(member, event)
            if member.asleep:  # what it would start now has no GPU
                self._stop(member, "ended while parked")
        elif event.name is EventName.STARTED:
            self._record(member, event)
        elif event.name is EventName.FAILED:
            self._record(member, event)
            self._lost(member, str(event.fields.get("code", "failed")), str(event.fields.get("reason", "")))
        elif event.name is EventName.STOPPED:
            self._ended(member, event)
            return
        self._changed(member)

    def _learn_parking(self) -> None:
        """Not every GPU's driver can: that it does is seen when it does."""
        if not self._history.parks:
            self._history.parks = True
            self._choose_keep_alive()

    def _note_lost_park(self, member: Member, event: Event) -> None:
        """A GPU process that was lost while it was parked, or on the way there: told in the start that replaces it."""
        if member.replica.deployment.spec.gpus:
            code, reason = (str(event.fields.get(name, "")) for name in ("code", "reason"))
            self._lost_park = SkippedRung(Rung.RESUME, code or "model-exited", reason)

    def _serves(self, member: Member, rung: str) -> None:
        if member.asleep:
            self._stop(member, "woke without a GPU of its own")
        member.rung = rung
        member.lives += 1
        member.awake.set()
        if not member.in_flight:
            member.idle_since_s = self.clock()
        self._setbacks.served()
        if member.upcoming and not member.outdated:
            self._switch()

    def _ended(self, member: Member, event: Event) -> None:
        del self.members[member.replica.id]
        self._claims.ended(member)
        member.exits += 1
        member.awake.set()
        self.observer.ended(self, member)
        if not member.lives and not member.stopping:
            code, reason = event.fields.get("code", "replica-died"), event.fields.get("reason", "ended")
            self._lost(member, str(code), f"Its replica {reason} while it started.")
        # Its requests are told of their broken connections by the same turn of the loop: they go first.
        asyncio.get_running_loop().call_soon(self.evaluate)

    def _lost(self, member: Member, code: str, reason: str) -> None:
        """A replica that did not come up."""
        member.rung = ""
        member.awake.set()
        if not member.outdated and not member.stopping:
            error = HandlerError(
                f"{self.deployment.key} cannot be started.",
                why=reason,
                hint=f"See its log: gpufn logs {self.deployment.key}",
                code=code,
            )
            self._start_failed(member.replica.deployment, error)
        self._stop(member, "failed")

    def _record(self, member: Member, event: Event) -> None:
        try:
            record = StartRecord.from_json(event.fields["record"])
        except (KeyError, ValueError):
            logger.exception("a replica's start record cannot be read")
            return
        self._claims.measured(record)
        if member.began_at_ns:
            record = record.with_host_time(member.began_at_ns)
            member.began_at_ns = 0  # later starts of the same replica are its own
        if member.gpu_wait_ns:
            record = record.with_gpu_wait(member.gpu_wait_ns)
            member.gpu_wait_ns = 0
        if self._lost_park is not None and record.rung is not Rung.RESUME:
            record = replace(record, skipped=(self._lost_park, *record.skipped))
            self._lost_park = None
        if not record.error:
            self._history.woke(Wake.of(record))
            self._choose_keep_alive()
        self.observer.started(self, record)

    def _start_failed(self, deployment: Deployment, error: AdapterError) -> None:
        """Everybody who waits hears why, unless others serve; the next try waits longer."""
        fields = {"function": deployment.key, "revision": deployment.revision, "why": error.why or error.message}
        logger.warning("a start failed", extra={"fields": fields})
        if error.code == SPENT_CODE and self._follows(deployment):
            asyncio.get_running_loop().call_later(SPENT_RETRY_S, self._start_next, deployment)
            return
        if self.rollout.fail(deployment, error):
            return
        if not self._setbacks.add(error, self.clock()):
            return
        self._floor = 0
        if not any(m.takes_work and m.lives and not m.asleep for m in self.members.values()):
            self._waiters.fail(lambda: self._setbacks.for_caller(self.deployment, self.clock()))

    def _start_next(self, deployment: Deployment) -> None:
        """Unless nothing runs any more that it would follow: then it is started when somebody wants it."""
        if self._closing is None and self._follows(deployment) and self._capable():
            self._run_start(deployment, firm=True, upcoming=True)

    def _follows(self, deployment: Deployment) -> bool:
        """Whether it is the revision that is to take over."""
        return self.rollout.wants(deployment) and deployment is not self.deployment

    # Replicas of another life -------------------------------------------------------------------

    def deployment_of(self, revision: str) -> Deployment:
        """Ours where it runs or will; else a copy with that revision, which is past."""
        known = (self.deployment, self.rollout.latest)
        return next((one for one in known if one.revision == revision), replace(self.deployment, revision=revision))

    def adopt(self, replica: Replica) -> EventSink:
        """A replica that runs already is a member from now on; how it came up is not known."""
        deployment = replica.deployment
        wanted = self.rollout.wants(deployment)
        member = Member(replica, 0, upcoming=wanted and deployment is not self.deployment, outdated=not wanted)
        if replica.state is ReplicaState.SERVING:
            member.lives = 1
            member.awake.set()
            member.idle_since_s = self.clock()
        self.members[replica.id] = member
        fields = {"function": self.deployment.key, "replica": replica.id, "outdated": member.outdated}
        logger.info("a replica was taken back", extra={"fields": fields})
        asyncio.get_running_loop().call_soon(self._changed, member)
        return self._on_event

    # Deployments --------------------------------------------------------------------------------

    def update(self, deployment: Deployment) -> None:
        """A new revision, which takes over once it is prepared and, where replicas run, one of its serves."""
        for member in self.members.values():
            member.outdated = member.outdated or member.upcoming  # of a revision that never took over
        if self.rollout.begin(deployment):
            self.deployment = deployment
            self._choose_keep_alive()
        self.evaluate()

    def prepared(self, deployment: Deployment, problem: AdapterError | None, *, initial: int) -> None:
        """The host can start `deployment` now, `initial` replicas at once; or never will (`problem`)."""
        if not self.rollout.prepared(deployment, problem):
            return
        if problem is not None:
            if self.rollout.broken is not None:
                self._waiters.fail(lambda: for_caller(problem, deployment))
            return
        self._setbacks.forget()
        if self.rollout.is_ready and initial and self._capable():
            self._run_start(deployment, firm=True, upcoming=True)
            return
        self._floor = initial
        if self.rollout.is_ready:
            self._switch()
        self._dispatch()
        self.evaluate()

    def _switch(self) -> None:
        """The upcoming revision is the function from now on; replicas of the old one finish what they have."""
        self.deployment = self.rollout.switch()
        self._choose_keep_alive()
        for member in self.members.values():
            member.upcoming = False
            member.outdated = member.outdated or not self.rollout.wants(member.replica.deployment)

    def scale(self, replicas: int) -> None:
        """What `scale-function` asks, within the spec's bounds: more at once, fewer as they finish their requests.

        Raises `Overloaded` for more than the budget has."""
        spec = self.deployment.spec
        replicas = max(spec.min_replicas, min(replicas, spec.max_replicas))
        surplus = self.desired - self._unwanted - replicas
        if surplus < 0 and (spent := self.budget.refusal(time.time_ns())) is not None:
            raise spent
        idle_first = sorted((m for m in self.members.values() if m.takes_work), key=lambda m: m.in_flight)
        for member in idle_first[: max(0, surplus)]:
            member.outdated = True
        self._unwanted += min(self._pending - self._unwanted, max(0, surplus - len(idle_first)))
        self._floor = replicas if surplus < 0 else 0
        if surplus > 0:
            self._claims.loosen()
        self._setbacks.retry()
        self.evaluate()

    async def leave(self, limit_s: float) -> None:
        """Let requests that came be answered, `limit_s` at most, and let go of the replicas, which stay."""
        self._left = asyncio.Event()
        self._look_whether_left()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._left.wait(), limit_s)
        self._closing = shutting_down
        if self._timer is not None:
            self._timer.cancel()
        self._waiters.fail(lambda: shutting_down(self.deployment.key))
        self._claims.withdraw_all()
        self._background.cancel()
        await self._background.join()

    def _look_whether_left(self) -> None:
        if self._left is not None and not self._waiters and not any(m.in_flight for m in self.members.values()):
            self._left.set()

    async def close(self, *, removed: bool = False) -> None:
        """Send away what waits, let finish what runs."""
        closing: Callable[[str], AdapterError] = unknown_function if removed else shutting_down
        self._closing = closing
        if self._timer is not None:
            self._timer.cancel()
        self._waiters.fail(lambda: closing(self.deployment.key))
        self._claims.withdraw_all()
        for member in self.members.values():
            self._stop(member, "closing")
        await self._background.join()


def _as_adapter_error(error: Exception) -> AdapterError:
    if isinstance(error, AdapterError):
        return error
    return Unavailable("A replica cannot be started.", why=f"{error}.", code="host-failed")
