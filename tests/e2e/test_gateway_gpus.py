"""Many functions on few GPUs: starts and wakes wait for grants, idle neighbours make room."""

import asyncio
import json
from dataclasses import replace

import pytest

from adapter.hosts import ReplicaState
from adapter.openfaas import gpus
from adapter.policy.grants import Device
from adapter.records import EventName
from tests.fakes.replicas import FakeHost, run, serving, until

pytestmark = pytest.mark.e2e

GPU = Device("GPU-1", "NVIDIA L4", 24 * 2**30)
SECOND = replace(GPU, uuid="GPU-2")


@pytest.fixture(autouse=True)
def _no_second_look(monkeypatch):
    """Nothing here may rest on the look that comes once a second: every change is noticed when it happens."""
    monkeypatch.setattr(gpus, "_AGAIN_S", 3600.0)


def host(state_dir, *gpus, **options):
    return FakeHost(state_dir, gpus=gpus or (GPU,), **options)


def replica_of(up, name):
    return next(r for r in up.host.replicas if r.deployment.name == name)


def code_of(body):
    return json.loads(body)["error"]["code"]


async def held_up(up, name="echo"):
    """A request that runs until the event it returns is set."""
    over, there = asyncio.Event(), asyncio.Event()
    answer = up.host.handler

    async def hold(request):
        there.set()
        await over.wait()
        return await answer(request)

    up.host.handler = hold
    call = asyncio.create_task(up.call(name))
    await there.wait()
    up.host.handler = answer
    return call, over


