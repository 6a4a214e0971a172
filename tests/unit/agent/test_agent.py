"""An agent that dies, starves or wakes up on another boot: what it held is told once, and all of it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from adapter.agent import agent as module, starts
from adapter.agent.agent import Agent
from adapter.agent.metrics import Metrics
from adapter.agent.observe import Now
from adapter.agent.pod_log import PodLog, log_folder
from adapter.agent.pods import read_pod
from adapter.agent.settings import AgentSettings
from adapter.agent.spool import Spool
from adapter.cluster.informer import Informer
from adapter.errors import Overloaded, StorageError
from adapter.ledger.wire import read_batch, to_line
from adapter.records import Event, EventName, Phase, PhaseName, Rung, StartRecord
from adapter.settings import from_environment
from tests.fakes.kubelet import devices, kubelet

SECOND_NS = 10**9
WALL_S, BOOT_S = 1_795_647_091, 5_000
GPU = "GPU-a"


def instant(second):
    minutes, seconds = divmod(31 + second, 60)
    return f"2026-11-25T22:{51 + minutes:02d}:{seconds:02d}Z"


def pod(name="embed", *, started=None, finished=None, deleted=False):
    state = {}
    if started is not None:
        run = {"startedAt": instant(started)}
        state = {"running": run} if finished is None else {"terminated": {**run, "finishedAt": instant(finished)}}
    metadata = {
        "name": name, "namespace": "acme", "uid": f"{name}-12345678", "creationTimestamp": instant(0), "resourceVersion": "1",
        "labels": {"gpufn.dev/function": name}, "annotations": {},
    }  # fmt: skip
    if deleted:
        metadata |= {"deletionTimestamp": instant(60), "deletionGracePeriodSeconds": 30}
    return {
        "metadata": metadata,
        "spec": {"containers": [{"name": "main", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]},
        "status": {
            "podIP": "10.0.0.1",
            "phase": "Running" if finished is None else "Succeeded",
            "containerStatuses": [{"name": "main", "state": state, "ready": finished is None, "restartCount": 0}],
        },
    }


@dataclass
class Node:
    """A node's clocks, kubelet, logs and spool; agents on it come and go."""

    folder: Path
    seconds: float = 0.0
    step_s: float = 0.0
    boot: str = "boot-1"
    boots_at_s: float = 0.0
    pods: dict = field(default_factory=dict)
    busy_s: float | None = None
    agent: Agent | None = None
    told: list = field(default_factory=list)
    """Every record that was ever in a spool, by number."""

    def now(self):
        boot_s = BOOT_S + self.seconds if self.boot == "boot-1" else self.seconds - self.boots_at_s
        return Now(int(boot_s * SECOND_NS), int((WALL_S + self.seconds + self.step_s) * SECOND_NS))

    def settings(self):
        environ = {
            "GPUFN_NODE": "node-1",
            "GPUFN_KUBELET_SOCKET": str(self.folder / "kubelet.sock"),
            "GPUFN_POD_LOGS_DIR": str(self.folder / "logs"),
            "GPUFN_STATE_DIR": str(self.folder / "state"),
        }
        return from_environment(AgentSettings, environ)

    def start(self, limit_bytes=2**20):
        """An agent; one that was there has been killed."""
        if self.agent is not None:
            self.agent._spool.close()
        spool = Spool.open(self.folder / "state", limit_bytes)
        informers = [Informer(None, path, project) for path, project in (("/pods", read_pod), ("/namespaces", dict))]
        self.agent = Agent(self.settings(), None, spool, Metrics(), *informers)
        self.agent._namespaces._set("acme", {})
        self.agent._pods.synced.set()
        return self

    async def round(self, seconds, *pods):
        self.seconds = seconds
        informer = self.agent._pods
        for key in list(informer.snapshot()):
            informer._set(key, None)
        for value in pods:
            informer._set(f"acme/{value['metadata']['name']}", read_pod(value))
        await self.agent.round()

    async def beat(self, seconds, *pods):
        await self.round(seconds, *pods)
        await self.agent.beat(None)
        return self

    def says(self, *events, name="embed"):
        folder = log_folder("acme", name, f"{name}-12345678", "main", self.folder / "logs")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "0.log").open("ab") as file:
            for second, event in events:
                at_ns = int((WALL_S + second) * SECOND_NS)
                file.write(b"T stdout F " + replace(event, at_ns=at_ns).to_line())

    def records(self):
        """What waits in the spool, as a ledger reads it."""
        body = b"".join(to_line(seq, record) for seq, record in self.agent._spool.pending(10**9))
        batch = read_batch(body, "node-1", (WALL_S + 86_400) * SECOND_NS)
        assert not batch.refused
        return batch

    def phases(self, name="embed"):
        """``(phase, seconds)`` of its leases, those that follow each other in one phase as one."""
        found = []
        for lease in self.leases(name):
            seconds = (lease.ended_at_ns - lease.started_at_ns) / SECOND_NS
            if found and found[-1][0] == lease.phase.value:
                found[-1] = lease.phase.value, found[-1][1] + seconds
            else:
                found.append((lease.phase.value, seconds))
        return found

    def leases(self, name="embed"):
        return [lease for lease in self.records().intervals if lease.function == name]

    def span(self, name="embed"):
        """From when to when it was held; asserts that it is without gap, overlap or a number twice."""
        leases = self.leases(name)
        assert all(first.ended_at_ns == second.started_at_ns for first, second in pairwise(leases))
        assert len({lease.id for lease in leases}) == len(leases)
        return tuple((ns / SECOND_NS - WALL_S) for ns in (leases[0].started_at_ns, leases[-1].ended_at_ns))


