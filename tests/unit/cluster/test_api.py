import asyncio
import json
import ssl

import pytest
from aiohttp import web

from adapter.cluster import api as module
from adapter.cluster.api import GONE, NOT_LEADER, Api, Pace, Patience
from adapter.cluster.credentials import Access
from adapter.cluster.resources import CONFIG_MAPS, NAMESPACES, PODS, SERVICES
from adapter.errors import ConfigError, Conflict, NotFound, Overloaded, Timeout, Unavailable
from tests.fakes.api_server import FakeApiServer, FakeCredentials, cut, hang, status

PATH = CONFIG_MAPS.path("ns", "a")
BODY = CONFIG_MAPS.body("a", "ns", data={"x": "1"})
HASTY = Patience(total_s=0.2, attempts=1)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.0)


def play(scene, **options):
    """Run `scene(server, api)` against a fake server."""

    async def played():
        server = FakeApiServer()
        async with server.serving(), server.client(**options) as api:
            await asyncio.wait_for(scene(server, api), 30)

    asyncio.run(played())


@pytest.mark.parametrize(
    ("code", "reason", "kind", "named"),
    [
        (400, "BadRequest", ConfigError, "refused-object"),
        (403, "Forbidden", Unavailable, "forbidden"),
        (404, "NotFound", NotFound, "not-found"),
        (409, "Conflict", Conflict, "conflict"),
        (409, "AlreadyExists", Conflict, "exists"),
        (410, "Expired", Unavailable, GONE),
        (422, "Invalid", ConfigError, "refused-object"),
        (500, "InternalError", Unavailable, "api-broken"),
    ],
)
def test_what_the_server_refuses_is_said_in_its_words_and_not_tried_again(code, reason, kind, named):
    async def scene(server, api):
        server.next(status(code, reason, "because it is so"))
        with pytest.raises(kind) as caught:
            await api.apply(PATH, BODY)
        assert (caught.value.code, caught.value.why) == (named, "because it is so")
        assert len(server.requests) == 1

    play(scene)


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ('pods is forbidden: User "a" cannot create resource "pods" in API group ""', "Role"),
        ("pods is forbidden: exceeded quota: q", ""),
        ('admission webhook "plain.pods.gpufn.dev" denied the request: The budget is spent.', ""),
    ],
)
def test_rights_are_asked_for_where_they_are_what_is_missing(said, hint):
    async def scene(server, api):
        server.next(status(403, "Forbidden", said))
        with pytest.raises(Unavailable) as caught:
            await api.create(PODS.path("ns"), BODY)
        assert (caught.value.why, hint in caught.value.hint, bool(caught.value.hint)) == (said, True, bool(hint))

    play(scene)


@pytest.mark.parametrize("code", [429, 502, 503, 504])
def test_what_the_server_cannot_for_the_moment_is_tried_again(code):
    async def scene(server, api):
        server.next(status(code, "Later"))
        await api.apply(PATH, BODY)
        assert server.objects[PATH]["data"] == {"x": "1"}

    play(scene)


def test_an_object_is_not_made_again_where_it_may_have_been_made():
    async def scene(server, api):
        for failure in (status(503, "Later"), cut):
            server.next(failure)
            with pytest.raises(Unavailable):
                await api.create(CONFIG_MAPS.path("ns"), BODY)
        assert len(server.requests) == 2
        server.next(status(429, "TooManyRequests"))
        await api.create(CONFIG_MAPS.path("ns"), BODY)

    play(scene)


def test_a_server_that_names_a_time_is_left_alone_until_then():
    async def scene(server, api):
        server.next(status(429, "TooManyRequests", **{"Retry-After": "3600"}))
        with pytest.raises(Overloaded) as caught:
            await api.get(PATH)
        assert caught.value.retry_after_s == 3600
        assert len(server.requests) == 1

    play(scene)


def test_attempts_have_an_end():
    async def scene(server, api):
        for _ in range(5):
            server.next(status(503, "Later"))
        with pytest.raises(Unavailable):
            await api.get(PATH)
        assert len(server.requests) == 5

    play(scene)


def test_a_server_that_hangs_does_not_hold_the_caller():
    async def scene(server, api):
        server.next(hang)
        with pytest.raises(Timeout):
            await api.get(PATH, patience=HASTY)

    play(scene)


