import asyncio
import sqlite3
import threading
from contextlib import asynccontextmanager
from functools import partial

import pytest
from aiohttp import web
from multidict import CIMultiDict

from adapter.errors import ConfigError, NotFound, Overloaded, StorageError
from adapter.openfaas import queue as module
from adapter.openfaas.callbacks import ANYWHERE, Callbacks
from adapter.openfaas.invocation import Invocation
from adapter.openfaas.queue import LANE_WIDTH, Queue
from tests.fakes.replicas import run, until


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", (0.0, 0.0, 0.0))


def invocation(body=b"x", **headers) -> Invocation:
    return Invocation("POST", "/p?q", CIMultiDict({"X-Call-Id": "id", **headers}), body)


@asynccontextmanager
async def queue_of(state, call, callbacks=ANYWHERE):
    queue = Queue(state / "queue.sqlite", call, callbacks)
    queue.start()
    try:
        yield queue
    finally:
        await queue.close()


@asynccontextmanager
async def callbacks(*statuses, **headers):
    """A server that keeps what it is sent, and answers with `statuses`, then 200, and `headers`."""
    got, left = [], list(statuses)

    async def take(request):
        got.append((request.headers.copy(), await request.read()))
        return web.Response(status=left.pop(0) if left else 200, headers=headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield got, "http://{}:{}/".format(*runner.addresses[0][:2])
    finally:
        await runner.cleanup()


def test_the_answer_is_called_back(state_dir):
    async def scenario():
        async def call(function, job):
            assert (function, job.method, job.path, job.body) == ("fn.ns", "POST", "/p?q", b"in")
            return 201, CIMultiDict({"Content-Type": "a/b", "Content-Length": "3"}), b"out"

        async with callbacks() as (got, url), queue_of(state_dir, call) as queue:
            await queue.put("fn.ns", invocation(b"in", **{"X-Callback-Url": url}))
            await until(lambda: got)
            headers, body = got[0]
            assert body == b"out"
            assert headers["Content-Type"] == "a/b"
            assert headers["X-Call-Id"] == "id"
            assert headers["X-Function-Name"] == "fn.ns"
            assert headers["X-Function-Status"] == "201"
            assert float(headers["X-Duration-Seconds"]) >= 0

    run(scenario())


def test_a_callback_that_is_not_taken_is_tried_again_but_not_for_ever(state_dir, caplog):
    async def scenario():
        async def call(*_):
            return 200, CIMultiDict(), b""

        async with callbacks(503, 500) as (got, url), queue_of(state_dir, call) as queue:
            await queue.put("fn.ns", invocation(**{"X-Callback-Url": url}))
            await until(lambda: not queue._lanes)
            assert len(got) == 3
        async with callbacks(*[500] * 9) as (got, url), queue_of(state_dir, call) as queue:
            await queue.put("fn.ns", invocation(**{"X-Callback-Url": url}))
            await until(lambda: "a callback was not taken" in caplog.text)
            assert len(got) == 4

    run(scenario())


def test_what_found_no_room_is_tried_again_and_what_failed_is_told(state_dir):
    async def scenario():
        problems = [
            Overloaded("full", code="queue-full"),
            Overloaded("full"),
            NotFound("gone", code="function-unknown"),
        ]

        async def call(*_):
            raise problems.pop(0)

        async with callbacks() as (got, url), queue_of(state_dir, call) as queue:
            await queue.put("fn.ns", invocation(**{"X-Callback-Url": url}))
            await until(lambda: got)
            assert not problems
            assert got[0][0]["X-Function-Status"] == "404"
            assert b"function-unknown" in got[0][1]

    run(scenario())


def test_what_no_budget_is_left_for_waits_for_the_day_to_end_however_often_it_is_refused(state_dir, monkeypatch):
    monkeypatch.setattr(module, "BUDGET_RETRY_S", 0.0)
    refusals = [Overloaded("spent", code="budget-spent", retry_after_s=3600)] * 50

    async def scenario():
        async def call(*_):
            if refusals:
                raise refusals.pop()
            return 200, CIMultiDict(), b"at last"

        async with callbacks() as (got, url), queue_of(state_dir, call) as queue:
            await queue.put("fn.ns", invocation(**{"X-Callback-Url": url}))
            await until(lambda: got)
            assert got[0][1] == b"at last"

    run(scenario())


def test_a_slow_function_holds_up_no_other(state_dir):
    async def scenario():
        go, running, done = asyncio.Event(), [], []

        async def call(function, _):
            running.append(function)
            if function == "slow.ns":
                await go.wait()
            done.append(function)
            return 200, CIMultiDict(), b""

        async with queue_of(state_dir, call) as queue:
            for _ in range(LANE_WIDTH + 3):
                await queue.put("slow.ns", invocation())
            await queue.put("quick.ns", invocation())
            await until(lambda: done == ["quick.ns"])
            assert running.count("slow.ns") == LANE_WIDTH
            go.set()
            await until(lambda: len(done) == LANE_WIDTH + 4)

    run(scenario())


def test_what_was_not_done_is_done_in_the_next_life(state_dir):
    async def scenario():
        async def never(*_):
            await asyncio.Event().wait()

        async with queue_of(state_dir, never) as queue:
            for n in range(LANE_WIDTH + 2):  # some run when it closes, some wait
                await queue.put("fn.ns", invocation(str(n).encode(), **{"X-Two": "1"}))
        done = []

        async def call(function, job):
            done.append((function, job.headers["X-Two"], job.body))
            return 200, CIMultiDict(), b""

        async with queue_of(state_dir, call):
            await until(lambda: len(done) == LANE_WIDTH + 2)
        assert sorted(done) == sorted(("fn.ns", "1", str(n).encode()) for n in range(LANE_WIDTH + 2))
        async with queue_of(state_dir, call):
            pass
        assert len(done) == LANE_WIDTH + 2  # done is done

    run(scenario())


def test_bounds_and_callbacks_are_checked_before_it_is_accepted(state_dir, monkeypatch):
    async def scenario():
        async def never(*_):
            await asyncio.Event().wait()

        monkeypatch.setattr(module, "LANE_LIMIT", 2)
        async with queue_of(state_dir, never) as queue:
            for url in ("ftp://x/", "nonsense", "http://", "http://[::1"):
                with pytest.raises(ConfigError):
                    await queue.put("fn.ns", invocation(**{"X-Callback-Url": url}))
            for _ in range(LANE_WIDTH + 2):
                await queue.put("fn.ns", invocation())
            with pytest.raises(Overloaded):
                await queue.put("fn.ns", invocation())

    run(scenario())


def test_an_invocation_that_nobody_foresaw_ends_only_itself(state_dir):
    async def scenario():
        done = []

        async def call(_, job):
            if job.body == b"bad":
                raise ZeroDivisionError
            done.append(job.body)
            return 200, CIMultiDict(), b""

        async with queue_of(state_dir, call) as queue:
            await queue.put("fn.ns", invocation(b"bad"))
            await queue.put("fn.ns", invocation(b"good"))
            await until(lambda: done == [b"good"])

    run(scenario())


def test_a_callback_that_is_sent_elsewhere_was_not_taken(state_dir, caplog):
    async def scenario():
        async def call(*_):
            return 200, CIMultiDict(), b"out"

        async with callbacks(*[302] * 9, Location="/land") as (got, url), queue_of(state_dir, call) as queue:
            await queue.put("fn.ns", invocation(**{"X-Callback-Url": url}))
            await until(lambda: "a callback was not taken" in caplog.text)
            assert [body for _, body in got] == [b"out"] * 4

    run(scenario())


def test_cookies_of_a_callback_are_forgotten(state_dir):
    async def scenario():
        async def call(*_):
            return 200, CIMultiDict(), b""

        async with callbacks(**{"Set-Cookie": "a=first; Path=/"}) as (got, address), queue_of(state_dir, call) as queue:
            url = address.replace("127.0.0.1", "localhost")  # no cookie is kept for an address
            for function in ("first.ns", "second.ns"):
                await queue.put(function, invocation(**{"X-Callback-Url": url}))
                await until(lambda: not queue._lanes)
            assert [headers.get("Cookie") for headers, _ in got] == [None, None]

    run(scenario())


class FullDisk:
    """Stands before the queue's rows, and refuses while `full`."""

    def __init__(self, queue):
        self.full = False
        self.refused = 0
        self._jobs, queue._jobs = queue._jobs, self

    def __getattr__(self, name):
        return partial(self._do, getattr(self._jobs, name))

    def _do(self, work, *arguments):
        if self.full:
            self.refused += 1
            raise sqlite3.OperationalError("database or disk is full")
        return work(*arguments)


def test_a_full_disk_refuses_what_is_new_and_says_why(state_dir):
    async def scenario():
        async def call(*_):
            return 200, CIMultiDict(), b""

        async with queue_of(state_dir, call) as queue:
            disk = FullDisk(queue)
            disk.full = True
            with pytest.raises(StorageError) as caught:
                await queue.put("fn.ns", invocation())
            disk.full = False
            assert (caught.value.http_status, caught.value.why) == (507, "database or disk is full.")

    run(scenario())


def test_after_a_full_disk_the_lane_goes_on_and_what_is_done_stays_done(state_dir):
    async def scenario():
        go, done = asyncio.Event(), []

        async def call(_, job):
            await go.wait()
            done.append(job.body)
            return 200, CIMultiDict(), b""

        everything = {b"%d" % n for n in range(2 * LANE_WIDTH)}
        async with queue_of(state_dir, call) as queue:
            for body in everything:
                await queue.put("fn.ns", invocation(body))
            disk = FullDisk(queue)
            disk.full = True
            go.set()
            await until(lambda: len(done) == LANE_WIDTH and disk.refused > LANE_WIDTH)
            disk.full = False
            await until(lambda: len(done) == 2 * LANE_WIDTH)
            await queue.put("fn.ns", invocation(b"after"))
            await until(lambda: done[-1] == b"after" and not queue._background._tasks)
        async with queue_of(state_dir, call) as queue:
            await until(lambda: not queue._lanes)
        assert sorted(done) == sorted({*everything, b"after"})

    run(scenario())


def test_what_is_done_when_it_closes_is_crossed_off(state_dir):
    async def scenario():
        done, free = [], threading.Event()

        async def call(_, job):
            done.append(job.body)
            queue._disk.submit(free.wait)  # the disk is busy when it is done
            return 200, CIMultiDict(), b""

        queue = Queue(state_dir / "queue.sqlite", call)
        await queue.put("fn.ns", invocation())
        await until(lambda: done and not queue._lanes)
        closing = asyncio.ensure_future(queue.close())
        await until(lambda: not queue._background._tasks)
        free.set()
        await closing
        async with queue_of(state_dir, call) as queue:
            await until(lambda: not queue._lanes)
        assert done == [b"x"]

    run(scenario())


GUARDED = Callbacks(is_guarded=True)


def why_not_taken(caplog) -> str:
    return " ".join(record.fields["why"] for record in caplog.records if record.message == "a callback was not taken")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "169.254.169.254",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[fe80::1]",
        "0.0.0.0",
        "[::1%1]",
        "127.1",
        "2130706433",
        "[fd00:ec2::254]",
        "[FD20:CE:0::254]",
        "100.100.100.200",
    ],
)
def test_where_it_is_guarded_an_address_of_this_machine_or_its_link_is_refused(state_dir, host):
    async def scenario():
        async with queue_of(state_dir, None, GUARDED) as queue:
            with pytest.raises(ConfigError) as error:
                await queue.put("fn.ns", invocation(**{"X-Callback-Url": f"http://{host}/"}))
            assert error.value.code == "bad-callback"

    run(scenario())


