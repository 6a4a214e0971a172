"""What the ledger service promises to agents and readers, over every database."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import sqlalchemy as sa
from aiohttp import web
from hypothesis import HealthCheck, given, settings, strategies as st
from prometheus_client import generate_latest

from adapter.errors import Unavailable
from adapter.ledger.callers import Caller
from adapter.ledger.client import RemoteLedger
from adapter.ledger.metrics import Metrics
from adapter.ledger.server import LedgerService
from adapter.ledger.store import Ledger
from adapter.ledger.wire import encode, read_batch, to_line
from adapter.records import DeviceInterval, LeaseInterval, LeasePhase, Phase, PhaseName, Rung, StartRecord

NOW_NS = 1_800_000_000 * 10**9
SECOND_NS = 10**9
ALWAYS = (0, 2**62)

CALLERS = {
    "agent-1": Caller("gpufn-agents", "gpufn-agent", "node-1"),
    "agent-2": Caller("gpufn-agents", "gpufn-agent", "node-2"),
    "unbound": Caller("gpufn-agents", "gpufn-agent"),
    "reader": Caller("gpufn-system", "gpufn-reader"),
    "function": Caller("default", "gpufn-agent", "node-1"),
}


@dataclass
class KnownCallers:
    """Tokens that need no API server; `fault` is what asking it raises."""

    fault: Exception | None = None

    async def of(self, token):
        if self.fault:
            raise self.fault
        return CALLERS.get(token)


@dataclass
class Service:
    port: int
    ledger: Ledger
    metrics: Metrics
    callers: KnownCallers

    def ask(self, path, *, body=None, headers=None, token="reader"):
        """Status and JSON of the answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=body)
        request.add_header("Authorization", f"Bearer {token}")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path, parameters):
        status, answer = self.ask(f"{path}?{urllib.parse.urlencode(parameters)}")
        assert status == 200, answer
        return answer

    def deliver(self, *records, token="agent-1", node="node-1", first=1):
        lines = [to_line(seq, encode(record, node)) for seq, record in enumerate(records, start=first)]
        return self.ask("/v1/records", body=b"".join(lines), token=token)


@dataclass
class _Serving:
    app: web.Application
    port: int = 0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _ready: threading.Event = field(default_factory=threading.Event)

    def __enter__(self):
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self):
        runner = web.AppRunner(self.app, shutdown_timeout=0)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()


@pytest.fixture
def service(ledger):
    metrics, callers = Metrics(), KnownCallers()
    app = LedgerService(ledger, callers, metrics, lambda: NOW_NS).application()
    with _Serving(app) as serving:
        yield Service(serving.port, ledger, metrics, callers)


def lease(n, **changes):
    base = LeaseInterval(
        id=f"pod-uid/main/GPU-5b1f:{n}", function="embed", namespace="default", revision="embed-00001", replica="embed-x-1234abcd",
        tenant="default", price_class="standard", device="GPU-5b1f", share=1.0, phase=LeasePhase.RUNNING, gpu_model="H100",
        started_at_ns=NOW_NS - 1000 * SECOND_NS + n * SECOND_NS, ended_at_ns=NOW_NS - 999 * SECOND_NS + n * SECOND_NS, node="node-1",
    )  # fmt: skip
    return replace(base, **changes)


def device(n, **changes):
    base = DeviceInterval(
        id=f"GPU-5b1f:{n}", node="node-1", device="GPU-5b1f", model="H100", held_ns=SECOND_NS, others_ns=0,
        started_at_ns=lease(n).started_at_ns, ended_at_ns=lease(n).ended_at_ns,
    )  # fmt: skip
    return replace(base, **changes)


def start(**changes):
    base = StartRecord(
        function="embed", namespace="default", revision="embed-00001", replica="embed-x-1234abcd", rung=Rung.RESTORE,
        started_at_ns=NOW_NS - 2000 * SECOND_NS, total_ns=SECOND_NS // 4, phases=(Phase(PhaseName.RESTORE, 0, SECOND_NS // 4),),
    )  # fmt: skip
    return replace(base, **changes)


def stored(record):
    """An interval as the ledger has it: its id is its node's."""
    return replace(record, id=f"{record.node}/{record.id}")


def test_what_is_delivered_is_there_and_acknowledged(service):
    assert service.deliver(lease(0), device(0), start(), first=7) == (
        200,
        {"acked": 9, "rejected": [], "now_ns": NOW_NS},
    )
    assert service.ledger.intervals(*ALWAYS) == [stored(lease(0))]
    assert service.ledger.devices(*ALWAYS) == [stored(device(0))]
    assert service.ledger.starts() == [start()]