LISTENING, SERVING = Event(EventName.LISTENING, 0, {"port": 8080}), Event(EventName.SERVING, 0, {"rung": "load"})


@pytest.fixture
def node(tmp_path, monkeypatch):
    node = Node(tmp_path)

    async def busy(_session, _ip):
        return None if node.busy_s is None else int(node.busy_s * SECOND_NS)

    monkeypatch.setattr(module, "now", node.now)
    monkeypatch.setattr(module, "boot_id", lambda: node.boot)
    monkeypatch.setattr(module, "busy_ns", busy)
    return node


@asynccontextmanager
async def kubelet_of(node, **pods):
    given = {("acme", name, "main"): [devices("nvidia.com/gpu", device)] for name, device in pods.items()}
    async with kubelet(node.folder / "kubelet.sock", [devices("nvidia.com/gpu", GPU, "GPU-b")], given):
        yield


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


def test_a_replicas_life(node):
    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            await node.round(1, pod())
            await node.round(6, pod(started=5))
            node.says((6, LISTENING), (8, SERVING))
            node.busy_s = 1.5
            await node.beat(14, pod(started=5))
            node.busy_s = 4
            await node.beat(24, pod(started=5))
            await node.round(32, pod(started=5, deleted=True))
            node.busy_s = None
            await node.beat(36, pod(started=5, finished=35, deleted=True))

    run(play())
    assert node.span() == (5, 35)
    assert node.phases() == [
        ("restoring", 3), ("idle", 4.5), ("running", 1.5), ("idle", 7.5), ("running", 2.5), ("idle", 6), ("draining", 5),
    ]  # fmt: skip
    [interval] = {(lease.device, lease.share, lease.node, lease.tenant, lease.replica) for lease in node.leases()}
    assert interval == (GPU, 1.0, "node-1", "acme", "embed-embed-12")


