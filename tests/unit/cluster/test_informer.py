import asyncio
from contextlib import asynccontextmanager

from aiohttp import web

from adapter.cluster.informer import Informer, Rhythm
from adapter.cluster.resources import CONFIG_MAPS
from tests.fakes.api_server import FakeApiServer, cut, hang, lists, status, watches
from tests.fakes.replicas import until

QUICK = Rhythm(first_pause_s=0.001, pause_limit_s=0.01)
ALL = CONFIG_MAPS.path()


def path(name):
    return CONFIG_MAPS.path("ns", name)


def data(value):
    return value.get("data", {}).get("x")


def config(value):
    return {"data": {"x": value}}


@asynccontextmanager
async def running(server, rhythm=QUICK, project=data):
    """An informer with the list of what its handler was told."""
    async with server.client() as api:
        informer = Informer(api, ALL, project, rhythm=rhythm)
        told = []
        informer.on_change(lambda *change: told.append(change))
        task = asyncio.create_task(informer.run())
        try:
            await asyncio.wait_for(informer.synced.wait(), 30)
            yield informer, told
        finally:
            assert not task.done()
            task.cancel()


def play(scene, **options):
    async def played():
        server = FakeApiServer()
        async with server.serving():
            await server.put(path("a"), config("1"))
            async with running(server, **options) as (informer, told):
                await until(lambda: server.watching)
                await asyncio.wait_for(scene(server, informer, told), 30)

    asyncio.run(played())


def test_handlers_are_told_what_was_and_what_is():
    async def scene(server, informer, told):
        await server.put(path("a"), config("2"))
        await server.put(path("b"), config("1"))
        await server.remove(path("a"))
        await until(lambda: len(told) == 4)
        assert told == [("ns/a", None, "1"), ("ns/a", "1", "2"), ("ns/b", None, "1"), ("ns/a", "2", None)]
        assert informer.snapshot() == {"ns/b": "1"}
        assert server.requests[0][0] == "GET"

    play(scene)


def test_a_snapshot_stays_what_it_was():
    async def scene(server, informer, told):
        before = informer.snapshot()
        await server.put(path("a"), config("2"))
        await until(lambda: informer.get("ns/a") == "2")
        assert before == {"ns/a": "1"}
        assert informer.snapshot() is informer.snapshot()

    play(scene)


def test_what_becomes_none_of_ours_is_gone():
    async def scene(server, informer, told):
        await server.put(path("a"), {})
        await until(lambda: told[-1] == ("ns/a", "1", None))
        assert not informer.snapshot()

    play(scene)


def test_a_watch_goes_on_where_it_was_when_the_server_ends_it():
    async def scene(server, informer, told):
        server.cut_watches()
        await server.put(path("a"), config("2"))
        await until(lambda: informer.get("ns/a") == "2")
        assert informer.lists == 1

    play(scene)


def test_a_version_that_is_gone_leads_to_a_new_list():
    async def scene(server, informer, told):
        server.silent.set()
        await server.put(path("b"), config("2"))
        await server.remove(path("a"))
        server.compact()
        server.cut_watches()
        await until(lambda: informer.lists == 2)
        assert informer.snapshot() == {"ns/b": "2"}
        assert told == [("ns/a", None, "1"), ("ns/a", "1", None), ("ns/b", None, "2")]

    play(scene)


def test_a_watch_that_falls_silent_is_found_and_asked_for_again():
    async def scene(server, informer, told):
        before = len(server.requests)
        server.silent.set()
        await until(lambda: len(server.requests) > before)
        server.silent.clear()
        await server.put(path("a"), config("2"))
        await until(lambda: informer.get("ns/a") == "2")
        assert informer.lists == 1

    play(scene, rhythm=Rhythm(silence_s=0.05, first_pause_s=0.001, pause_limit_s=0.01))


def test_a_server_that_agrees_to_a_watch_is_there_though_it_has_nothing_to_say():
    async def scene(server, informer, told):
        for _ in range(5):
            at = informer._heard_at
            await until(lambda at=at: informer._heard_at > at)
        assert informer.lists <= 2

    play(scene, rhythm=Rhythm(silence_s=0.05, first_pause_s=0.001, pause_limit_s=0.01))