def test_what_is_delivered_again_or_in_another_order_counts_once(service):
    records = [lease(n) for n in range(4)] + [device(0), start()]
    service.deliver(*records)
    service.deliver(*records[:3], first=1)
    assert service.deliver(*reversed(records), first=1)[1]["acked"] == 6
    assert service.ledger.intervals(*ALWAYS) == [stored(lease(n)) for n in range(4)]
    assert len(service.ledger.starts()) == len(service.ledger.devices(*ALWAYS)) == 1
    assert 'gpufn_ledger_records_total{outcome="new"} 6.0' in generate_latest(service.metrics.registry).decode()
    assert 'gpufn_ledger_records_total{outcome="repeated"} 9.0' in generate_latest(service.metrics.registry).decode()


BAD = {
    "a clock an hour ahead": (lease(1, started_at_ns=NOW_NS + 3600 * SECOND_NS, ended_at_ns=NOW_NS + 3601 * SECOND_NS), "clock-ahead"),
    "a clock never set": (lease(1, started_at_ns=5, ended_at_ns=10), "clock-behind"),
    "an end before its start": (lease(1, ended_at_ns=lease(1).started_at_ns - 1), "no-length"),
    "no length": (lease(1, ended_at_ns=lease(1).started_at_ns), "no-length"),
    "two months": (lease(1, started_at_ns=NOW_NS - 60 * 86400 * SECOND_NS), "too-long"),
    "a negative share": (lease(1, share=-0.5), "bad-share"),
    "no share": (lease(1, share=0.0), "bad-share"),
    "a share that is no number": (lease(1, share=float("nan")), "bad-field"),
    "a number as a text": (lease(1, started_at_ns="1"), "bad-field"),
    "a number too large for a database": (lease(1, ended_at_ns=2**70), "bad-field"),
    "a character that no database keeps": (lease(1, tenant="a\0b"), "bad-field"),
    "half a character": (lease(1, tenant="\ud83d"), "bad-field"),
    "a name without end": (lease(1, function="f" * 5000), "bad-field"),
    "a huge record": (start(error="e" * 100_000), "too-large"),
    "a start of tomorrow": (start(started_at_ns=NOW_NS + 86400 * SECOND_NS), "clock-ahead"),
    "a start with a negative time": (start(total_ns=-1), "bad-field"),
    "more held than there was": (device(1, held_ns=SECOND_NS, others_ns=1), "bad-share"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_record_that_cannot_be_true_is_refused_alone(service, name):
    bad, code = BAD[name]
    status, answer = service.deliver(lease(0), bad, lease(2), first=4)
    assert (status, answer["acked"]) == (200, 6)
    assert [(refused["seq"], refused["code"]) for refused in answer["rejected"]] == [
        (None if code == "too-large" else 5, code)
    ]
    assert answer["rejected"][0]["why"]
    assert service.ledger.intervals(*ALWAYS) == [stored(lease(0)), stored(lease(2))]
    assert f'gpufn_ledger_refused_total{{code="{code}"}} 1.0' in generate_latest(service.metrics.registry).decode()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "not-json"),
        (b"[1]", "not-json"),
        (b"[" * 60_000, "not-json"),
        (b"\xff\xfe", "not-json"),
        (b'{"seq": 5, "kind": "invoice", "node": "node-1"}', "unknown-kind"),
        (b'{"seq": -1, "kind": "lease", "node": "node-1"}', "bad-field"),
        (b'{"seq": 5, "kind": "lease", "node": "node-1"}', "bad-field"),
        (b'{"seq": 5, "kind": "start", "node": "node-1", "record": 7}', "bad-field"),
    ],
)
def test_a_line_that_is_no_record_is_refused_alone(service, line, code):
    body = to_line(4, encode(lease(0), "node-1")) + line + b"\n" + to_line(6, encode(lease(2), "node-1"))
    status, answer = service.ask("/v1/records", body=body, token="agent-1")
    assert (status, answer["acked"], [r["code"] for r in answer["rejected"]]) == (200, 6, [code])
    assert len(service.ledger.intervals(*ALWAYS)) == 2


def test_an_agent_writes_of_its_own_node_only(service):
    assert [r["code"] for r in service.deliver(lease(0), node="node-1", token="agent-2")[1]["rejected"]] == [
        "other-node"
    ]
    service.deliver(lease(0, node="node-2"), node="node-2", token="agent-2")
    service.deliver(lease(0))
    assert {i.id for i in service.ledger.intervals(*ALWAYS)} == {f"node-{n}/{lease(0).id}" for n in (1, 2)}


@pytest.mark.parametrize(
    ("token", "status"), [("", 401), ("stranger", 401), ("unbound", 403), ("reader", 403), ("function", 403)]
)
def test_nobody_but_agents_writes(service, token, status):
    assert service.deliver(lease(0), token=token)[0] == status
    assert service.ledger.intervals(*ALWAYS) == []