def test_a_neighbour_that_rests_is_parked_for_a_start_and_woken_later(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            await up.deploy("other", gpu="1")
            assert (await up.call("echo"))[0] == 200
            first = replica_of(up, "echo")
            assert (await up.call("other"))[0] == 200
            assert first.state is ReplicaState.PARKED
            second = replica_of(up, "other")
            status, headers, _ = await up.call("echo")
            assert (status, headers["X-Gpufn-Start"], up.host.started) == (200, "resume", 2)
            assert (first.devices, second.state) == (("GPU-1",), ReplicaState.PARKED)

    run(scenario())


def test_the_wait_is_a_phase_of_the_start(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            await up.deploy("other", gpu="1")
            for name in ("echo", "other", "echo"):
                await up.call(name)
            records = await up.json("/gpufn/v1/starts?function=echo")
            assert [record["rung"] for record in records] == ["resume", "load"]
            assert [record["phases"][0]["name"] for record in records] == ["gpu_wait"] * 2
            assert [phase["name"] for phase in records[0]["phases"]].count("gpu_wait") == 1

    run(scenario())


def test_metrics_say_what_is_held_and_who_waits(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir, GPU, SECOND)) as up:
            await up.deploy("echo", gpu="0.5")
            await up.call("echo")
            async with up.client.get(f"{up.url}/metrics") as response:
                samples = dict(
                    line.rsplit(" ", 1)
                    for line in (await response.text()).splitlines()
                    if line.startswith("gpufn_gpu_")
                )
            assert {name: float(value) for name, value in samples.items()} == {
                'gpufn_gpu_memory_bytes{model="NVIDIA L4",uuid="GPU-1"}': 24 * 2**30,
                'gpufn_gpu_memory_bytes{model="NVIDIA L4",uuid="GPU-2"}': 24 * 2**30,
                'gpufn_gpu_memory_held_bytes{model="NVIDIA L4",uuid="GPU-1"}': 12 * 2**30,
                'gpufn_gpu_memory_held_bytes{model="NVIDIA L4",uuid="GPU-2"}': 0,
                "gpufn_gpu_waiting": 0,
            }

    run(scenario())


def test_functions_without_a_gpu_have_no_such_phase(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo")
            await up.call("echo")
            assert up.host.replicas[0].devices == ()
            (record,) = await up.json("/gpufn/v1/starts")
            assert record["phases"][0]["name"] == "schedule"

    run(scenario())


def test_two_halves_share_a_gpu(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="0.5")
            await up.deploy("other", gpu="1", memory="12Gi")
            await up.call("echo")
            await up.call("other")
            assert [(r.devices, r.parks) for r in up.host.replicas] == [(("GPU-1",), 0)] * 2

    run(scenario())


def test_one_that_may_not_park_is_stopped_for_its_neighbour(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1", park="0")
            await up.deploy("other", gpu="1")
            await up.call("echo")
            assert (await up.call("other"))[0] == 200
            assert [r.deployment.name for r in up.host.replicas] == ["other"]

    run(scenario())


def test_nobody_who_works_makes_room(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            await up.deploy("other", gpu="1")
            call, over = await held_up(up)
            other = asyncio.create_task(up.call("other"))
            await until(lambda: up.gateway.gpus.waiting() == ["other.openfaas-fn"])
            assert (up.host.started, up.host.replicas[0].parks) == (1, 0)
            over.set()
            assert [(await task)[0] for task in (call, other)] == [200, 200]

    run(scenario())


def test_a_gpu_that_is_not_had_in_time_is_a_deadline_that_names_its_holder(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            await up.deploy("other", gpu="1", start_timeout="1s")
            call, over = await held_up(up)
            status, headers, body = await up.call("other")
            assert (status, code_of(body)) == (504, "gpu-wait-timeout")
            assert "gpu_wait" in json.loads(body)["error"]["why"]
            assert replica_of(up, "echo").id in json.loads(body)["error"]["why"]
            assert int(headers["Retry-After"]) >= 1
            await until(lambda: not up.gateway.gpus.waiting())  # nobody wants it any more
            over.set()
            await call

    run(scenario())


def test_a_wait_of_others_that_fails_is_a_503_with_the_reason(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            fleet = await up.deploy("other", gpu="1", start_timeout="1s")
            call, over = await held_up(up)
            early = asyncio.create_task(up.call("other"))
            await until(lambda: fleet.waiting == 1)
            await asyncio.sleep(0.5)
            status, headers, body = await up.call("other")  # younger than what it waits for
            assert (status, code_of(body)) == (503, "gpu-wait")
            assert "Retry-After" in headers
            assert (await early)[0] == 504
            status, _, body = await up.call("other")
            assert (status, code_of(body)) == (503, "gpu-wait")  # at once: it is not tried again yet
            over.set()
            await call

    run(scenario())


def test_when_all_callers_have_left_no_neighbour_makes_room(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            await up.deploy("other", gpu="1")
            call, over = await held_up(up)
            other = asyncio.create_task(up.call("other"))
            await until(lambda: bool(up.gateway.gpus.waiting()))
            other.cancel()
            await until(lambda: not up.gateway.gpus.waiting())
            over.set()
            await call
            assert (up.host.started, up.host.replicas[0].parks) == (1, 0)
            assert (await up.call("other"))[0] == 200  # and the next caller finds all in order

    run(scenario())


def test_a_parked_replica_gets_no_request_before_it_has_a_gpu(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            await up.deploy("other", gpu="1")
            await up.call("other")
            parked = replica_of(up, "other")
            parked.park()
            call, over = await held_up(up)
            waiting = asyncio.create_task(up.call("other"))
            await until(lambda: bool(up.gateway.gpus.waiting()))
            assert parked.requests == 1
            over.set()
            assert [(await task)[0] for task in (call, waiting)] == [200, 200]
            assert (parked.requests, up.host.started) == (2, 2)

    run(scenario())


def test_requests_that_met_a_replica_while_it_parked_wake_it(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir, parks=False)) as up:
            await up.deploy("echo", gpu="1")
            await up.call()
            (replica,) = up.host.replicas
            replica._awake.clear()  # its entrypoint holds what comes from now on
            call = asyncio.create_task(up.call())
            await until(lambda: replica.requests == 2)
            replica.now_parked()
            status, _, body = await call
            assert (status, body) == (200, b"hi")
            assert replica.state is ReplicaState.SERVING

    run(scenario())


def test_a_replica_wakes_on_another_gpu_where_its_own_is_taken(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir, GPU, SECOND)) as up:
            await up.deploy("echo", gpu="1")
            await up.deploy("other", gpu="1")
            await up.call("other")
            other = replica_of(up, "other")
            assert other.devices == ("GPU-1",)
            other.park()
            call, over = await held_up(up)
            assert (await up.call("other"))[1]["X-Gpufn-Start"] == "resume"
            assert other.devices == ("GPU-2",)
            over.set()
            await call

    run(scenario())


def test_a_replica_that_ends_gives_its_gpu_back(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            await up.deploy("other", gpu="1")
            call, _ = await held_up(up)
            other = asyncio.create_task(up.call("other"))
            await until(lambda: bool(up.gateway.gpus.waiting()))
            await replica_of(up, "echo").die()
            assert (await other)[0] == 200
            assert (await call)[0] == 502

    run(scenario())


def test_a_start_that_the_host_refuses_gives_its_gpu_back(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            up.host.errors.append(OSError("no process"))
            assert (await up.call())[0] == 502
            assert up.gateway.gpus.rows()[0]["holders"] == []

    run(scenario())


def test_a_process_that_ends_while_parked_takes_its_replica_with_it(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            await up.call()
            (replica,) = up.host.replicas
            replica.park()
            replica.state = ReplicaState.STARTING
            replica.say(EventName.MODEL_EXITED, reason="killed")
            await until(lambda: not up.host.replicas)
            assert up.gateway.gpus.rows()[0]["parked"] == []

    run(scenario())


def test_a_replica_that_wakes_unasked_is_stopped(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            await up.call()
            (replica,) = up.host.replicas
            replica.park()
            replica.serve("resume")
            await until(lambda: not up.host.replicas)
            assert up.gateway.gpus.rows()[0]["free_bytes"] == GPU.memory_bytes

    run(scenario())


def test_an_update_takes_the_gpu_of_the_revision_before_even_at_its_minimum(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            fleet = await up.deploy("echo", gpu="1", min="1", initial="1")
            await until(lambda: fleet.available == 1)
            body = {
                "service": "echo",
                "image": "echo:2",
                "annotations": {"gpufn.dev/gpu": "1", "gpufn.dev/min": "1", "gpufn.dev/initial": "1"},
            }
            async with up.client.put(f"{up.url}/system/functions", json=body) as response:
                assert response.status == 202
            await until(lambda: [r.deployment.revision for r in up.host.replicas] == ["2"])
            assert fleet.rollout.status == ""
            assert (await up.call())[0] == 200

    run(scenario())


def test_a_minimum_of_another_function_is_left_alone(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            fleet = await up.deploy("echo", gpu="1", min="1")
            await until(lambda: fleet.available == 1)
            await up.deploy("other", gpu="1", start_timeout="1s")
            assert (await up.call("other"))[0] == 504
            assert up.host.replicas[0].parks == 0

    run(scenario())


def test_closing_waits_for_nobody_who_waits_for_a_gpu(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="1")
            await up.deploy("other", gpu="1")
            call, over = await held_up(up)
            other = asyncio.create_task(up.call("other"))
            await until(lambda: bool(up.gateway.gpus.waiting()))
            over.set()
            closing = asyncio.create_task(up.gateway.fleet("other.openfaas-fn").close())
            await closing
            assert code_of((await other)[2]) == "draining"
            await call

    run(scenario())


def test_leases_name_the_gpu_and_what_was_parked_holds_none(state_dir):
    async def scenario():
        async with serving(state_dir, host(state_dir)) as up:
            await up.deploy("echo", gpu="0.5")
            await up.call()
            (replica,) = up.host.replicas
            replica.park()
            await up.call()
            await replica.stop(1)
            await up.json("/gpufn/v1/starts")  # what was reported can be read
            intervals = up.ledger.intervals(0, 2**62)
            assert {(i.device, i.gpu_model, i.share) for i in intervals} == {("GPU-1", "NVIDIA L4", 0.5)}
            phases = [i.phase.value for i in intervals if i.phase.value in ("restoring", "parked", "draining")]
            assert phases[:3] == ["restoring", "parked", "restoring"]

    run(scenario())
