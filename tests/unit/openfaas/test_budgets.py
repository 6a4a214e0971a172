"""Functions whose budget is spent wake no more, and what runs of them goes on."""

import asyncio
import json
import logging
import time
from contextlib import asynccontextmanager

import pytest

from adapter.errors import LedgerError, Overloaded
from adapter.hosts import ReplicaState
from adapter.ledger import held
from adapter.openfaas import budgets
from adapter.policy.budget import Budget, utc_day
from adapter.policy.grants import Device
from adapter.records import LeaseInterval, LeasePhase
from tests.fakes.replicas import FakeHost, run, serving, until

GPU = Device("GPU-1", "NVIDIA L4", 24 * 2**30)
SECOND = 10**9


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    """Every look asks, and none comes by itself."""
    for name in ("LOOK_S", "_RESTS"):
        monkeypatch.setattr(held, name, 0)
    monkeypatch.setattr(budgets, "LOOK_S", 3600.0)


@asynccontextmanager
async def running(state_dir, **options):
    async with serving(state_dir, FakeHost(state_dir, gpus=(GPU,), **options)) as up:
        yield up


async def hold(up, gpu_s, name="echo"):
    """So many GPU-seconds more were held today, and are known."""
    start_ns, _ = utc_day(time.time_ns())
    up.ledger.add_intervals([LeaseInterval(
        id=f"{name}:{gpu_s}", function=name, namespace="openfaas-fn", revision="1", replica=name, tenant="default",
        price_class="standard", device="GPU-9", share=float(gpu_s), phase=LeasePhase.RUNNING, started_at_ns=start_ns,
        ended_at_ns=start_ns + SECOND,
    )])  # fmt: skip
    await up.gateway.budgets.look()


async def describe(up, name="echo"):
    status = await up.json(f"/system/function/{name}")
    return status["annotations"].get("gpufn.dev/status", "")


def error_of(answer):
    status, headers, body = answer
    return status, json.loads(body)["error"]["code"], headers.get("Retry-After")


