"""The gateway over real sockets and replicas that behave as each test says."""

import asyncio
import json
import resource
from functools import partial

import aiohttp
import pytest
from aiohttp import web

from adapter.errors import ConfigError, HandlerError, NotFound, Unavailable
from adapter.hosts import ReplicaState
from adapter.policy.keep_alive import Basis
from adapter.records import EventName
from tests.fakes.replicas import FakeHost, echo, run, serving, until

pytestmark = pytest.mark.e2e


def test_500_requests_at_zero_are_one_start_and_none_is_lost(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False, rung="restore")) as up:
            fleet = await up.deploy()
            calls = [asyncio.create_task(up.call(body=str(n).encode())) for n in range(500)]
            await until(lambda: fleet.waiting == 500 - fleet.deployment.spec.in_flight)
            (replica,) = up.host.replicas
            replica.serve("restore")
            answers = await asyncio.gather(*calls)
            assert [(status, body) for status, _, body in answers] == [(200, str(n).encode()) for n in range(500)]
            assert up.host.started == 1
            assert replica.requests == 500
            rungs = [headers.get("X-Gpufn-Start") for _, headers, _ in answers]
            assert rungs.count("restore") == fleet.deployment.spec.in_flight  # the others found it up

    run(scenario())


def test_a_request_reaches_the_replica_before_it_serves(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            await up.deploy()
            call = asyncio.create_task(up.call())
            replica = await up.host.new_replica()
            await until(lambda: replica.requests == 1)
            assert replica.state is ReplicaState.STARTING
            replica.serve("restore")
            status, headers, _ = await call
            assert (status, headers["X-Gpufn-Start"]) == (200, "restore")
            assert "X-Gpufn-Start" not in (await up.call())[1]

    run(scenario())


def test_a_parked_replica_is_woken_by_the_request_itself(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy(park="50ms")
            await up.call()
            (replica,) = up.host.replicas
            await until(lambda: replica.state is ReplicaState.PARKED)
            status, headers, _ = await up.call()
            assert (status, headers["X-Gpufn-Start"], up.host.started) == (200, "resume", 1)
            assert len(await up.json("/gpufn/v1/starts?function=echo")) == 2

    run(scenario())


def test_idle_functions_go_to_zero_and_come_back(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy(idle="50ms")
            assert (await up.call())[0] == 200
            await until(lambda: not up.host.replicas)
            assert (await up.call())[0] == 200
            assert up.host.started == 2

    run(scenario())


def test_how_long_it_is_kept_is_learned_from_its_own_callers(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            fleet = await up.deploy(idle="auto", park="0", cold_price="10000")
            before = fleet.keep_alive
            now_s = fleet.clock()
            fleet.clock = lambda: now_s
            await up.call()
            await until(lambda: fleet.keep_alive.basis is Basis.PRIOR)
            for _ in range(12):
                now_s += 20.0
                await up.call()
            assert (before.basis, fleet.keep_alive.basis) == (Basis.ASSUMED, Basis.LEARNED)
            (said,) = await up.json("/gpufn/v1/keep-alives")
            assert said == {"function": "echo.openfaas-fn", **fleet.keep_alive.to_json()}

    run(scenario())


def test_a_caller_that_leaves_the_queue_leaves_its_place(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            fleet = await up.deploy(in_flight="1")
            first = asyncio.create_task(up.call(body=b"1"))
            await until(lambda: up.host.replicas and up.host.replicas[0].requests == 1)
            second = asyncio.create_task(up.call(body=b"2"))
            await until(lambda: fleet.waiting == 1)
            second.cancel()
            await until(lambda: fleet.waiting == 0)
            third = asyncio.create_task(up.call(body=b"3"))
            await until(lambda: fleet.waiting == 1)
            up.host.replicas[0].serve()
            assert [(await call)[2] for call in (first, third)] == [b"1", b"3"]
            assert up.host.replicas[0].requests == 2

    run(scenario())


def test_a_caller_that_goes_away_ends_its_request_at_the_replica(state_dir):
    async def scenario():
        ended = asyncio.Event()

        async def endless(request):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.set()
                raise

        async with serving(state_dir, FakeHost(state_dir, handler=endless)) as up:
            fleet = await up.deploy()
            call = asyncio.create_task(up.call())
            await until(lambda: up.host.replicas and up.host.replicas[0].requests == 1)
            call.cancel()
            await asyncio.wait_for(ended.wait(), 10)
            await until(lambda: not any(m.in_flight for m in fleet.members.values()))

    run(scenario())


def test_more_waiting_requests_than_allowed_are_refused(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            fleet = await up.deploy(in_flight="1", queue="2")
            calls = [asyncio.create_task(up.call()) for _ in range(3)]
            await until(lambda: fleet.waiting == 2)
            status, headers, body = await up.call()
            assert (status, headers["Retry-After"]) == (503, "1")
            assert json.loads(body)["error"]["code"] == "queue-full"
            up.host.replicas[0].serve()
            assert [(await call)[0] for call in calls] == [200] * 3

    run(scenario())


def test_a_deadline_names_the_phase(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            fleet = await up.deploy(in_flight="1", start_timeout="1s")
            holder = asyncio.create_task(up.call())
            await until(lambda: bool(up.host.replicas))
            status, headers, body = await up.call(headers={"X-Call-Id": "mine"})
            assert (status, headers["X-Call-Id"]) == (504, "mine")
            assert json.loads(body)["error"]["code"] == "start-timeout"
            holder.cancel()

            up.host.replicas[0].serve()
            fleet.host.handler = lambda _: asyncio.Event().wait()
            holder = asyncio.create_task(up.call())
            await until(lambda: up.host.replicas[0].requests == 2)
            assert json.loads((await up.call())[2])["error"]["code"] == "queue-timeout"
            holder.cancel()

    run(scenario())


def test_a_failed_start_tells_everybody_and_backs_off(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            fleet = await up.deploy(in_flight="1")
            now = 1000.0
            fleet.clock = lambda: now
            calls = [asyncio.create_task(up.call()) for _ in range(3)]
            await until(lambda: fleet.waiting == 2)
            up.host.replicas[0].fail()
            for status, headers, body in [await call for call in calls[1:]]:
                assert (status, headers["Retry-After"]) == (503, "1")
                assert json.loads(body)["error"]["why"] == "ValueError: no weights"
            await until(lambda: not up.host.replicas)
            assert (await calls[0])[0] == 503  # from its entrypoint

            assert (await up.call())[0] == 503
            assert up.host.started == 1  # not during the back-off
            now += 1.5
            again = asyncio.create_task(up.call())
            replica = await up.host.new_replica(2)
            replica.fail()
            await until(lambda: not up.host.replicas)
            await again
            status, headers, _ = await up.call()
            assert (status, headers["Retry-After"]) == (503, "2")  # longer

            now += 2.5
            again = asyncio.create_task(up.call())
            replica = await up.host.new_replica(3)
            replica.serve()
            assert (await again)[0] == 200

    run(scenario())


def test_a_replica_that_hung_while_it_started_is_reported_and_replaced(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            fleet = await up.deploy()
            now = 1000.0
            fleet.clock = lambda: now
            call = asyncio.create_task(up.call())
            replica = await up.host.new_replica()
            await until(lambda: replica.requests)
            await replica.die("did not come up within 340 s and was killed", code="start-timeout")
            status, headers, body = await call
            error = json.loads(body)["error"]
            assert (status, headers["Retry-After"], error["code"]) == (503, "1", "start-timeout")
            assert error["why"] == "Its replica did not come up within 340 s and was killed while it started."
            assert "did not come up" in (await up.json("/system/function/echo"))["annotations"]["gpufn.dev/status"]
            now += 1.5
            up.host.serves = True
            assert (await up.call())[0] == 200
            assert fleet.status == ""

    run(scenario())


def test_a_replica_that_does_not_answer_is_replaced(state_dir, monkeypatch):
    async def scenario():
        async def endless(_):
            await asyncio.Event().wait()

        monkeypatch.setattr("adapter.openfaas.proxy._REPLICA_SLACK_S", 0.0)
        async with serving(state_dir, FakeHost(state_dir, handler=endless)) as up:
            fleet = await up.deploy(initial="1", exec_timeout="100ms")
            await until(lambda: fleet.available == 1)
            (hung,) = up.host.replicas
            assert (await up.call())[0] == 504
            assert hung.stop_asked.is_set()
            up.host.handler = echo
            assert (await up.call())[0] == 200
            assert up.host.started == 2

    run(scenario())


def test_a_secret_that_is_gone_is_the_operators_affair(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            fleet = await up.deploy()
            up.host.errors.append(NotFound("It needs the secret 'db'.", why="There is none.", code="secret-missing"))
            status, _, body = await up.call()
            error = json.loads(body)["error"]
            assert (status, error["code"]) == (503, "secret-missing")
            assert error["message"] == "echo.openfaas-fn cannot be started."
            assert b"'db'" not in body
            assert fleet.status == "failed: It needs the secret 'db'. There is none."

    run(scenario())


def test_without_a_queue_a_function_at_zero_still_wakes(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            fleet = await up.deploy(queue="0", in_flight="2")
            up.host.may_start.clear()
            calls = [asyncio.create_task(up.call()) for _ in range(2)]
            await until(lambda: fleet.waiting == 2)  # for the replica that is being started
            assert json.loads((await up.call())[2])["error"]["code"] == "queue-full"
            up.host.may_start.set()
            replica = await up.host.new_replica()
            await until(lambda: replica.requests == 2)
            assert json.loads((await up.call())[2])["error"]["code"] == "queue-full"
            replica.serve()
            assert [(await call)[0] for call in calls] == [200] * 2

    run(scenario())


def test_a_host_that_cannot_start_is_reported(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy()
            up.host.errors.append(Unavailable("No process can be started.", why="EAGAIN.", code="no-room"))
            status, headers, body = await up.call()
            assert (status, json.loads(body)["error"]["code"]) == (502, "no-room")
            assert "Retry-After" in headers

    run(scenario())


def test_requests_held_by_a_replica_that_dies_go_to_another(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            await up.deploy()
            calls = [asyncio.create_task(up.call(body=str(n).encode())) for n in range(5)]
            first = await up.host.new_replica()
            await until(lambda: first.requests == 5)
            await first.die()
            second = await up.host.new_replica(2)
            second.serve()
            assert [(await call)[2] for call in calls] == [b"0", b"1", b"2", b"3", b"4"]

    run(scenario())


def test_requests_that_a_handler_may_have_seen_are_not_sent_again(state_dir):
    async def scenario():
        async def endless(_):
            await asyncio.Event().wait()

        async with serving(state_dir, FakeHost(state_dir, handler=endless)) as up:
            fleet = await up.deploy(in_flight="2")
            sent = [asyncio.create_task(up.call()) for _ in range(2)]
            await until(lambda: up.host.replicas and up.host.replicas[0].requests == 2)
            waiting = asyncio.create_task(up.call(body=b"waits"))
            await until(lambda: fleet.waiting == 1)
            first = up.host.replicas[0]

            async def answer(_):
                return web.Response(text="fine")

            up.host.handler = answer
            await first.die()
            assert [(await call)[0] for call in sent] == [502, 502]
            assert (await waiting)[::2] == (200, b"fine")
            assert up.host.replicas[0].requests == 1

    run(scenario())


def test_a_connection_that_was_closed_while_idle_is_not_an_error(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy()
            await up.call()
            (replica,) = up.host.replicas
            for connection in list(replica._runner.server.connections):
                connection.transport.abort()
            assert (await up.call())[0] == 200
            assert up.host.started == 1

    run(scenario())


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(("start", "told_after_s"), [("cold", 0), ("warm", 0), ("warm", 0.01)])
def test_a_handler_that_crashes_runs_once(state_dir, method, start, told_after_s):
    async def scenario():
        async with serving(state_dir) as up:
            runs = []

            async def crash(request):
                (replica,) = up.host.replicas
                runs.append(await request.read())
                tell = partial(replica.say, EventName.MODEL_EXITED, reason="exit 1", in_flight=1)
                asyncio.get_running_loop().call_later(told_after_s, tell)
                request.transport.abort()
                return web.Response()

            await up.deploy()
            if start == "warm":
                await up.call()
            up.host.handler = crash
            async with up.client.request(method, f"{up.url}/function/echo", data=b"poison") as answer:
                status, body = answer.status, await answer.read()
            assert status == 502
            assert method == "HEAD" or json.loads(body)["error"]["code"] == "replica-died"
            assert runs == [b"poison"]

    run(scenario())


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 100_000 + b"\r\nContent-Length: 0\r\n\r\n",
        b"no HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Begun: ",
    ],
    ids=["a header too long", "no HTTP", "two lengths", "half a head"],
)
def test_a_handler_whose_answer_cannot_be_read_runs_once(state_dir, method, answer):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy()
            await up.call()
            runs = []

            async def garble(request):
                runs.append(await request.read())
                request.transport.write(answer)
                request.transport.close()
                return web.Response()

            up.host.handler = garble
            async with up.client.request(method, f"{up.url}/function/echo", data=b"once") as response:
                error = (await response.json())["error"]
                assert "aaa" not in error["why"]
                assert (response.status, error["code"]) == (
                    502,
                    "replica-died" if b"Begun" in answer else "answer-unreadable",
                )
            assert runs == [b"once"]

    run(scenario())


def test_an_answer_may_have_long_headers(state_dir):
    async def scenario():
        async def tell(_):
            return web.Response(headers={"X-Long": "a" * 20_000})

        async with serving(state_dir, FakeHost(state_dir, handler=tell)) as up:
            await up.deploy()
            async with up.client.post(f"{up.url}/function/echo", max_field_size=2**16) as response:
                assert (response.status, len(response.headers["X-Long"])) == (200, 20_000)

    run(scenario())


def test_a_replica_that_cannot_be_reached_is_replaced(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy()
            await up.call()
            (replica,) = up.host.replicas
            for connection in list(replica._runner.server.connections):
                connection.transport.abort()
            await replica._site.stop()
            replica._socket.close()
            assert (await up.call())[0] == 200
            assert up.host.started == 2

    run(scenario())


def test_an_update_under_load_loses_nothing(state_dir):
    async def scenario():
        async def answer(request):
            await asyncio.sleep(0.005)
            return web.Response(text="fine")

        async with serving(state_dir, FakeHost(state_dir, handler=answer, serves=False)) as up:
            fleet = await up.deploy()
            done, over = [], asyncio.Event()

            async def caller():
                while not over.is_set():
                    done.append((await up.call())[0])

            callers = [asyncio.create_task(caller()) for _ in range(8)]
            old = await up.host.new_replica()
            old.serve()
            await until(lambda: len(done) > 20)

            up.host.may_prepare.clear()
            async with up.client.put(
                f"{up.url}/system/functions",
                json={"service": "echo", "image": "echo:2", "annotations": {"gpufn.dev/initial": "1"}},
            ) as response:
                assert response.status == 202
            count = len(done)
            await until(lambda: len(done) > count + 20)  # the old one serves while the new one is prepared
            assert fleet.rollout.status.startswith("preparing: revision 2")

            up.host.may_prepare.set()
            new = await up.host.new_replica(2)
            count = len(done)
            await until(lambda: len(done) > count + 20)  # and while its replica starts
            assert new.requests == 0

            new.serve()
            await until(lambda: new.requests > 20)
            await until(lambda: up.host.replicas == [new])  # the old one drained and went
            over.set()
            await asyncio.gather(*callers)
            assert set(done) == {200}
            assert (fleet.rollout.status, fleet.deployment.revision) == ("", "2")

    run(scenario())


def test_an_update_that_does_not_come_up_leaves_the_old_revision(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            fleet = await up.deploy()
            await up.call()
            up.host.serves = False
            await up.deploy(method="PUT", initial="1")
            new = await up.host.new_replica(2)
            new.fail("ImportError: no module")
            await until(lambda: new not in up.host.replicas)
            assert (await up.call())[0] == 200
            assert "ImportError" in fleet.rollout.status
            shown = await up.json("/system/function/echo")
            assert "ImportError" in shown["annotations"]["gpufn.dev/status"]

    run(scenario())


def test_an_environment_that_cannot_be_built_is_told_to_callers(state_dir):
    async def scenario():
        host = FakeHost(state_dir, problem=HandlerError("No such package.", why="torhc is unknown.", code="env-failed"))
        async with serving(state_dir, host) as up:
            await up.deploy()
            status, _, body = await up.call()
            assert (status, json.loads(body)["error"]["code"]) == (503, "env-failed")
            assert "torhc" in (await up.json("/system/function/echo"))["annotations"]["gpufn.dev/status"]
            up.host.problem = None
            await up.deploy(method="PUT")
            assert (await up.call())[0] == 200

    run(scenario())


def test_a_caller_is_not_blamed_for_a_function_that_cannot_run(state_dir):
    async def scenario():
        problem = ConfigError("The variable 'A=B' cannot be used.", why="It holds =.", code="bad-variable")
        async with serving(state_dir, FakeHost(state_dir, problem=problem)) as up:
            await up.deploy()
            status, _, body = await up.call()
            assert (status, json.loads(body)["error"]["code"]) == (503, "bad-variable")

    run(scenario())


@pytest.mark.parametrize("problem", [OSError(28, "No space left"), RecursionError("too deep"), ZeroDivisionError()])
def test_a_preparation_that_fails_unforeseen_is_over(state_dir, problem):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, problem=problem)) as up:
            fleet = await up.deploy()
            assert (await up.call())[0] == 503
            assert type(problem).__name__ in fleet.status

    run(scenario())


def test_requests_wait_for_a_function_that_is_being_prepared(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            up.host.may_prepare.clear()
            body = {"service": "echo", "image": "echo:1"}
            async with up.client.post(f"{up.url}/system/functions", json=body) as response:
                assert response.status == 202
            call = asyncio.create_task(up.call())
            await until(lambda: up.gateway.fleet("echo.openfaas-fn").waiting == 1)
            up.host.may_prepare.set()
            assert (await call)[0] == 200

    run(scenario())


def test_a_removed_function_finishes_what_it_has(state_dir):
    async def scenario():
        go = asyncio.Event()

        async def slow(_):
            await go.wait()
            return web.Response(text="fine")

        async with serving(state_dir, FakeHost(state_dir, handler=slow)) as up:
            fleet = await up.deploy(in_flight="1")
            call = asyncio.create_task(up.call())
            await until(lambda: up.host.replicas and up.host.replicas[0].requests == 1)
            waiting = asyncio.create_task(up.call())
            await until(lambda: fleet.waiting == 1)
            async with up.client.delete(f"{up.url}/system/functions", json={"functionName": "echo"}) as response:
                assert response.status == 202
            assert (await waiting)[0] == 404
            assert (await up.call())[0] == 404
            go.set()
            assert (await call)[0] == 200
            await until(lambda: bool(up.host.removed))

    run(scenario())


def test_a_replica_is_not_stopped_while_its_snapshot_is_taken(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            fleet = await up.deploy(idle="20ms", park="0")
            await up.call()
            (replica,) = up.host.replicas
            replica.snapshot("building")
            idle_since = next(iter(fleet.members.values())).idle_since_s
            fleet.clock = lambda: idle_since + 60
            fleet.evaluate()
            assert not replica.stop_asked.is_set()
            replica.snapshot("published")
            await until(replica.stop_asked.is_set)
            assert (await up.json("/gpufn/v1/snapshots"))[0]["state"] == "published"

    run(scenario())


@pytest.mark.parametrize("busy", [False, True])
def test_scaling(state_dir, busy):
    async def scenario():
        go = asyncio.Event()

        async def slow(_):
            await go.wait()
            return web.Response(text="fine")

        async with serving(state_dir, FakeHost(state_dir, handler=slow)) as up:
            fleet = await up.deploy(max="4")

            async def scale(count):
                async with up.client.post(f"{up.url}/system/scale-function/echo", json={"replicas": count}) as response:
                    assert response.status == 202

            await scale(3)
            await until(lambda: fleet.available == 3)
            await scale(9)
            await until(lambda: fleet.available == 4)
            call = asyncio.create_task(up.call()) if busy else None
            await until(lambda: not busy or any(r.requests for r in up.host.replicas))
            await scale(0)
            await until(lambda: len(up.host.replicas) == busy)
            go.set()
            if call is not None:
                assert (await call)[0] == 200
            await until(lambda: not up.host.replicas)
            assert (await up.json("/system/function/echo"))["replicas"] == 0

    run(scenario())


# The way through ----------------------------------------------------------------------------------


def test_answers_are_streamed_as_they_come(state_dir):
    async def scenario():
        steps = [asyncio.Event() for _ in range(3)]

        async def events(request):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for number, step in enumerate(steps):
                await response.write(f"data: {number}\n\n".encode())
                await step.wait()
            return response

        async with serving(state_dir, FakeHost(state_dir, handler=events)) as up:
            await up.deploy()
            async with up.client.get(f"{up.url}/function/echo") as response:
                assert response.headers["Content-Type"] == "text/event-stream"
                for number, step in enumerate(steps):  # the next one is not made before this one is here
                    assert await response.content.readuntil(b"\n\n") == f"data: {number}\n\n".encode()
                    step.set()
                assert await response.read() == b""

    run(scenario())


def test_bodies_are_streamed_as_they_come(state_dir):
    async def scenario():
        half = asyncio.Event()

        async def counting(request):
            size = 0
            async for chunk in request.content.iter_any():
                size += len(chunk)
                if size >= 600_000:
                    half.set()
            return web.Response(text=str(size))

        async def body():
            yield b"x" * 600_000
            await asyncio.wait_for(half.wait(), 10)  # the replica has it before the rest is sent
            yield b"x" * 400_000

        async with serving(state_dir, FakeHost(state_dir, handler=counting)) as up:
            await up.deploy()
            assert (await up.call(body=body()))[2] == b"1000000"
            assert (await up.call(body=b"x" * 900_000))[2] == b"900000"

    run(scenario())


def test_bodies_above_the_limit_are_refused(state_dir):
    async def scenario():
        async def chunks(size):
            for _ in range(size // 10_000):
                yield b"x" * 10_000

        async with serving(state_dir) as up:
            await up.deploy(body="1000000")
            assert (await up.call(body=b"x" * 1_000_000))[0] == 200
            for body in (b"x" * 1_000_001, chunks(1_100_000)):
                status, _, answer = await up.call(body=body)
                assert (status, json.loads(answer)["error"]["code"]) == (413, "body-too-large")
            await up.deploy("other", body="100")
            assert (await up.call("other", body=chunks(20_000)))[0] == 413
            assert up.host.started == 1  # nothing is woken for them

    run(scenario())


def test_an_answer_that_breaks_off_breaks_off(state_dir):
    async def scenario():
        async def half(request):
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"half")
            request.transport.abort()
            return response

        async with serving(state_dir, FakeHost(state_dir, handler=half)) as up:
            await up.deploy()
            with pytest.raises(aiohttp.ClientError):
                await up.call()

    run(scenario())


def test_headers_and_paths_travel(state_dir):
    async def scenario():
        seen = {}

        async def keep(request):
            seen.update(headers=request.headers.copy(), path=request.raw_path, method=request.method)
            response = web.Response(status=207, headers={"X-Own": "1", "Keep-Alive": "timeout=1"})
            response.headers.add("Set-Cookie", "a=1")
            response.headers.add("Set-Cookie", "b=2")
            return response

        async with serving(state_dir, FakeHost(state_dir, handler=keep)) as up:
            await up.deploy()
            url = aiohttp.client.URL(f"{up.url}/function/echo.openfaas-fn/a%2Fb/c%20d?q=%2F&e", encoded=True)
            own = {
                "X-Call-Id": "abc",
                "Connection": "X-Drop",
                "X-Drop": "1",
                "X-Forwarded-For": "10.0.0.1",
                "Accept": "x/y",
            }
            async with up.client.patch(url, headers=own, data=b"{}") as response:
                assert (response.status, response.headers["X-Own"], response.headers["X-Call-Id"]) == (207, "1", "abc")
                assert response.headers.getall("Set-Cookie") == ["a=1", "b=2"]
                assert float(response.headers["X-Duration-Seconds"]) > 0
                assert "Keep-Alive" not in response.headers
            assert (seen["method"], seen["path"]) == ("PATCH", "/a%2Fb/c%20d?q=%2F&e")
            headers = seen["headers"]
            assert headers["X-Call-Id"] == "abc"
            assert headers["X-Forwarded-For"] == "10.0.0.1"
            assert headers["X-Forwarded-Host"] == up.url.removeprefix("http://")
            assert headers["Accept"] == "x/y"
            assert int(headers["X-Start-Time"]) > 0
            assert "X-Drop" not in headers
            async with up.client.head(f"{up.url}/function/echo") as response:
                assert response.status == 207
            async with up.client.request("PROPFIND", f"{up.url}/function/echo") as response:
                assert response.status == 405

    run(scenario())


def test_a_handler_past_its_time_is_answered_for(state_dir, monkeypatch):
    async def scenario():
        async def endless(_):
            await asyncio.Event().wait()

        monkeypatch.setattr("adapter.openfaas.proxy._REPLICA_SLACK_S", 0.0)
        async with serving(state_dir, FakeHost(state_dir, handler=endless)) as up:
            await up.deploy(initial="1", exec_timeout="100ms")
            await until(lambda: up.gateway.fleet("echo.openfaas-fn").available == 1)
            status, _, body = await up.call()
            assert (status, json.loads(body)["error"]["code"]) == (504, "exec-timeout")

    run(scenario())


async def raw(up, request: bytes, *, whole: bool = False) -> bytes:
    """What comes back for bytes as they are; the first of it, or all until the connection ends."""
    host, _, port = up.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        return await reader.read() if whole else await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


@pytest.mark.parametrize("size", [10, 600_000], ids=["kept", "streamed"])
def test_a_body_that_stops_coming_gives_its_slot_back(state_dir, monkeypatch, size):
    monkeypatch.setattr("adapter.openfaas.invocation.STALL_LIMIT_S", 0.1)

    async def scenario():
        async with serving(state_dir) as up:
            fleet = await up.deploy()
            await up.call()
            head = b"POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
            answer = await raw(up, head + b"x" * (size // 2))
            assert answer.startswith(b"HTTP/1.1 408 ")
            await until(lambda: not any(m.in_flight for m in fleet.members.values()))
            assert (await up.call())[0] == 200

    run(scenario())


def test_header_bytes_that_are_no_utf8_are_not_lost(state_dir):
    async def scenario():
        seen = []

        async def tell(request):
            seen.append(request.headers["X-Name"])
            request.transport.write(b"HTTP/1.1 200 OK\r\nX-Name: caf\xe9\r\nContent-Length: 0\r\n\r\n")
            return web.Response()

        async with serving(state_dir, FakeHost(state_dir, handler=tell)) as up:
            await up.deploy()
            for sent in (b"caf\xe9", "café".encode()):
                request = b"GET /function/echo HTTP/1.1\r\nHost: x\r\nX-Name: " + sent + b"\r\n\r\n"
                assert "X-Name: café\r\n".encode() in await raw(up, request)
            assert seen == ["café"] * 2
            request = b"GET /function/echo HTTP/1.1\r\nHost: x\r\nX-Name: x\r\nX-Call-Id: \xe9\r\n\r\n"
            assert "X-Call-Id: é\r\n".encode() in await raw(up, request)

    run(scenario())


def test_a_target_in_absolute_form_means_the_same(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy()
            for path in (b"/a%2Fb?q=1", b"/?q=1", b"?q=1"):
                request = b"GET http://elsewhere/function/echo" + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"
                seen = path if path.startswith(b"/") else b"/" + path
                assert b"X-Path: " + seen + b"\r\n" in await raw(up, request)

    run(scenario())


@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["first", "later"])
def test_a_request_that_stops_in_its_head_ends(state_dir, monkeypatch, before):
    monkeypatch.setattr("adapter.openfaas.server._KEEPALIVE_S", 0.1)

    async def scenario():
        async with serving(state_dir) as up:
            answer = await raw(up, before + b"GET /healthz HTTP/1.1\r\nHo", whole=True)
            assert answer.count(b"200 OK") == len(before[:1])

    run(scenario())


def test_connections_that_say_nothing_keep_nobody_out(state_dir, monkeypatch):
    monkeypatch.setattr("adapter.openfaas.door._RATIO", 6 / resource.getrlimit(resource.RLIMIT_NOFILE)[0])

    async def scenario():
        go = asyncio.Event()

        async def slow(_):
            await go.wait()
            return web.Response(text="fine")

        async with serving(state_dir, FakeHost(state_dir, handler=slow)) as up:
            await up.deploy()
            call = asyncio.create_task(up.call())
            await until(lambda: up.host.replicas and up.host.replicas[0].requests == 1)
            host, _, port = up.url.removeprefix("http://").partition(":")
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
            assert (await raw(up, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            assert await silent[0][0].read() == b""  # the oldest is gone
            go.set()
            assert (await call)[0] == 200  # the older one, which had a request, is not
            for _, writer in silent:
                writer.close()

    run(scenario())


# Its life -----------------------------------------------------------------------------------------


def test_a_drain_answers_what_runs_and_refuses_the_rest(state_dir):
    async def scenario():
        go = asyncio.Event()

        async def slow(_):
            await go.wait()
            return web.Response(text="fine")

        async with serving(state_dir, FakeHost(state_dir, handler=slow)) as up:
            fleet = await up.deploy(in_flight="1")
            running = asyncio.create_task(up.call())
            await until(lambda: up.host.replicas and up.host.replicas[0].requests == 1)
            waiting = asyncio.create_task(up.call())
            await until(lambda: fleet.waiting == 1)
            up.stop.set()
            status, headers, _ = await waiting
            assert (status, headers["Retry-After"]) == (503, "1")
            go.set()
            assert (await running)[::2] == (200, b"fine")

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/system/functions", b'{"service": "late", "image": "echo"}'),
        ("PUT", "/system/functions", b'{"service": "echo", "image": "echo"}'),
        ("DELETE", "/system/functions", b'{"functionName": "echo"}'),
        ("POST", "/async-function/echo", b"x"),
        ("POST", "/function/echo", b"x"),
    ],
)
def test_a_kept_connection_is_told_of_the_drain(state_dir, method, path, body):
    async def scenario():
        go = asyncio.Event()

        async def slow(_):
            await go.wait()
            return web.Response(text="fine")

        async with serving(state_dir, FakeHost(state_dir, handler=slow)) as up:
            await up.deploy()
            running = asyncio.create_task(up.call())
            await until(lambda: up.host.replicas and up.host.replicas[0].requests == 1)
            async with up.client.get(f"{up.url}/healthz") as response:
                await response.read()
            up.stop.set()
            await until(up.host.replicas[0].stop_asked.is_set)
            async with up.client.request(method, up.url + path, data=body) as response:
                assert response.status == 503
            go.set()
            assert (await running)[0] == 200
        assert not (state_dir / "functions" / "late.openfaas-fn.json").exists()

    run(scenario())


def test_a_restart_takes_up_what_was_deployed(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy(min="1")
            await up.deploy("other")
            assert (await up.call())[0] == 200
        async with serving(state_dir, FakeHost(state_dir, functions=("echo",))) as up:
            await until(lambda: up.host.started == 1)  # the minimum
            assert (await up.call())[0] == 200
            status, _, body = await up.call("other")  # its folder is gone
            assert (status, json.loads(body)["error"]["code"]) == (503, "not-found")
            found = {f["name"]: f["annotations"] for f in await up.json("/system/functions")}
            assert "failed: No function folder" in found["other"]["gpufn.dev/status"]

    run(scenario())


def test_starts_and_leases_are_in_the_ledger(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy()
            for _ in range(20):
                await up.call()
            ledger = up.ledger
            starts = await up.json("/gpufn/v1/starts?function=echo&limit=5")
            assert [start["phases"][0]["name"] for start in starts] == ["schedule"]
            (row,) = await up.json("/gpufn/v1/replicas")
            assert (row["state"], row["rung"]) == ("serving", "load")
        phases = [interval.phase.value for interval in ledger.intervals(0, 2**62)]
        assert sorted(phases) == ["draining", "idle", "restoring", "running"]  # one a phase, not one a request

    run(scenario())


def test_metrics(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy()
            await up.call()
            async with up.client.get(f"{up.url}/metrics") as response:
                lines = (await response.text()).splitlines()
            name = 'function_name="echo.openfaas-fn"'
            for line in (
                f'gateway_function_invocation_total{{code="200",{name}}} 1.0',
                f"gateway_function_invocation_started{{{name}}} 1.0",
                f'gateway_functions_seconds_count{{code="200",{name}}} 1.0',
                f"gateway_service_count{{{name}}} 1.0",
                'gpufn_cold_starts_total{function="echo.openfaas-fn",mode="load"} 1.0',
                'gpufn_replicas{function="echo.openfaas-fn",state="serving"} 1.0',
            ):
                assert line in lines

    run(scenario())
