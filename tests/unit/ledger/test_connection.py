"""Calls of the ledger service itself, over TLS."""

import asyncio
import datetime as dt
import gzip
import ssl
import time
import tracemalloc
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from adapter.cluster.certificates import issue, make_authority
from adapter.errors import Timeout, Unavailable
from adapter.ledger.callers import Caller
from adapter.ledger.client import activity, held
from adapter.ledger.connection import LedgerConnection
from adapter.ledger.metrics import Metrics
from adapter.ledger.server import LedgerService
from adapter.ledger.store import Ledger
from adapter.records import LeaseInterval, LeasePhase

S = 10**9
NOW = dt.datetime.now(dt.timezone.utc)
AUTHORITY = make_authority(NOW)
ALL = activity(0)


class Controllers:
    """One token is ours."""

    async def of(self, token):
        return Caller("gpufn-system", "gpufn-controller") if token == "right" else None


@pytest.fixture
def trusted(tmp_path):
    """The folder that the kubelet brings."""
    folder = tmp_path / "ledger"
    folder.mkdir()
    (folder / "token").write_text("right\n")
    (folder / "ca.crt").write_bytes(AUTHORITY.certificate)
    return folder


@asynccontextmanager
async def served(tmp_path, app):
    pair = issue(AUTHORITY, ["localhost"], NOW)
    for name, content in (("tls.crt", pair.certificate), ("tls.key", pair.key)):
        (tmp_path / name).write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "localhost", 0, ssl_context=context).start()
    try:
        yield f"https://localhost:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def ask(address, folder, question=ALL):
    async with LedgerConnection(address, folder) as ledger:
        return await ledger.ask(question)


def asked(tmp_path, folder, question=lambda end_ns: activity(end_ns - 60 * S)):
    """The answer of a ledger that has one lease, of 10 s."""
    end_ns = time.time_ns()
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    try:
        ledger.add([LeaseInterval(
            id="1", function="embed", namespace="team", revision="1", replica="r", tenant="team", price_class="standard",
            device="GPU-1", share=1.0, phase=LeasePhase.RUNNING, started_at_ns=end_ns - 10 * S, ended_at_ns=end_ns,
        )], [], [])  # fmt: skip

        async def scene():
            app = LedgerService(ledger, Controllers(), Metrics()).application()
            async with served(tmp_path, app) as address:
                return await ask(address, folder, question(end_ns))

        return asyncio.run(scene()), end_ns
    finally:
        ledger.close()


def test_what_the_ledger_knows_of_traffic_is_what_comes(tmp_path, trusted):
    (found,), end_ns = asked(tmp_path, trusted)
    assert (found.namespace, found.function, found.busy) == ("team", "embed", ((end_ns - 10 * S, end_ns),))


def test_what_was_held_comes_in_gpu_seconds(tmp_path, trusted):
    found, _ = asked(tmp_path, trusted, lambda end_ns: held(end_ns - 5 * S, end_ns))
    assert found == {"embed.team": 5.0}


def test_a_token_that_is_not_known_is_refused_and_never_told(tmp_path, trusted):
    (trusted / "token").write_text("very-wrong")
    with pytest.raises(Unavailable, match="refuses") as refused:
        asked(tmp_path, trusted)
    assert "very-wrong" not in refused.value.to_text()


def test_a_ledger_whose_certificate_another_signed_is_not_asked(tmp_path, trusted):
    (trusted / "ca.crt").write_bytes(make_authority(NOW).certificate)
    with pytest.raises(Unavailable):
        asked(tmp_path, trusted)


@pytest.mark.parametrize("nothing", [b"", b"\n"])
def test_where_no_authority_is_told_yet_no_other_is_trusted(tmp_path, trusted, monkeypatch, nothing):
    (tmp_path / "public.pem").write_bytes(AUTHORITY.certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "public.pem"))  # what this machine trusts for the web
    (trusted / "ca.crt").write_bytes(nothing)
    with pytest.raises(Unavailable, match="yet"):
        asked(tmp_path, trusted)


def test_one_that_says_nothing_is_not_waited_for(tmp_path, trusted, monkeypatch):
    monkeypatch.setattr("adapter.ledger.connection._LIMIT_S", 0.2)

    async def scene():
        app, over = web.Application(), asyncio.Event()

        async def silent(request):
            await over.wait()

        app.router.add_get("/v1/activity", silent)
        async with served(tmp_path, app) as address:
            with pytest.raises(Timeout):
                await ask(address, trusted)
            over.set()

    asyncio.run(scene())


def test_an_answer_is_kept_to_a_length_also_where_it_came_short(tmp_path, trusted, monkeypatch):
    monkeypatch.setattr("adapter.ledger.connection._ANSWER_LIMIT_BYTES", 2**20)
    packed = gzip.compress(b"0" * 2**26)
    answers = iter([web.Response(body=b"0" * 2**23), web.Response(body=packed, headers={"Content-Encoding": "gzip"})])

    async def scene():
        async def much(request):
            return next(answers)

        app = web.Application()
        app.router.add_get("/v1/activity", much)
        async with served(tmp_path, app) as address:
            with pytest.raises(Unavailable, match="answer") as long:
                await ask(address, trusted)
            assert "longer" in long.value.why
            tracemalloc.start()
            try:
                with pytest.raises(Unavailable, match="answer"):
                    await ask(address, trusted)
                assert tracemalloc.get_traced_memory()[1] < 2**24
            finally:
                tracemalloc.stop()

    asyncio.run(scene())


@pytest.mark.parametrize("missing", ["token", "ca.crt"])
def test_before_the_kubelet_has_brought_what_is_needed_it_says_so(trusted, missing):
    (trusted / missing).unlink()
    with pytest.raises(Unavailable, match="cannot be asked yet") as refused:
        asyncio.run(ask("https://localhost:1", trusted))
    assert refused.value.hint


def test_a_ledger_that_is_down_is_unavailable(trusted):
    with pytest.raises(Unavailable):
        asyncio.run(ask("https://localhost:1", trusted))


def test_an_answer_that_is_no_ledgers_is_unavailable(tmp_path, trusted):
    async def nonsense(request):
        return web.json_response({"functions": [{"function": 1}]})

    async def scene():
        app = web.Application()
        app.router.add_get("/v1/activity", nonsense)
        async with served(tmp_path, app) as address:
            await ask(address, trusted)

    with pytest.raises(Unavailable):
        asyncio.run(scene())