def test_a_cut_answer_is_asked_for_again():
    async def scene(server, api):
        await server.put(PATH, BODY)
        server.next(cut)
        assert (await api.get(PATH))["data"] == {"x": "1"}

    play(scene)


@pytest.mark.parametrize("garbage", [b"", b"<html>", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"items": [}'])
def test_garbage_is_named_and_asked_for_once(garbage):
    async def scene(server, api):
        for call in (api.get(PATH), api.list(CONFIG_MAPS.path(), lambda value: value)):
            server.next(web.Response(body=garbage))
            with pytest.raises(Unavailable, match="cannot be read"):
                await call
        assert len(server.requests) == 2

    play(scene)


def test_a_server_that_is_not_there_is_said_to_be_unreachable():
    async def scene(server, api):
        async with Api(FakeCredentials(Access("http://127.0.0.1:1", "default"))) as lost:
            with pytest.raises(Unavailable) as caught:
                await lost.get(PATH)
        assert caught.value.code == "api-unreachable"

    play(scene)


def test_no_error_and_no_log_has_a_token(caplog):
    async def scene(server, api):
        access = Access(server.url, "default", headers={"Authorization": "Bearer s3cret"})
        async with Api(FakeCredentials(access)) as known:
            for answer in (status(401, "Unauthorized"), status(401, "Unauthorized")):
                server.next(answer)
            with pytest.raises(Unavailable) as caught:
                await known.get(PATH)
            assert caught.value.code == "not-authenticated"
            assert "s3cret" not in caught.value.to_text() + repr(access) + caplog.text

    play(scene)


def test_credentials_that_were_rotated_are_taken_once_the_old_ones_are_refused():
    async def scene(server, api):
        async def gate(request):
            if request.headers["Authorization"] != "Bearer new":
                return status(401, "Unauthorized")
            return web.json_response({"ok": True})

        old, new = (Access(server.url, "d", headers={"Authorization": f"Bearer {n}"}) for n in ("old", "new"))
        async with Api(FakeCredentials(old, new)) as rotated:
            server.next(gate)
            server.next(gate)
            assert await rotated.get(PATH) == {"ok": True}

    play(scene)


def test_a_list_comes_in_pages_as_what_is_made_of_each():
    async def scene(server, api):
        for number in range(7):
            await server.put(CONFIG_MAPS.path("ns", f"m{number}"), {"metadata": {"labels": {"keep": str(number % 2)}}})
        listing = await api.list(
            CONFIG_MAPS.path(),
            lambda value: value["metadata"]["name"] if value["metadata"]["labels"]["keep"] == "1" else None,
            page_items=3,
        )
        assert listing.items == ["m1", "m3", "m5"]
        assert len(server.requests) == 3

    play(scene)


def test_a_list_whose_pages_ran_out_of_time_begins_anew():
    async def scene(server, api):
        for number in range(4):
            await server.put(CONFIG_MAPS.path("ns", f"m{number}"), {})
        server.next(status(410, "Expired"), lambda request: "continue" in request.query)
        listing = await api.list(CONFIG_MAPS.path(), lambda value: value["metadata"]["name"], page_items=2)
        assert listing.items == ["m0", "m1", "m2", "m3"]

    play(scene)


def test_others_get_their_turns_while_a_long_list_is_read():
    async def scene(server, api):
        items = [{"metadata": {"name": f"p{number}"}, "pad": ["x" * 10] * 100} for number in range(3000)]
        server.next(web.json_response({"metadata": {"resourceVersion": "1"}, "items": items}))
        turns, seen = 0, []

        async def others():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        def project(value):
            seen.append(turns)
            return value["metadata"]["name"]

        task = asyncio.create_task(others())
        assert len((await api.list(PODS.path(), project)).items) == 3000
        task.cancel()
        assert seen[-1] > seen[0]

    play(scene)


def test_more_calls_than_the_burst_wait_for_their_turns():
    now = [0.0]
    pace = Pace(per_s=20, burst=40, clock=lambda: now[0])
    assert [pace.delay_s() for _ in range(42)] == pytest.approx([0.0] * 40 + [0.05, 0.1])
    now[0] = 1000.0
    assert [pace.delay_s() for _ in range(41)] == pytest.approx([0.0] * 40 + [0.05])


def test_calls_that_are_given_up_before_their_turn_leave_it_to_others():
    """Made-up tokens make a ledger ask as often as they are shown: others must not wait for minutes after the last."""

    async def scene(server, api):
        await api.create(CONFIG_MAPS.path("ns"), BODY)
        many = (api.get(PATH, patience=HASTY) for _ in range(500))
        assert any(isinstance(each, Timeout) for each in await asyncio.gather(*many, return_exceptions=True))
        await asyncio.sleep(HASTY.total_s)
        assert await api.get(PATH, patience=HASTY)

    play(scene, pace=Pace(per_s=20, burst=40))


def test_who_may_lead_no_more_writes_no_more_but_reads():
    async def scene(server, api):
        left = [5.0]
        fenced = api.fenced(lambda: left[0])
        await fenced.apply(PATH, BODY)
        left[0] = 0.0
        with pytest.raises(Conflict) as caught:
            await fenced.delete(PATH)
        assert caught.value.code == NOT_LEADER
        assert await fenced.get(PATH)
        assert PATH in server.objects

    play(scene)


def test_a_leaders_write_takes_no_longer_than_its_lease():
    async def scene(server, api):
        server.next(hang)
        with pytest.raises(Timeout):
            await api.fenced(lambda: 0.1).apply(PATH, BODY, patience=Patience(attempts=1))

    play(scene)


def test_a_name_leads_to_no_other_path():
    assert SERVICES.path("../x", "..") == "/api/v1/namespaces/..%2Fx/services/%2E%2E"
    assert NAMESPACES.path("ignored", "a?b#c") == "/api/v1/namespaces/a%3Fb%23c"
    assert SERVICES.path("s", "https:l:8443", "proxy/v1") == "/api/v1/namespaces/s/services/https:l:8443/proxy/v1"


def test_quoted_names_arrive_as_they_were_quoted():
    async def scene(server, api):
        with pytest.raises(NotFound):
            await api.get(CONFIG_MAPS.path("ns", "a/../b"))
        assert server.requests == [("GET", "/api/v1/namespaces/ns/configmaps/a%2F..%2Fb")]

    play(scene)


def test_a_server_that_the_cas_do_not_know_is_not_talked_to(tls_server):
    async def scene(server, api):
        async with tls_server() as (url, ca_file):
            for tls, works in (
                (ssl.create_default_context(), False),
                (ssl.create_default_context(cafile=ca_file), True),
            ):
                async with Api(FakeCredentials(Access(url, "default", tls))) as client:
                    if works:
                        assert await client.get("/api") == {"ok": True}
                        continue
                    with pytest.raises(Unavailable) as caught:
                        await client.get("/api")
                    assert caught.value.code == "api-untrusted"

    play(scene)


def test_lines_are_whole_however_they_arrive():
    async def scene(server, api):
        async def pieces(request):
            response = web.StreamResponse()
            await response.prepare(request)
            for piece in (b"on", b"e\ntw", b"o\n\nthree"):
                await response.write(piece)
                await asyncio.sleep(0)
            return response

        server.next(pieces)
        assert [line async for line in api.lines("/api/log")] == [b"one", b"two", b"three"]

    play(scene)


def test_a_watch_says_what_happens_after_a_version_until_the_server_ends_it():
    async def scene(server, api):
        made = await server.put(PATH, BODY)
        await server.put(PATH, {**BODY, "data": {"x": "2"}})
        await server.remove(PATH)
        version = made["metadata"]["resourceVersion"]
        watch = api.watch(CONFIG_MAPS.path(), version, timeout_s=1, silence_s=10)
        assert [kind async for kind, _ in watch] == ["MODIFIED", "DELETED"]

    play(scene)


def test_an_object_of_a_megabyte_is_written_and_passes_a_watch():
    async def scene(server, api):
        await api.apply(PATH, {"data": {"x": "y" * 2**20}})
        watch = api.watch(CONFIG_MAPS.path(), "1", timeout_s=1, silence_s=10)
        assert [len(value["data"]["x"]) async for _, value in watch] == [2**20]

    play(scene)


def test_json_goes_out_as_it_was_meant():
    async def scene(server, api):
        await api.apply(PATH, {"data": {"ü": "\u2028"}})
        assert server.objects[PATH]["data"] == {"ü": "\u2028"}
        assert json.dumps(server.bodies[0])

    play(scene)