def test_a_snapshot_that_is_taken_on_a_gpu_is_its_functions_time_and_no_replicas(node):
    def taker(**times):
        value = pod("taker", **times)
        value["metadata"] |= {
            "labels": {"gpufn.dev/task": "snapshot"},
            "annotations": {"gpufn.dev/snapshot-of": "acme/embed.acme", "gpufn.dev/snapshot-of-revision": "7"},
        }
        return value

    async def play():
        async with kubelet_of(node, taker=GPU):
            node.start()
            node.says((6, LISTENING), (8, SERVING), name="taker")  # as a function could
            await node.beat(14, taker(started=5))
            await node.beat(32, taker(started=5, finished=30))

    run(play())
    assert (node.span(), node.phases()) == ((5, 30), [("restoring", 25)])
    [lease] = {(lease.device, lease.tenant, lease.revision, lease.replica) for lease in node.leases()}
    assert lease == (GPU, "acme", "7", "taker-taker-12")
    assert {device.others_ns for device in node.records().devices} == {0}


def test_one_that_is_gone_when_the_agent_looks_ended_as_the_api_server_had_it_last(node):
    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            node.says((6, LISTENING), (8, SERVING))
            await node.round(10, pod(started=5))
            ended = pod(started=5, finished=34, deleted=True)
            node.agent._pods._set("acme/embed", read_pod(ended))
            await node.beat(36)

    run(play())
    assert node.span() == (5, 34)
    assert node.phases() == [("restoring", 3), ("idle", 22), ("draining", 4)]


def test_a_start_is_told_once_from_the_pods_beginning_whoever_reads_it_again(node):
    record = StartRecord(
        "function", "x", "1", "y", Rung.LOAD, int((WALL_S + 6) * SECOND_NS), 2 * SECOND_NS, (Phase(PhaseName.LOAD, 0, 2 * SECOND_NS),)
    )  # fmt: skip
    started = Event(EventName.STARTED, 0, {"record": record.to_json()})

    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            await node.round(2, pod())
            node.says((6, LISTENING), (8, SERVING), (8, started))
            await node.beat(10, pod(started=5))
            node.start()
            await node.beat(20, pod(started=5))
            node.says((25, started))
            node.start()
            await node.beat(30, pod(started=5))

    run(play())
    first, second = node.records().starts
    assert [(phase.name.value, phase.seconds) for phase in first.phases] == [("schedule", 2), ("pull", 4), ("load", 2)]
    assert (first.function, first.replica, len(second.phases)) == ("embed", "embed-embed-12", 1)


@pytest.mark.parametrize("step_s", [0, 3600, -3600])
def test_killed_at_any_moment_it_loses_nothing_and_tells_nothing_twice(node, step_s):
    """Between rounds, before and after each heartbeat; with the wall clock stepped meanwhile."""

    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            await node.round(6, pod(started=5))
            node.start()
            await node.beat(10, pod(started=5))
            await node.round(15, pod(started=5))
            node.start()
            node.step_s = step_s
            await node.beat(30, pod(started=5))
            node.start()
            await node.round(33, pod(started=5))
            node.start()
            await node.beat(40, pod(started=5))

    run(play())
    start, end = node.span()
    assert end == 40
    assert start in (5, 6)  # the first agent had told nothing yet: nobody knows how long it was


@pytest.mark.parametrize("at", ["before", "after"])
def test_killed_while_it_writes_a_heartbeat_that_one_is_there_or_comes_again(node, monkeypatch, at):
    append = Spool.append

    def die(self, *words):
        if at == "after":
            append(self, *words)
        raise RuntimeError("killed")

    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            await node.beat(10, pod(started=5))
            with monkeypatch.context() as patch:
                patch.setattr(Spool, "append", die)
                with pytest.raises(RuntimeError):
                    await node.beat(20, pod(started=5))
            node.start()
            await node.beat(30, pod(started=5))

    run(play())
    assert node.span() == (5, 30)


def test_pods_that_ended_while_it_was_down_end_when_they_did_and_those_that_came_began_then(node):
    async def play():
        async with kubelet_of(node, embed=GPU, late="GPU-b"):
            node.start()
            await node.beat(10, pod(started=5), pod("gone", started=6))
            node.start()
            await node.beat(60, pod(started=5, finished=30), pod("late", started=40))

    run(play())
    assert (node.span(), node.span("late")) == ((5, 30), (40, 60))
    assert node.span("gone") == (6, 60)  # nobody says when: until it was seen no more