@pytest.mark.parametrize(("token", "status"), [("stranger", 401), ("function", 403), ("agent-1", 403), ("reader", 200)])
@pytest.mark.parametrize("path", ["/v1/leases?start_ns=1&end_ns=2", "/v1/starts", "/v1/activity?since_ns=1"])
def test_who_may_read(service, path, token, status):
    assert service.ask(path, token=token)[0] == status


def test_a_token_may_come_beside_the_api_servers_own(service):
    headers = {"X-Gpufn-Token": "reader"}
    assert service.ask("/v1/starts", token="the API server's", headers=headers)[0] == 200


def test_while_nobody_can_say_whose_a_token_is_nothing_is_taken_and_nothing_is_lost(service):
    service.callers.fault = Unavailable("The API server cannot be reached.")
    assert service.deliver(lease(0))[0] == 502
    service.callers.fault = None
    assert service.deliver(lease(0))[0] == 200
    assert len(service.ledger.intervals(*ALWAYS)) == 1


def test_a_delivery_too_large_is_refused_whole(service):
    assert service.ask("/v1/records", body=b"x" * (9 * 2**20), token="agent-1")[0] == 413


@pytest.mark.parametrize(
    "path",
    [
        "/v1/leases",
        "/v1/leases?start_ns=5&end_ns=4",
        "/v1/leases?start_ns=a&end_ns=4",
        "/v1/leases?start_ns=1&end_ns=99999999999999999999999",
        "/v1/starts?limit=-1",
        "/v1/activity",
        "/v1/capacity?start_ns=0&end_ns=9000000000000000000",
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_with_its_reason(service, path):
    status, answer = service.ask(path)
    assert (status, answer["error"]["code"]) == (400, "bad-query")


def test_readers_far_away_read_what_readers_here_do(service):
    service.deliver(*[lease(n) for n in range(5)], lease(9, function="other"), start(), device(0))
    here, there = service.ledger, RemoteLedger(service.get)
    assert there.intervals(*ALWAYS) == here.intervals(*ALWAYS)
    assert there.intervals(*ALWAYS, function="other") == here.intervals(*ALWAYS, function="other")
    assert there.summary(*ALWAYS) == here.summary(*ALWAYS)
    assert there.starts() == there.starts("embed", "default", None) == here.starts()
    assert there.starts(limit=0) == there.starts("other") == []


def test_what_was_held_is_in_gpu_seconds_by_function(service):
    halves = [lease(n, share=0.5) for n in range(4)]
    service.deliver(*halves, lease(5, function="other"), lease(6, phase=LeasePhase.PARKED), lease(7, device="cpu"))
    there = RemoteLedger(service.get)
    assert there.held(*ALWAYS) == {"embed.default": 2.0, "other.default": 1.0}
    assert there.held(halves[3].started_at_ns, ALWAYS[1]) == {"embed.default": 0.5, "other.default": 1.0}


def test_activity_is_when_a_function_was_busy_and_how_long_its_wakes_took(service):
    runs = [lease(0), lease(1), lease(30), lease(31, phase=LeasePhase.IDLE)]
    service.deliver(*runs, start(), start(started_at_ns=1 + start().started_at_ns, error="no"))
    [found] = RemoteLedger(service.get).activity(NOW_NS - 86400 * SECOND_NS)
    assert found.busy == ((runs[0].started_at_ns, runs[1].ended_at_ns), (runs[2].started_at_ns, runs[2].ended_at_ns))
    assert found.last_busy_end_ns == runs[2].ended_at_ns
    assert found.wakes_s == {Rung.RESTORE: (0.25,)}


def test_activity_of_longer_ago_than_anybody_needs_is_not_read(service):
    old_ns, new_ns = (NOW_NS - days * 86400 * SECOND_NS for days in (4, 2))
    old, new = (lease(at, started_at_ns=at, ended_at_ns=at + SECOND_NS) for at in (old_ns, new_ns))
    service.deliver(old, new, start(started_at_ns=old.started_at_ns))
    [found] = RemoteLedger(service.get).activity(0)
    assert found.busy == ((new.started_at_ns, new.ended_at_ns),)
    assert found.wakes_s == {}


def test_no_more_than_two_read_at_once(service, monkeypatch):
    entered, most, go = [], [], threading.Event()

    def starts(*_, **__):
        entered.append(1)
        most.append(len(entered))
        if len(most) == 2:
            go.set()
        assert go.wait(30)
        entered.pop()
        return []

    monkeypatch.setattr(service.ledger, "starts", starts)
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(service.ask, ["/v1/starts"] * 5))
    assert [status for status, _ in answers] == [200] * 5
    assert max(most) == 2


def test_capacity_says_where_each_devices_hour_went(service):
    service.deliver(lease(0), device(0), device(1, held_ns=0), device(2))
    found = RemoteLedger(service.get).capacity(NOW_NS - 3600 * SECOND_NS, NOW_NS + 3600 * SECOND_NS)
    assert sum(hour.capacity_ns for hour in found.hours) == 3600 * SECOND_NS
    assert [dict(hour.tenants_ns) for hour in found.hours] == [{"default": SECOND_NS}]
    assert [(hour.idle_ns, hour.residual_ns) for hour in found.hours] == [(SECOND_NS, SECOND_NS)]
    assert [(finding.kind.value, finding.nanoseconds) for finding in found.findings] == [("gap", SECOND_NS)]


# Whatever comes ----------------------------------------------------------------------------------

_TEXT = st.text(max_size=20) | st.sampled_from(["", "\0", "\ud800", "node-1", "lease"])
_VALUE = st.none() | st.booleans() | st.integers() | st.floats() | _TEXT | st.lists(st.integers(), max_size=2)
_GOOD = st.sampled_from([encode(record, "node-1") for record in (lease(0), device(0), start())])


@st.composite
def spoiled(draw):
    """A record of which some fields are anything."""
    record = dict(draw(_GOOD))
    for name in draw(st.lists(st.sampled_from(sorted(record)), max_size=2)):
        record[name] = draw(_VALUE)
    if isinstance(record.get("record"), dict) and draw(st.booleans()):
        inner = dict(record["record"])
        inner[draw(st.sampled_from(sorted(inner)))] = draw(_VALUE)
        record["record"] = inner
    return to_line(draw(st.integers(0, 9)), record)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(lines=st.lists(spoiled() | st.binary(max_size=40), max_size=4))
def test_what_is_not_refused_can_be_stored(ledger, lines):
    batch = read_batch(b"\n".join(lines), "node-1", NOW_NS)
    ledger.add(batch.intervals, batch.starts, batch.devices)
    ledger.intervals(*ALWAYS)
    ledger.starts()


# A database that goes away -----------------------------------------------------------------------


@pytest.fixture
def killed_at(ledger):
    """Kills the database's side of a connection at the n-th step of a transaction: before each statement, before the
    commit, after it. Gives a function that arms it, and what it has met."""
    if ledger._engine.dialect.name != "postgresql":
        pytest.skip("SQLite has no connection that could be cut: see tests/unit/ledger")
    killer = sa.create_engine(ledger._engine.url, isolation_level="AUTOCOMMIT")
    armed: list[int] = []
    met: Counter[str] = Counter()

    def step(connection, name):
        if not armed:
            return
        armed[0] -= 1
        if armed[0] == 0:
            met[name] += 1
            pid = connection.connection.dbapi_connection.info.backend_pid
            with killer.connect() as other:
                other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    @sa.event.listens_for(ledger._engine, "before_cursor_execute")
    def _before(connection, _cursor, statement, *_):
        step(connection, statement.split()[0].lower())

    @sa.event.listens_for(ledger._engine, "commit")
    def _commit(connection):
        step(connection, "commit")

    yield lambda n: armed.__setitem__(slice(None), [n]), met
    killer.dispose()


def test_a_connection_that_is_killed_at_any_step_loses_nothing_and_counts_nothing_twice(service, killed_at):
    arm, met = killed_at
    records, n = [lease(0), device(0), start()], 0
    while True:
        n += 1
        shifted = [replace(lease(0), id=f"x:{n}"), replace(device(0), id=f"x:{n}"), start(replica=f"embed-{n}")]
        before = sum(met.values())
        arm(n)
        status, answer = service.deliver(*shifted)
        arm(0)
        if sum(met.values()) == before:  # it has no step more
            assert status == 200
            break
        assert status == 503, answer
        assert not [i for i in service.ledger.intervals(*ALWAYS) if i.id == f"node-1/x:{n}"]
        assert service.deliver(*shifted)[0] == 200
    assert met["commit"] == 1
    assert met["insert"] == len(records)
    assert (
        len(service.ledger.intervals(*ALWAYS))
        == len(service.ledger.devices(*ALWAYS))
        == len(service.ledger.starts())
        == n
    )


def test_an_answer_that_is_lost_after_the_commit_is_made_good_by_the_next_delivery(service, monkeypatch):
    add = service.ledger.add

    def add_and_die(*records):
        add(*records)
        raise Unavailable("The service was killed before it could answer.")

    monkeypatch.setattr(service.ledger, "add", add_and_die)
    assert service.deliver(lease(0), device(0))[0] == 502
    monkeypatch.undo()
    assert service.deliver(lease(0), device(0), lease(1))[1]["acked"] == 3
    assert len(service.ledger.intervals(*ALWAYS)) == 2