@pytest.mark.parametrize("host", ["localhost", "0x7f000001"])
def test_where_it_is_guarded_a_name_of_this_machine_is_not_called_unless_it_is_allowed(state_dir, host, caplog):
    async def scenario():
        async def call(*_):
            return 200, CIMultiDict(), b""

        async with callbacks() as (got, url):
            named = {"X-Callback-Url": url.replace("127.0.0.1", host)}
            async with queue_of(state_dir, call, GUARDED) as queue:
                await queue.put("fn.ns", invocation(**named))
                await until(lambda: "callbacks may not go there" in why_not_taken(caplog))
                assert got == []
            async with queue_of(state_dir, call, Callbacks(is_guarded=True, hosts=[host])) as queue:
                await queue.put("fn.ns", invocation(**named))
                await until(lambda: got)

    run(scenario())


def test_what_an_earlier_life_took_is_not_called_either(state_dir, caplog):
    async def scenario():
        async def call(*_):
            return 200, CIMultiDict(), b""

        async with callbacks() as (got, url):
            async with queue_of(state_dir, call) as queue:
                queue._advance = lambda _: None
                await queue.put("fn.ns", invocation(**{"X-Callback-Url": url}))
            async with queue_of(state_dir, call, GUARDED):
                await until(lambda: "may not be called" in why_not_taken(caplog))
            assert got == []

    run(scenario())
