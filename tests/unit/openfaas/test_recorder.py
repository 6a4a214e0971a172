import asyncio
from types import SimpleNamespace

from adapter.errors import LedgerError
from adapter.hosts import Deployment, ReplicaState
from adapter.openfaas import recorder as module
from adapter.openfaas.members import Member
from adapter.openfaas.recorder import Recorder
from adapter.records import Rung, StartRecord
from adapter.spec import parse_spec
from tests.fakes.replicas import run

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

    def close(self):
        self.is_closed = True


def member(state=ReplicaState.SERVING, **annotations):
    spec = parse_spec({}, {f"gpufn.dev/{key}": value for key, value in annotations.items()})
    replica = SimpleNamespace(id="fn-1", deployment=Deployment("fn", "ns", "3", "fn", spec), state=state)
    return Member(replica, 0)


def recorded(ledger, work):
    async def scenario():
        recorder = Recorder(ledger)
        recorder.start()
        await work(recorder)
        await recorder.close()
        assert ledger.is_closed

    run(scenario())


def test_a_life_in_phases():
    ledger = FakeLedger()

    async def work(recorder):
        one = member(ReplicaState.STARTING, gpu="0.5")
        recorder.observe(one)
        one.replica.state = ReplicaState.SERVING
        recorder.observe(one)
        one.replica.state = ReplicaState.PARKED
        recorder.observe(one)
        one.stopping = True
        recorder.observe(one)
        recorder.ended(one)

    recorded(ledger, work)
    assert [interval.phase.value for interval in ledger.intervals] == ["restoring", "idle", "parked", "draining"]
    first = ledger.intervals[0]
    assert (first.function, first.namespace, first.revision, first.share, first.device) == ("fn", "ns", "3", 0.5, "gpu")


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
