"""Records reach the ledger at least once and count once: over TLS, through cuts, refusals and wrong answers."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from prometheus_client import generate_latest

from adapter.agent.deliver import Delivery
from adapter.agent.metrics import Metrics
from adapter.agent.spool import Spool
from adapter.cluster import certificates
from adapter.cluster.serving import served
from adapter.errors import Unavailable
from adapter.ledger import metrics as ledger_metrics
from adapter.ledger.callers import Caller
from adapter.ledger.connection import LedgerConnection
from adapter.ledger.server import LedgerService
from adapter.ledger.store import Ledger as Store
from adapter.ledger.wire import encode
from adapter.records import LeaseInterval, LeasePhase

NOW_NS = 1_800_000_000 * 10**9
NAME = "gpufn-ledger.gpufn-system.svc"


def lease(n, ended_at_ns=None):
    return encode(
        LeaseInterval(
            id=f"x:{n}", function="embed", namespace="acme", revision="1", replica="r", tenant="acme", price_class="standard",
            device="GPU-a", share=1.0, phase=LeasePhase.IDLE, started_at_ns=NOW_NS - 100 + n, ended_at_ns=ended_at_ns or NOW_NS - 99 + n,
            gpu_model="", node="node-1",
        ),
        "node-1",
    )  # fmt: skip


@dataclass
class Callers:
    tokens: list = field(default_factory=list)

    async def of(self, token):
        self.tokens.append(token)
        return Caller("gpufn-agents", "gpufn-agent", "node-1") if token.startswith("token-") else None


class Scene:
    """A ledger service with TLS, and one agent's spool and delivery."""

    def __init__(self, folder):
        self.store = Store.open(f"sqlite:///{folder / 'ledger.sqlite'}")
        self.callers = Callers()
        self.app = LedgerService(self.store, self.callers, ledger_metrics.Metrics(), lambda: NOW_NS).application()
        self.files = folder / "mounted"
        self.files.mkdir()
        self.spool, self.metrics, self.clock = Spool.open(folder / "state"), Metrics(), []
        (self.files / "token").write_text("token-1\n")
        self.trust(certificates.make_authority(dt.datetime.now(dt.timezone.utc)))

    def trust(self, authority):
        self.authority = authority
        (self.files / "ca.crt").write_bytes(authority.certificate)

    @asynccontextmanager
    async def serving(self, app=None):
        pair = certificates.issue(self.authority, ["localhost", NAME], dt.datetime.now(dt.timezone.utc))
        (self.files / "tls.crt").write_bytes(pair.certificate)
        (self.files / "tls.key").write_bytes(pair.key)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.files / "tls.crt", self.files / "tls.key")
        async with (
            served(app or self.app, 0, address="127.0.0.1", tls=context) as port,
            LedgerConnection(f"https://localhost:{port}", self.files) as ledger,
        ):
            self.delivery = Delivery(self.spool, ledger, self.metrics, self.clock.append)
            yield self

    async def once(self):
        return await self.delivery.once()

    def stored(self):
        return sorted(interval.id for interval in self.store.intervals(0, 2**62))

    def metric(self, line):
        return line in generate_latest(self.metrics.registry).decode()


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


def test_what_is_delivered_waits_no_more(scene):
    async def play():
        async with scene.serving():
            scene.spool.append([lease(n) for n in range(3)], {})
            assert await scene.once()
            assert await scene.once()

    run(play())
    assert scene.stored() == [f"node-1/x:{n}" for n in range(3)]
    assert (scene.spool.unacked, scene.clock) == (0, [NOW_NS])


def test_a_long_backlog_goes_in_parts(scene):
    async def play():
        async with scene.serving():
            for n in range(5):
                scene.spool.append([lease(n * 400 + m) for m in range(400)], {})
            return [await scene.once() for _ in range(3)]

    assert run(play()) == [False, False, True]
    assert len(scene.stored()) == 2000


def test_files_are_read_anew_as_they_are_renewed(scene):
    async def play():
        async with scene.serving():
            scene.spool.append([lease(1)], {})
            await scene.once()
        scene.trust(certificates.make_authority(dt.datetime.now(dt.timezone.utc)))
        (scene.files / "token").write_text("token-2")
        async with scene.serving():
            scene.spool.append([lease(2)], {})
            await scene.once()

    run(play())
    assert scene.callers.tokens == ["token-1", "token-2"]
    assert len(scene.stored()) == 2


def test_a_ledger_that_the_authority_did_not_sign_is_told_nothing(scene):
    async def play():
        scene.spool.append([lease(1)], {})
        async with scene.serving():
            scene.trust(certificates.make_authority(dt.datetime.now(dt.timezone.utc)))
            await scene.once()

    with pytest.raises(Unavailable):
        run(play())
    assert (scene.callers.tokens, scene.spool.unacked) == ([], 1)