def test_a_bookmark_moves_the_version_so_that_quiet_watches_do_not_grow_too_old():
    async def scene(server, informer, told):
        other = await server.put("/api/v1/namespaces/ns/pods/p", {})
        await server.bookmark()
        await until(lambda: informer._version == other["metadata"]["resourceVersion"])
        server.compact()
        server.cut_watches()
        await server.put(path("a"), config("2"))
        await until(lambda: informer.get("ns/a") == "2")
        assert informer.lists == 1

    play(scene)


def test_everything_is_told_again_from_time_to_time():
    async def scene(server, informer, told):
        await until(lambda: ("ns/a", "1", "1") in told)
        assert informer.lists > 1

    play(scene, rhythm=Rhythm(resync_s=0.05, first_pause_s=0.001, pause_limit_s=0.01))


def test_garbage_in_a_watch_leads_to_a_new_list():
    async def scene(server, informer, told):
        for garbage in (b"garbage\n", b'{"type": "ADDED", "object": {}}\n', b'{"type": 1}\n'):
            seen = informer.lists
            server.next(web.Response(body=garbage), watches)
            server.cut_watches()
            await until(lambda seen=seen: informer.lists > seen)
        await server.put(path("a"), config("2"))
        await until(lambda: informer.get("ns/a") == "2")

    play(scene)


def test_a_server_that_fails_for_a_while_costs_nothing_but_time():
    async def scene(server, informer, told):
        for answer in (status(503, "Later"), status(500, "InternalError"), status(429, "TooManyRequests"), cut):
            server.next(answer, watches)
        server.next(status(500, "InternalError"), lists)
        server.cut_watches()
        await server.put(path("a"), config("2"))
        await until(lambda: informer.get("ns/a") == "2")

    play(scene)


def test_a_watch_that_hangs_before_its_first_byte_is_silent_too():
    async def scene(server, informer, told):
        server.next(hang, watches)
        server.cut_watches()
        await server.put(path("a"), config("2"))
        await until(lambda: informer.get("ns/a") == "2")

    play(scene, rhythm=Rhythm(silence_s=0.05, first_pause_s=0.001, pause_limit_s=0.01))


def test_a_server_that_ends_each_watch_at_once_is_not_asked_in_a_circle():
    async def scene(server, informer, told):
        for _ in range(3):
            server.next(web.Response(), watches)
        server.cut_watches()
        await until(lambda: informer.failures >= 3)

    play(scene)


def test_an_object_that_cannot_be_read_hides_no_other(caplog):
    def strict(value):
        return value["data"]["x"]

    async def scene(server, informer, told):
        await server.put(path("b"), {})
        await server.put(path("c"), config("3"))
        await until(lambda: informer.get("ns/c") == "3")
        assert "an object could not be read" in caplog.text

    play(scene, project=strict)


def test_a_handler_that_fails_stops_no_other(caplog):
    async def scene(server, informer, told):
        informer.on_change(lambda *_: 1 / 0)
        informer.on_change(lambda *change: told.append("after"))
        await server.put(path("a"), config("2"))
        await until(lambda: told[-1] == "after")
        assert "a handler failed" in caplog.text

    play(scene)


def test_a_kind_that_is_not_there_is_none_until_it_is():
    async def scene():
        server = FakeApiServer()
        async with server.serving(), server.client() as api:
            await server.put(path("a"), config("1"))
            for answer in (status(404, "NotFound"), status(403, "Forbidden")):
                server.next(answer, lists)
            rhythm = Rhythm(first_pause_s=0.001, pause_limit_s=0.01, absent_s=0.01)
            informer = Informer(api, ALL, data, optional=True, rhythm=rhythm)
            task = asyncio.create_task(informer.run())
            await informer.synced.wait()
            assert not informer.snapshot()
            assert informer.healthy
            await until(lambda: informer.snapshot() == {"ns/a": "1"})
            task.cancel()

    asyncio.run(scene())


def test_a_cache_that_has_never_synced_is_not_healthy():
    async def scene():
        server = FakeApiServer()
        async with server.serving(), server.client() as api:
            informer = Informer(api, ALL, data)
            assert not informer.healthy
            async with running(server) as (other, _):
                assert other.healthy

    asyncio.run(scene())