def test_a_node_that_was_started_anew_holds_nothing_of_before(node):
    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            await node.beat(10, pod(started=5))
            await node.round(18, pod(started=5))
            node.boot, node.boots_at_s = "boot-2", 100.0
            node.seconds = 130
            node.start()
            await node.beat(140, pod(started=135))

    run(play())
    spans = [((i.started_at_ns / SECOND_NS) - WALL_S, (i.ended_at_ns / SECOND_NS) - WALL_S) for i in node.leases()]
    assert spans == [(5, 10), (135, 140)]
    assert len({lease.id for lease in node.leases()}) == 2


@pytest.mark.parametrize("error", [StorageError("The disk is full."), Overloaded("The spool is full.")])
def test_while_the_spool_takes_nothing_heartbeats_are_merged_and_nothing_is_lost(node, monkeypatch, error):
    def refuse(self, *_):
        raise error

    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            node.says((6, LISTENING), (8, SERVING))
            await node.beat(10, pod(started=5))
            with monkeypatch.context() as patch:
                patch.setattr(Spool, "append", refuse)
                for second in (20, 30, 40):
                    node.busy_s = second / 10
                    await node.beat(second, pod(started=5))
                assert "gpufn_agent_spool_failures_total 3.0" in text(node.agent)
                assert "gpufn_agent_spool_full 1.0" in text(node.agent)
            node.busy_s = 5
            await node.beat(50, pod(started=5))

    run(play())
    assert node.span() == (5, 50)
    totals = defaultdict(float)
    for phase, seconds in node.phases():
        totals[phase] += seconds
    assert totals == {"restoring": 3, "idle": 37, "running": 5}
    assert len(node.leases()) == 4
    assert "gpufn_agent_spool_full 0.0" in text(node.agent)


def text(agent):
    return generate_latest(agent._metrics.registry).decode()


def test_a_spool_that_was_lost_is_no_reason_to_tell_anything_twice(node):
    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            await node.beat(10, pod(started=5))
            before = node.leases()
            node.agent._spool.close()
            (node.folder / "state" / "spool").unlink()
            node.agent = None
            node.seconds = 20
            node.start()
            await node.beat(30, pod(started=5))
            return before

    before = run(play())
    assert node.span() == (20, 30)
    assert not {lease.id for lease in before} & {lease.id for lease in node.leases()}


@pytest.mark.parametrize(("offset_s", "corrected"), [(3600, True), (-3600, True), (200, False)])
def test_a_calendar_that_the_ledger_would_refuse_is_set_by_the_ledgers(node, offset_s, corrected):
    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            await node.beat(10, pod(started=5))
            node.agent.on_clock(int((WALL_S + 10 + offset_s) * SECOND_NS))
            await node.beat(20, pod(started=5))
            await node.beat(30, pod(started=5))

    run(play())
    last = node.leases()[-1]
    assert last.ended_at_ns - last.started_at_ns == 10 * SECOND_NS
    assert last.ended_at_ns == (WALL_S + 30 + (offset_s if corrected else 0)) * SECOND_NS


def test_a_state_of_another_version_begins_anew(node):
    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            node.agent._spool.append([], {"meter": {"version": 0}, "starts": {}})
            node.start()
            await node.beat(10, pod(started=5))

    run(play())
    assert node.span() == (5, 10)


def test_a_replica_whose_first_words_are_gone_from_its_log_is_still_known(node):
    record = StartRecord("f", "x", "1", "y", Rung.LOAD, int((WALL_S + 6) * SECOND_NS), SECOND_NS, ())

    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            node.says((6, LISTENING), (8, SERVING), (8, Event(EventName.STARTED, 0, {"record": record.to_json()})))
            node.busy_s = 0
            await node.beat(10, pod(started=5))
            for log in (node.folder / "logs").rglob("0.log"):
                log.write_bytes(b"T stdout F hello\n")
            node.start()
            node.busy_s = 4
            await node.beat(20, pod(started=5))

    run(play())
    assert node.phases() == [("restoring", 3), ("idle", 8), ("running", 4)]


