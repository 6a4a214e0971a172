"""The agent's rounds: look at the node, tell the meter, put what it tells into the spool.

A round is short and comes every two seconds and when a pod changes; a heartbeat, every ten seconds, asks replicas how
busy they were, and tells all that is not told yet. What is decided on the way is in `observe`, `meter` and `starts`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from adapter.agent import starts
from adapter.agent.cache import make_folder
from adapter.agent.kubelet import Allocation, Kubelet
from adapter.agent.meter import Calendar, Meter
from adapter.agent.metrics import Metrics
from adapter.agent.node_keeper import NodeKeeper
from adapter.agent.observe import Now, observe, still_there
from adapter.agent.pod_log import PodLog, log_folder
from adapter.agent.pods import Pod, intent_of, snapshot_intent_of
from adapter.agent.scrape import busy_ns
from adapter.agent.settings import AgentSettings
from adapter.agent.spool import Spool
from adapter.cluster.api import Api
from adapter.cluster.informer import Informer
from adapter.cluster.intent import Intent
from adapter.errors import AdapterError, Unavailable
from adapter.ledger.wire import AHEAD_LIMIT_NS, encode
from adapter.records import Event, EventName, StartRecord

logger = logging.getLogger(__name__)

ROUND_S = 2.0
HEARTBEAT_S = 10.0
"""How often all is told, and so what a node that dies can lose."""
_MERGED_S = 600.0
"""How often while the spool has no room: times are added up meanwhile."""
_PATIENCE_S = 30.0
"""A kubelet that says nothing for so long is not waited for: what containers hold is told without it."""
_HOUR_S = 3600
_SCRAPES = 32
_STARTS = 20
"""Start records of one pod in a heartbeat, and of one pod that wait to be told."""


def boot_id(path: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    return path.read_text().strip()


def now() -> Now:
    return Now(time.clock_gettime_ns(time.CLOCK_BOOTTIME), time.time_ns())


class Agent:
    """One node's agent. `pods` and `namespaces` are caches that others run."""

    def __init__(
        self,
        settings: AgentSettings,
        api: Api,
        spool: Spool,
        metrics: Metrics,
        pods: Informer[Pod],
        namespaces: Informer[Mapping[str, str]],
    ) -> None:
        self._settings, self._api, self._spool = settings, api, spool
        self._metrics, self._pods, self._namespaces = metrics, pods, namespaces
        self._kubelet = Kubelet(settings.kubelet_socket)
        self._intents: dict[str, Intent | None] = {}
        self._taken_for: dict[str, Intent] = {}
        """Of pods that take snapshots: the function's."""
        self._seen_at_ns: dict[str, int] = {}
        self._logs: dict[str, PodLog] = {}
        self._speaking: set[str] = set()
        """Pods whose entrypoint is ours."""
        self._gone: dict[str, Pod] = {}
        """Pods that the API server has no more, as it had them last: for one round."""
        self._told: dict[str, int] = {}
        """Of pods: the time of the event of the last start record that was put into the spool."""
        self._starts: list[tuple[str, int, StartRecord]] = []
        self._starts_heard: Counter[str] = Counter()
        """How many of each pod since the last heartbeat."""
        self._allocation = Allocation()
        self._allocated_at = time.monotonic()
        self.node = NodeKeeper(settings, api, metrics, lambda: self._allocation.shares)
        self._offset_ns = 0
        self.changed = asyncio.Event()
        self.on_append: Callable[[], None] = lambda: None
        """Called when records were put into the spool."""
        self._meter = self._go_on()
        pods.on_change(self._noticed)

    def _go_on(self) -> Meter:
        """From the state in the spool, or anew."""
        calendar = Calendar(boot_id(), now().wall_ns, now().boot_ns)
        state = self._spool.state or {}
        try:
            meter = Meter.from_json(state["meter"], self._settings.node)
            self._told = {str(uid): int(at_ns) for uid, at_ns in state["starts"].items()}
            self._speaking = set(self._told)
        except (KeyError, ValueError, TypeError, AttributeError):
            if state:
                logger.exception("the agent's state is another version's: it begins anew")
            return Meter(self._settings.node, calendar, secrets.token_hex(3))
        if meter.calendar.boot_id != calendar.boot_id:
            logger.warning("the node was started anew", extra={"fields": {"boot_id": calendar.boot_id}})
            records = [encode(record, meter.node) for record in meter.reboot(calendar)]
            if records:
                self._append(records, meter)
        return meter

    # Rounds -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it is cancelled. Both caches must have synced."""
        beat_at = time.monotonic()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=_SCRAPES)) as session:
            while True:
                self.changed.clear()
                try:
                    await self.round()
                    if time.monotonic() >= beat_at:
                        beat_at = time.monotonic() + _until_next(time.time(), self._interval_s())
                        await self.beat(session)
                    elif self._starts and not self._spool.is_full:
                        await self.tell()
                except Exception:  # boundary: whatever one round meets, the next one sees all there is again
                    logger.exception("a round failed")
                await self._rest(min(ROUND_S, max(0.0, beat_at - time.monotonic())))

    async def _rest(self, seconds: float) -> None:
        """A moment at least: pods that change all the time must not make rounds of that."""
        await asyncio.sleep(min(0.2, seconds))
        try:
            await asyncio.wait_for(self.changed.wait(), max(0.0, seconds - 0.2))
        except asyncio.TimeoutError:
            pass

    def _interval_s(self) -> float:
        return _MERGED_S if self._spool.is_full else HEARTBEAT_S

    async def round(self) -> None:
        """Look at all there is, once."""
        gone, self._gone = self._gone, {}
        pods = gone | {pod.uid: pod for pod in self._pods.snapshot().values()}
        allocation = await self._ask_kubelet()
        if not self._pods.healthy and allocation is not None:
            pods = still_there(pods, allocation, self._meter.held())
        intents = self._read_intents(pods)
        events = await asyncio.to_thread(self._read_logs, pods, intents)
        moment = now()
        for uid, pod in pods.items():
            self._seen_at_ns.setdefault(uid, moment.wall_ns)
            with _alone(pod):
                self._hear(pod, intents.get(uid), events.get(uid, []))
        self._move(pods, events, moment)
        models = {gpu.uuid: gpu.model for gpu in self.node.gpus()}
        replicas = {uid: intent for uid, intent in intents.items() if intent is not None}
        known = replicas | {uid: intent for uid, intent in self._taken_for.items() if uid in pods}
        observe(self._meter, pods, known, allocation, models, moment)
        self._move(pods, events, moment)
        self._forget(pods)
        self._metrics.leases.set(len(self._meter.held()))

    async def _ask_kubelet(self) -> Allocation | None:
        try:
            self._allocation = await self._kubelet.allocation()
        except Unavailable as error:
            self._metrics.failures.labels("kubelet").inc()
            silent_s = time.monotonic() - self._allocated_at
            if silent_s < _PATIENCE_S:
                return None
            logger.warning("the kubelet says nothing", extra={"fields": {"why": error.why, "seconds": silent_s}})
            return Allocation()
        self._allocated_at = time.monotonic()
        return self._allocation

    def _read_intents(self, pods: Mapping[str, Pod]) -> dict[str, Intent | None]:
        """Whose a pod is does not change while it lives, whatever becomes of its labels."""
        for uid, pod in pods.items():
            labels = self._namespaces.get(pod.namespace)
            if uid not in self._intents and labels is not None:
                self._intents[uid] = intent = None
                with _alone(pod):
                    self._intents[uid] = intent = intent_of(pod, labels)
                    if (function := snapshot_intent_of(pod, labels)) is not None:
                        self._taken_for[uid] = function
                if intent is not None and intent.snapshots:
                    self._make_folder(intent.need.snapshot)
        return {uid: self._intents[uid] for uid in pods if uid in self._intents}

    def _make_folder(self, snapshot: str) -> None:
        try:
            make_folder(self._settings.snapshot_dir, snapshot)
        except (AdapterError, OSError) as error:
            fields = {"name": snapshot, "why": str(error)}
            logger.warning("a function can keep no snapshots here", extra={"fields": fields})

    def _read_logs(self, pods: Mapping[str, Pod], intents: Mapping[str, Intent | None]) -> dict[str, list[Event]]:
        events = {}
        for uid, intent in intents.items():
            with _alone(pods[uid]):
                if intent is not None and (found := self._read_log(pods[uid], intent)) is not None:
                    events[uid] = found
        return events

    def _read_log(self, pod: Pod, intent: Intent) -> list[Event] | None:
        """None where its container has not run yet."""
        name = _main(pod, intent)
        container = pod.container(name)
        if container is None or not container.started_at_ns:
            return None
        if pod.uid not in self._logs:
            folder = log_folder(pod.namespace, pod.name, pod.uid, name, self._settings.pod_logs_dir)
            self._logs[pod.uid] = PodLog(folder)
        return self._logs[pod.uid].read(container.restarts)

    def _hear(self, pod: Pod, intent: Intent | None, events: list[Event]) -> None:
        """Start records of a pod's new events."""
        if intent is None or not events:
            return
        self.node.due.heard(pod, intent, events)
        self._speaking.add(pod.uid)
        container = pod.container(_main(pod, intent))
        told_at_ns = self._told.get(pod.uid, 0)
        queued = [at_ns for uid, at_ns, _ in self._starts if uid == pod.uid]
        found = starts.start_records(
            events,
            pod,
            intent,
            seen_at_ns=self._seen_at_ns.get(pod.uid, 0) if container and not container.restarts else 0,
            told_at_ns=max([told_at_ns, *queued]),
            is_first=not told_at_ns and not queued and container is not None and not container.restarts,
        )
        self._keep_starts(pod, found, waiting=len(queued))
        for event in events:
            if event.name is EventName.STARTED:
                self._learn(pod, intent, event)

    def _keep_starts(self, pod: Pod, found: list[tuple[int, StartRecord]], *, waiting: int) -> None:
        """As many as one pod may have, so that none fills the spool with what it says of itself."""
        room = max(0, _STARTS - max(waiting, self._starts_heard[pod.uid]))
        kept = [(pod.uid, at_ns, record) for at_ns, record in found if starts.is_short(record)][:room]
        self._starts += kept
        self._starts_heard[pod.uid] += len(kept)
        if dropped := len(found) - len(kept):
            self._metrics.starts_dropped.inc(dropped)
            fields = {"pod": f"{pod.namespace}/{pod.name}", "records": dropped}
            logger.warning("start records are left out: too many, or too long", extra={"fields": fields})

    def _learn(self, pod: Pod, intent: Intent, event: Event) -> None:
        try:
            record = StartRecord.from_json(event.fields["record"])
        except (KeyError, ValueError):
            return
        self.node.savings.saw(f"{intent.tenant}/{intent.key}", record)

    def _move(self, pods: Mapping[str, Pod], events: Mapping[str, list[Event]], moment: Now) -> None:
        """What replicas say of their phases; of one that says nothing, whether it is ready."""
        for uid, found in events.items():
            with _alone(pods[uid]):
                self._move_one(pods[uid], found, moment)

    def _move_one(self, pod: Pod, events: list[Event], moment: Now) -> None:
        for change in starts.phase_changes(events):
            self._meter.move(pod.uid, change.phase, moment.on_boot(change.at_ns))
        if pod.uid not in self._speaking:
            intent = self._intents[pod.uid]
            container = pod.container(_main(pod, intent)) if intent else None
            if container is not None and container.runs:
                self._meter.move(pod.uid, starts.phase_of(container), moment.boot_ns)

    def _forget(self, pods: Mapping[str, Pod]) -> None:
        """What is gone, once its last words are told."""
        there = pods.keys() | {uid for uid, _, _ in self._meter.held()}
        for uid in [uid for uid in self._logs if uid not in there]:
            self._logs.pop(uid).close()
        self._intents = {uid: intent for uid, intent in self._intents.items() if uid in there}
        self._taken_for = {uid: intent for uid, intent in self._taken_for.items() if uid in there}
        self._seen_at_ns = {uid: at_ns for uid, at_ns in self._seen_at_ns.items() if uid in there}
        self._told = {uid: at_ns for uid, at_ns in self._told.items() if uid in there}
        self._speaking &= there
        self.node.due.forget(pods)
        self._meter.forget(pods)

    def _noticed(self, _key: str, old: Pod | None, new: Pod | None) -> None:
        if old is not None and (new is None or new.uid != old.uid):
            self._gone[old.uid] = replace(old, is_over=True)
        if old != new:
            self.changed.set()

    # Heartbeats ---------------------------------------------------------------------------------

    async def beat(self, session: aiohttp.ClientSession) -> None:
        """Ask replicas how busy they were, and tell all that is not told yet."""
        pods = {pod.uid: pod for pod in self._pods.snapshot().values()}
        held = {uid for uid, _, _ in self._meter.held()} & self._speaking
        asked = [(uid, pods[uid].ip) for uid in held if uid in pods and pods[uid].ip]
        answers = await asyncio.gather(*(busy_ns(session, ip) for _, ip in asked))
        at_ns = now().boot_ns
        for (uid, _), counter_ns in zip(asked, answers, strict=True):
            if counter_ns is None:
                self._metrics.failures.labels("replica").inc()
            else:
                self._meter.busy(uid, counter_ns, at_ns)
        await self.tell()
        self._starts_heard.clear()

    async def tell(self) -> None:
        """Put it into the spool; where that has no room it stays in the meter, and is told later."""
        meter, told = self._meter.to_json(), dict(self._told)
        records = [encode(record, self._meter.node) for record in self._meter.tell(now().boot_ns)]
        records += [encode(record, self._meter.node) for _, _, record in self._starts]
        if not records:
            return
        for uid, at_ns, _ in self._starts:
            self._told[uid] = max(at_ns, self._told.get(uid, 0))
        try:
            await asyncio.shield(asyncio.to_thread(self._append, records, self._meter))
        except AdapterError as error:
            self._metrics.unspooled.inc()
            self._metrics.spool_full.set(1)
            logger.error("heartbeats are merged", extra={"fields": {"why": error.why, "hint": error.hint}})  # noqa: TRY400
            self._meter, self._told = Meter.from_json(meter, self._settings.node), told
            return
        self._starts.clear()
        self._metrics.told.inc(len(records))
        self._metrics.spool_full.set(self._spool.is_full)
        self._correct_clock()
        self.on_append()

    def _append(self, records: list[dict[str, Any]], meter: Meter) -> None:
        self._spool.append(records, {"meter": meter.to_json(), "starts": self._told})
        self._metrics.unacked.set(self._spool.unacked)
        self._metrics.spool_bytes.set(self._spool.size_bytes)

    def on_clock(self, ledger_ns: int) -> None:
        """The ledger's clock, a moment ago."""
        self._offset_ns = ledger_ns - self._meter.calendar.wall(now().boot_ns)
        self._metrics.clock_offset.set(self._offset_ns / 1e9)

    def _correct_clock(self) -> None:
        """A calendar that is so far off that the ledger refuses it is set by the ledger's, from here on."""
        if abs(self._offset_ns) > AHEAD_LIMIT_NS:
            calendar = self._meter.calendar
            self._meter.calendar = replace(calendar, wall_ns=calendar.wall_ns + self._offset_ns)
            logger.error("the node's clock is wrong", extra={"fields": {"seconds": self._offset_ns / 1e9}})
            self._offset_ns = 0


@contextmanager
def _alone(pod: Pod) -> Iterator[None]:
    """One pod that nobody foresaw must not stop the meter of the others."""
    try:
        yield
    except Exception:  # boundary
        logger.exception("a pod cannot be read", extra={"fields": {"pod": f"{pod.namespace}/{pod.name}"}})


def _main(pod: Pod, intent: Intent) -> str:
    return str(pod.body["spec"]["containers"][intent.container]["name"])


def _until_next(now_s: float, interval_s: float) -> float:
    """Seconds to the next heartbeat; one comes at each full hour, so that hours add up."""
    return min(interval_s, _HOUR_S - now_s % _HOUR_S + 0.001)