@pytest.mark.parametrize("missing", ["token", "ca.crt"])
def test_without_its_files_it_waits(scene, missing):
    async def play():
        scene.spool.append([lease(1)], {})
        async with scene.serving():
            (scene.files / missing).unlink()
            await scene.once()

    with pytest.raises(Unavailable):
        run(play())
    assert scene.spool.unacked == 1


def test_a_refused_record_holds_up_nothing_and_is_counted(scene):
    async def play():
        async with scene.serving():
            scene.spool.append([lease(1), lease(2, ended_at_ns=NOW_NS + 3600 * 10**9), lease(3)], {})
            assert await scene.once()

    run(play())
    assert scene.stored() == ["node-1/x:1", "node-1/x:3"]
    assert scene.spool.unacked == 0
    assert scene.metric('gpufn_agent_refused_total{code="clock-ahead"} 1.0')


def answering(*answers):
    """A service that says these things, one after the other."""
    left = list(answers)

    async def answer(_request):
        said = left.pop(0)
        if said is None:
            raise web.HTTPServiceUnavailable(text="soon")
        return said if isinstance(said, web.Response) else web.json_response(said)

    app = web.Application()
    app.router.add_post("/v1/records", answer)
    return app


@pytest.mark.parametrize(
    "answer",
    [
        None,
        web.Response(status=401, text='{"error": {"message": "who?"}}'),
        web.Response(status=307, headers={"Location": "https://localhost:1/"}),
        web.Response(text="<html>a proxy</html>"),
        web.Response(text="[]"),
        {"acked": None, "rejected": []},
        {"acked": 0, "rejected": []},
        {"acked": 5, "rejected": "none"},
    ],
    ids=lambda answer: str(answer)[:30],
)
def test_what_is_no_acknowledgement_acknowledges_nothing(scene, answer):
    async def play():
        scene.spool.append([lease(1)], {})
        async with scene.serving(answering(answer)):
            await scene.once()

    with pytest.raises(Unavailable):
        run(play())
    assert scene.spool.unacked == 1


def test_an_acknowledgement_that_never_came_makes_nothing_count_twice(scene, monkeypatch):
    async def play():
        scene.spool.append([lease(1)], {})
        async with scene.serving():
            lost = Unavailable("The answer was lost.")
            deliver = scene.delivery._ledger.deliver

            async def deliver_and_lose(lines):
                await deliver(lines)
                raise lost

            monkeypatch.setattr(scene.delivery._ledger, "deliver", deliver_and_lose)
            with pytest.raises(Unavailable):
                await scene.once()
            assert scene.spool.unacked == 1
            monkeypatch.undo()
            scene.spool.append([lease(2)], {})
            assert await scene.once()

    run(play())
    assert scene.stored() == ["node-1/x:1", "node-1/x:2"]


def test_it_tries_again_until_the_ledger_is_there_and_wakes_when_there_is_more(scene, monkeypatch):
    monkeypatch.setattr("adapter.agent.deliver._FIRST_PAUSE_S", 0.01)

    async def play():
        app = answering(
            None, None, {"acked": 1, "rejected": [], "now_ns": 1}, {"acked": 2, "rejected": [], "now_ns": 2}
        )
        async with scene.serving(app):
            scene.spool.append([lease(1)], {})
            heard = asyncio.Queue()
            scene.delivery._on_clock = heard.put_nowait
            task = asyncio.create_task(scene.delivery.run())
            assert await heard.get() == 1
            scene.spool.append([lease(2)], {})
            scene.delivery.more.set()
            assert await heard.get() == 2
            task.cancel()

    run(play())
    assert scene.spool.unacked == 0
    assert scene.metric('gpufn_agent_failures_total{peer="ledger"} 2.0')


def test_what_comes_while_it_looks_does_not_wait_for_the_next_look(scene, monkeypatch):
    async def play():
        async with scene.serving():
            looks, scene.delivery._on_clock = scene.spool.pending, (heard := asyncio.Queue()).put_nowait
            loop = asyncio.get_running_loop()

            def nothing_yet(limit):
                found = looks(limit)
                if not scene.spool.unacked:
                    scene.spool.append([lease(1)], {})
                    loop.call_soon_threadsafe(scene.delivery.more.set)
                return found

            monkeypatch.setattr(scene.spool, "pending", nothing_yet)
            monkeypatch.setattr("adapter.agent.deliver._LOOK_S", 60.0)
            task = asyncio.create_task(scene.delivery.run())
            await asyncio.wait_for(heard.get(), 10)
            task.cancel()

    run(play())
