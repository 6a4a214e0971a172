import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

from adapter.errors import LedgerError
from adapter.hosts import Deployment, ReplicaState
from adapter.openfaas import recorder as module
from adapter.openfaas.gpus import Grant
from adapter.openfaas.members import Member
from adapter.openfaas.recorder import LedgerRecorder
from adapter.policy.budget import utc_day
from adapter.policy.grants import Device, Want
from adapter.records import Rung, StartRecord
from adapter.spec import parse_spec
from tests.fakes.replicas import run

GPU = Device("GPU-1", "NVIDIA L4", 24 * 2**30)
RECORD = StartRecord("fn", "ns", "1", "fn-1", Rung.LOAD, 1, 1, ())


class FakeLedger:
    """Refuses the first `failures` writes."""

    def __init__(self, failures=0):
        self.failures = failures
        self.records, self.intervals = [], []
        self.is_closed = False

    def add_start(self, record):
        self.records.append(record)

    def add_intervals(self, intervals):
        if self.failures:
            self.failures -= 1
            raise LedgerError("no")
        self.intervals += list(intervals)

    def summary(self, start_ns, end_ns):
        return [i for i in self.intervals if i.ended_at_ns > start_ns and i.started_at_ns < end_ns]

    def close(self):
        self.is_closed = True


def member(state=ReplicaState.SERVING, **annotations):
    spec = parse_spec({}, {f"gpufn.dev/{key}": value for key, value in annotations.items()})
    replica = SimpleNamespace(id="fn-1", deployment=Deployment("fn", "ns", "3", "fn", spec), state=state)
    return Member(replica, 0)


def recorded(ledger, work):
    async def scenario():
        recorder = LedgerRecorder(ledger)
        recorder.start()
        await work(recorder)
        await recorder.close()
        assert ledger.is_closed

    run(scenario())


def test_a_life_in_phases():
    ledger = FakeLedger()

    async def work(recorder):
        one = member(ReplicaState.STARTING, gpu="0.5")
        one.grant = Grant(Want("fn.ns", 0.5), devices=(GPU,), is_held=True)
        recorder.observe(one)
        one.replica.state = ReplicaState.SERVING
        recorder.observe(one)
        one.replica.state, one.asleep = ReplicaState.PARKED, True
        recorder.observe(one)
        one.stopping = True
        recorder.observe(one)
        recorder.ended(one)

    recorded(ledger, work)
    assert [interval.phase.value for interval in ledger.intervals] == ["restoring", "idle", "parked", "draining"]
    first = ledger.intervals[0]
    assert (first.function, first.namespace, first.revision) == ("fn", "ns", "3")
    assert (first.device, first.share, first.gpu_model) == ("GPU-1", 0.5, "NVIDIA L4")


def test_a_replica_that_wakes_on_another_gpu_holds_that_one():
    ledger = FakeLedger()

    async def work(recorder):
        one = member(gpu="2")
        one.grant = Grant(Want("fn.ns", 2), devices=(GPU, replace(GPU, uuid="GPU-2")), is_held=True)
        recorder.observe(one)
        one.replica.state, one.asleep = ReplicaState.PARKED, True
        one.in_flight = 1  # held by its entrypoint: nothing of the GPU is used
        recorder.observe(one)
        one.grant.devices, one.asleep = (replace(GPU, uuid="GPU-3"), replace(GPU, uuid="GPU-2")), False
        recorder.observe(one)
        one.replica.state = ReplicaState.SERVING
        recorder.observe(one)
        recorder.ended(one)

    recorded(ledger, work)
    assert [(i.phase.value, i.device, i.share) for i in ledger.intervals] == [
        ("idle", "GPU-1,GPU-2", 2.0),
        ("parked", "GPU-1,GPU-2", 2.0),
        ("restoring", "GPU-3,GPU-2", 2.0),
        ("running", "GPU-3,GPU-2", 2.0),
    ]


def test_a_replica_without_a_gpu_counts_as_itself():
    ledger = FakeLedger()

    async def work(recorder):
        recorder.observe(member())

    recorded(ledger, work)
    assert {(i.device, i.share, i.gpu_model) for i in ledger.intervals} == {("cpu", 1.0, "")}


def test_what_is_open_at_the_end_is_written():
    ledger = FakeLedger()

    async def work(recorder):
        recorder.observe(member())

    recorded(ledger, work)
    assert [interval.phase.value for interval in ledger.intervals] == ["idle"]


def test_a_ledger_that_refuses_is_asked_again(monkeypatch):
    monkeypatch.setattr(module, "_RETRY_S", 0.0)
    ledger = FakeLedger(failures=2)

    async def work(recorder):
        recorder.started(RECORD)
        await recorder.flush()
        assert ledger.records == [RECORD]

    recorded(ledger, work)


def test_a_broken_ledger_does_not_keep_the_gateway_running(monkeypatch):
    monkeypatch.setattr(module, "_RETRY_S", 0.0)
    monkeypatch.setattr(module, "_FLUSH_LIMIT_S", 0.01)

    async def work(recorder):
        recorder.started(RECORD)
        await recorder.flush()  # gives up
        await asyncio.sleep(0)

    recorded(FakeLedger(failures=10**9), work)


def test_what_is_held_now_counts_though_no_row_tells_it_yet():
    ledger = FakeLedger()

    async def work(recorder):
        one, two, began_ns = member(gpu="1"), member(gpu="1"), time.monotonic_ns()
        two.replica.id = "fn-2"
        for each in (one, two):
            each.grant = Grant(Want("fn.ns", 1), devices=(GPU,), is_held=True)
            recorder.observe(each)
        recorder.ended(one)
        held = await recorder.held(0, 2**62)
        assert [interval.replica for interval in ledger.intervals] == ["fn-1"]
        told_s = (ledger.intervals[0].ended_at_ns - ledger.intervals[0].started_at_ns) / 1e9
        assert told_s < held["fn.ns"] <= 2 * (time.monotonic_ns() - began_ns) / 1e9

    recorded(ledger, work)


def test_what_is_held_after_this_machine_slept_over_midnight_is_held_on_the_new_day(monkeypatch):
    """No monotonic clock counts while it sleeps."""
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    ledger, now_ns = FakeLedger(), time.time_ns

    async def work(recorder):
        one = member(gpu="1")
        one.grant = Grant(Want("fn.ns", 1), devices=(GPU,), is_held=True)
        recorder.observe(one)
        monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 86_400 * 10**9)
        for _ in range(500):
            if await recorder.held(*utc_day(time.time_ns())):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("nothing was held today")

    recorded(ledger, work)