def test_a_pod_that_nobody_foresaw_stops_nobodys_meter(node):
    strange = pod("strange", started=5)
    strange["spec"]["containers"][0]["resources"] = {"limits": ["nvidia.com/gpu"]}
    strange["metadata"]["labels"] = {"gpufn.dev/function": ["a", "b"]}

    async def play():
        async with kubelet_of(node, embed=GPU, strange="GPU-b"):
            node.start()
            await node.beat(10, strange, pod(started=5))

    run(play())
    assert node.span() == (5, 10)


@pytest.mark.parametrize("place", ["log", "record", "phase"])
def test_a_pod_whose_words_nobody_foresaw_stops_nobodys_meter(node, monkeypatch, place):
    read, records, changes = PodLog.read, starts.start_records, starts.phase_changes

    def reads(log, restarts):
        assert place != "log" or "strange" not in str(log._folder)
        return read(log, restarts)

    def hears(events, pod, *words, **more):
        assert place != "record" or pod.name != "strange"
        return records(events, pod, *words, **more)

    def moves(events):
        assert place != "phase" or events[0].fields["port"] != 666
        return changes(events)

    monkeypatch.setattr(PodLog, "read", reads)
    monkeypatch.setattr(starts, "start_records", hears)
    monkeypatch.setattr(starts, "phase_changes", moves)

    async def play():
        async with kubelet_of(node, embed=GPU, strange="GPU-b"):
            node.start()
            node.says((5, Event(EventName.LISTENING, 0, {"port": 666})), name="strange")
            node.says((6, LISTENING), (8, SERVING))
            await node.beat(10, pod("strange", started=5), pod(started=5))

    run(play())
    assert node.phases() == [("restoring", 3), ("idle", 2)]
    assert node.span("strange") == (5, 10)


def test_of_one_pod_so_many_starts_are_told_in_a_heartbeat_and_none_that_is_too_long(node):
    record = StartRecord("f", "x", "1", "y", Rung.LOAD, WALL_S * SECOND_NS, 1, (), error="x" * 20_000)
    long = replace(record, phases=(Phase(PhaseName.LOAD, 0, 1),) * 500)

    def started(second, record):
        return second, Event(EventName.STARTED, 0, {"record": record.to_json()})

    async def play():
        async with kubelet_of(node, embed=GPU, other="GPU-b"):
            node.start()
            node.says(*(started(n, record) for n in range(6, 20)), started(20, long), name="other")
            node.says(started(6, record))
            await node.round(30, pod("other", started=5), pod(started=5))
            await node.agent.tell()
            node.says(*(started(n, record) for n in range(21, 40)), name="other")
            await node.round(50, pod("other", started=5), pod(started=5))
            await node.beat(50, pod("other", started=5), pod(started=5))
            node.says(started(55, record), name="other")
            await node.beat(60, pod("other", started=5), pod(started=5))

    run(play())
    told = [start.function for start in node.records().starts]
    assert (told.count("embed"), told.count("other")) == (1, 20 + 1)
    assert max(len(start.error) for start in node.records().starts) < 1000
    assert f"gpufn_agent_starts_dropped_total {1 + 13}.0" in text(node.agent)


def test_a_replica_that_is_none_of_ours_inside_is_idle_when_it_is_ready(node):
    async def play():
        async with kubelet_of(node, embed=GPU):
            node.start()
            waiting = pod(started=5)
            waiting["status"]["containerStatuses"][0]["ready"] = False
            await node.round(6, waiting)
            await node.round(9, pod(started=5))
            await node.beat(12, pod(started=5))

    run(play())
    assert node.phases() == [("restoring", 4), ("idle", 3)]
