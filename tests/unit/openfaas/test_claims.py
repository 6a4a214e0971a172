import asyncio
from types import SimpleNamespace

import pytest

from adapter.hosts import Deployment, Inventory, ReplicaState
from adapter.openfaas.claims import Claims
from adapter.openfaas.gpus import Gpus, Withdrawn
from adapter.openfaas.members import Member
from adapter.policy.grants import Device
from adapter.records import Rung, StartRecord
from adapter.spec import parse_spec
from tests.fakes.replicas import run, until

GPU = Device("GPU-1", "NVIDIA L4", 24 * 2**30)
SPEC = parse_spec({"gpu": {"count": 1}}, {})


async def holding(gpus, claims, name):
    """A member that holds its grant."""
    deployment = Deployment(name, "ns", "1", name, SPEC)
    resumed = []
    replica = SimpleNamespace(
        id=f"{name}-1",
        deployment=deployment,
        state=ReplicaState.SERVING,
        building_snapshot=False,
        resume=resumed.append,
    )
    ask = claims.for_start(deployment, firm=False)
    await claims.granted(ask)
    member = Member(replica, 0, grant=ask.grant)
    claims.hold(member)
    return member, resumed


async def about_to_wake(gpus, claims):
    """A parked member whose GPU has been given to it, which it has not noticed yet; and the ask's task."""
    sleeper, _ = await holding(gpus, claims, "a")
    sleeper.replica.state = ReplicaState.PARKED
    claims.parked(sleeper)
    neighbour, _ = await holding(gpus, claims, "b")
    neighbour.in_flight = 1
    task = asyncio.ensure_future(claims.granted(claims.for_wake(sleeper)))
    await until(lambda: bool(gpus.waiting()))
    claims.ended(neighbour)
    await asyncio.sleep(0)
    assert sleeper.grant.is_held
    return sleeper, task


def ledger():
    gpus = Gpus(Inventory((GPU,)))
    return gpus, Claims(gpus, lambda member, reason: None)


@pytest.mark.parametrize("end", ["stopping", "ended"])
def test_a_gpu_that_is_given_to_one_who_ends_comes_back(end):
    async def scenario():
        gpus, claims = ledger()
        sleeper, task = await about_to_wake(gpus, claims)
        getattr(claims, end)(sleeper)
        with pytest.raises(Withdrawn):
            await task
        assert gpus.rows()[0]["free_bytes"] == GPU.memory_bytes
        assert len(gpus.rows()[0]["parked"]) == (end == "stopping")
        assert claims.asks == {}

    run(scenario())


def test_a_member_that_wakes_is_told_on_what():
    async def scenario():
        gpus, claims = ledger()
        member, resumed = await holding(gpus, claims, "a")
        member.replica.state = ReplicaState.PARKED
        claims.parked(member)
        claims.woken(member, await claims.granted(claims.for_wake(member)))
        assert resumed == [("GPU-1",)]
        assert (member.asleep, bool(member.gpu_wait_ns)) == (False, True)

    run(scenario())


def test_what_is_measured_is_the_price_of_the_next_eviction():
    async def scenario():
        gpus, claims = ledger()
        member, _ = await holding(gpus, claims, "a")
        guessed = member.grant.claim().wake_s
        assert guessed > 1  # the driver's copy of 24 GiB
        claims.measured(StartRecord("a", "ns", "1", "a-1", Rung.RESUME, 0, 300_000_000, ()))
        claims.measured(StartRecord("a", "ns", "1", "a-1", Rung.LOAD, 0, 9_000_000_000, ()))
        claims.measured(StartRecord("a", "ns", "1", "a-1", Rung.LOAD, 0, 1, (), error="no"))
        assert member.grant.claim().wake_s == 0.3
        member.grant.parks = False
        assert member.grant.claim().wake_s == 9.0

    run(scenario())


def test_a_function_without_a_gpu_asks_for_nothing():
    _, claims = ledger()
    assert claims.for_start(Deployment("a", "ns", "1", "a", parse_spec({}, {})), firm=True) is None
    assert claims.asks == {}