def test_at_zero_a_request_is_refused_until_the_day_is_over(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            await up.deploy(gpu="1", budget="1000")
            await hold(up, 1000)
            status, code, after_s = error_of(await up.call())
            left_s = (utc_day(time.time_ns())[1] - time.time_ns()) / 1e9
            assert (status, code) == (429, "budget-spent")
            assert abs(int(after_s) - left_s) < 30
            assert up.host.started == 0
            assert (await describe(up)).startswith(
                "waiting: The budget of echo.openfaas-fn is spent. It held 1,000.0 of"
            )

    run(scenario())


def test_who_is_refused_teaches_nothing_about_traffic(state_dir, monkeypatch):
    monkeypatch.setattr("adapter.policy.keep_alive.LEAST_S", 0.0)

    async def scenario():
        async with running(state_dir) as up:
            fleet = await up.deploy(gpu="1", budget="1000")
            await up.call()
            await up.host.replicas[0].die()
            await hold(up, 1000)
            for _ in range(3):
                assert (await up.call())[0] == 429
            assert fleet._history.habits(fleet.clock()).gaps == ()

    run(scenario())


def test_what_runs_goes_on_and_answers(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            await up.deploy(gpu="1", budget="1000", park="0", idle="0")
            assert (await up.call())[0] == 200
            await hold(up, 5000)
            answers = await asyncio.gather(*(up.call() for _ in range(5)))
            assert [status for status, _, _ in answers] == [200] * 5
            assert (up.host.started, len(up.host.replicas)) == (1, 1)
            assert (await describe(up)).startswith("note: The budget of echo.openfaas-fn is spent.")

    run(scenario())


def test_no_more_replicas_are_started_beside_it(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            fleet = await up.deploy(gpu="0.2", max="3", budget="1000")
            await up.call()
            await hold(up, 1000)
            over, echo = asyncio.Event(), up.host.handler

            async def slow(request):
                await over.wait()
                return await echo(request)

            up.host.handler = slow
            calls = [asyncio.create_task(up.call()) for _ in range(3)]
            await until(lambda: fleet.waiting == 2)
            over.set()
            assert [(await call)[0] for call in calls] == [200] * 3
            assert up.host.started == 1

    run(scenario())


def test_who_waits_behind_the_last_replica_is_refused_when_it_dies(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            fleet = await up.deploy(gpu="1", budget="1000")
            await up.call()
            await hold(up, 1000)
            there = asyncio.Event()

            async def hang(request):
                there.set()
                await asyncio.sleep(3600)

            up.host.handler = hang
            first = asyncio.create_task(up.call())
            await there.wait()
            second = asyncio.create_task(up.call())
            await until(lambda: fleet.waiting == 1)
            await up.host.replicas[0].die()
            assert (await first)[0] == 502
            assert error_of(await second)[:2] == (429, "budget-spent")
            assert up.host.started == 1

    run(scenario())


def test_a_parked_replica_is_not_woken(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            await up.deploy(gpu="1", park="20ms", budget="1000")
            await up.call()
            (replica,) = up.host.replicas
            await until(lambda: replica.state is ReplicaState.PARKED)
            await hold(up, 1000)
            assert error_of(await up.call())[:2] == (429, "budget-spent")
            assert (replica.state, replica.requests) == (ReplicaState.PARKED, 1)

    run(scenario())


def test_a_higher_budget_wakes_it_at_once(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            await up.deploy(gpu="1", budget="1000")
            await hold(up, 1000)
            assert (await up.call())[0] == 429
            fleet = await up.deploy(gpu="1", budget="2000", method="PUT")
            await until(lambda: not fleet.status)
            assert (await up.call())[0] == 200

    run(scenario())


def test_an_earlier_life_has_spent_it(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            await up.deploy(gpu="1", min="1", budget="1000")
            await until(lambda: up.host.started == 1)
            await hold(up, 1000)
        async with running(state_dir) as up:
            await until(lambda: not up.gateway.fleet("echo.openfaas-fn").rollout.preparing)
            assert error_of(await up.call())[:2] == (429, "budget-spent")
            assert up.host.started == 0

    run(scenario())


def test_the_minimum_is_there_again_when_the_day_is_over(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            fleet = await up.deploy(gpu="1", budget="1000")
            await hold(up, 1000)
            fleet = await up.deploy(gpu="1", min="1", budget="1000", method="PUT")
            await until(lambda: fleet.deployment.spec.min_replicas == 1)
            assert up.host.started == 0
            ends_at_ns = time.time_ns() + SECOND // 20
            fleet.budget_of = lambda key, limit_gpu_s: Budget(key, 1000, limit_gpu_s, ends_at_ns)
            fleet.evaluate()
            await until(lambda: up.host.started == 1)

    run(scenario())


def test_scaling_up_is_refused_too(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            await up.deploy(gpu="1", budget="1000")
            await hold(up, 1000)
            url = f"{up.url}/system/scale-function/echo"
            async with up.client.post(url, json={"serviceName": "echo", "replicas": 1}) as response:
                assert (response.status, response.headers["X-Gpufn-Error"]) == (429, "budget-spent")
            async with up.client.post(url, json={"serviceName": "echo", "replicas": 0}) as response:
                assert response.status == 202
            assert up.host.started == 0

    run(scenario())


def test_a_revision_takes_over_from_one_that_runs(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            fleet = await up.deploy(gpu="0.5", budget="1000", initial="1")
            await up.call()
            await hold(up, 1000)
            await up.deploy(gpu="0.5", budget="1000", initial="1", method="PUT")
            await until(lambda: fleet.deployment.revision == "2" and not fleet.rollout.status)
            assert (await up.call())[0] == 200

    run(scenario())


def test_a_revision_whose_start_others_refuse_waits_for_its_turn_and_the_old_one_serves(state_dir, monkeypatch):
    """On a cluster, the webhook."""
    monkeypatch.setattr("adapter.openfaas.fleet.SPENT_RETRY_S", 0.05)

    async def scenario():
        async with running(state_dir) as up:
            fleet = await up.deploy(gpu="0.5", initial="1")
            await up.call()
            refusals = [Overloaded("spent", code="budget-spent") for _ in range(3)]
            up.host.errors.extend(refusals)
            await up.deploy(gpu="0.5", initial="1", method="PUT")
            await until(lambda: len(up.host.errors) == 1)
            assert (fleet.deployment.revision, (await up.call())[0]) == ("1", 200)
            await until(lambda: fleet.deployment.revision == "2" and not fleet.rollout.status)
            assert (await up.call())[0] == 200

    run(scenario())


def test_a_revision_that_is_refused_when_the_old_one_has_just_gone_to_rest_is_the_function_then(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            fleet = await up.deploy(gpu="0.5", initial="1", idle="200ms")
            old = await up.host.new_replica()
            old.stop_allowed.clear()  # it drains for a while
            up.host.may_start.clear()
            up.host.errors.append(Overloaded("spent", code="budget-spent"))
            await up.deploy(gpu="0.5", initial="1", idle="200ms", method="PUT")
            await until(lambda: up.host.started == 2 and old.stop_asked.is_set())
            up.host.may_start.set()
            await until(lambda: not up.host.errors)
            await until(lambda: fleet.deployment.revision == "2")
            old.stop_allowed.set()
            assert not fleet.rollout.status
            assert (await up.call())[0] == 200

    run(scenario())


def test_the_minimum_is_there_again_when_the_calendar_jumps_into_the_next_day(state_dir, monkeypatch):
    """The clock is set, or this machine has slept: timers know nothing of either."""
    monkeypatch.setattr("adapter.openfaas.fleet.SPENT_RETRY_S", 0.05)

    async def scenario():
        async with running(state_dir) as up:
            await up.deploy(gpu="1", budget="1000")
            await hold(up, 1000)
            fleet = await up.deploy(gpu="1", min="1", budget="1000", method="PUT")
            await until(lambda: not fleet.rollout.status)
            assert not up.host.started
            now_ns = time.time_ns
            monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 86_400 * SECOND)
            await until(lambda: fleet.available)

    run(scenario())


def test_what_is_held_without_a_gpu_or_by_others_is_not_its(state_dir):
    async def scenario():
        async with running(state_dir) as up:
            await up.deploy(budget="1000")
            await hold(up, 5000, name="other")
            assert (await up.call())[0] == 200

    run(scenario())


def test_while_the_ledger_is_down_wakes_go_on_and_the_log_says_so_once(state_dir, caplog, monkeypatch):
    async def scenario():
        async with running(state_dir) as up:
            await up.deploy(gpu="1", budget="1000")

            def away(*_):
                raise LedgerError("no", why="the disk is gone")

            monkeypatch.setattr(up.ledger, "summary", away)
            await hold(up, 1000)
            await up.gateway.budgets.look()
            assert (await up.call())[0] == 200
            said = [r for r in caplog.records if "budgets stop nobody" in r.message]
            assert [r.fields["why"] for r in said] == ["the disk is gone"]

    run(scenario())


def test_the_log_says_once_that_it_is_nearly_spent_and_once_that_it_is(state_dir, caplog):
    async def scenario():
        async with running(state_dir) as up:
            await up.deploy(gpu="1", budget="1000")
            for gpu_s in (700, 150, 1, 200, 2):
                await hold(up, gpu_s)
            said = [r for r in caplog.records if "a budget is" in r.message]
            assert [(r.levelno, r.message) for r in said] == [
                (logging.WARNING, "a budget is nearly spent"),
                (logging.WARNING, "a budget is spent"),
            ]
            assert "850.0 of 1,000.0" in said[0].fields["why"]

    run(scenario())
