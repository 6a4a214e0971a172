import asyncio
import logging
from dataclasses import dataclass

import pytest

from adapter.errors import ConfigError, Overloaded, Unavailable
from adapter.hosts import Inventory
from adapter.openfaas import gpus as module
from adapter.openfaas.gpus import Gpus, Grant, Withdrawn
from adapter.policy.grants import ClaimState, Device, Want, decide
from tests.fakes.replicas import run, until

ONE, TWO = (Device(f"GPU-{n}", "NVIDIA L4", 24) for n in (1, 2))
LONG_S = 60.0


@dataclass
class Replica:
    """A holder that does nothing by itself."""

    name: str
    state: ClaimState = ClaimState.RUNNING
    idle_since_s: float | None = 0.0
    price_s: float = 1.0
    asked: tuple[str, ...] = ()

    def wake_s(self, *, parks):
        return self.price_s

    def evict(self, *, park):
        self.asked += ("park" if park else "stop",)


def ledger(*devices, **options):
    return Gpus(Inventory(devices or (ONE,)), **options)


def want(name="new", memory=24, **more):
    return Grant(Want(f"{name}.ns", 1, memory, **more))


async def holding(gpus, name, memory=24, state=ClaimState.IDLE, **more):
    """A grant that is held, and its replica."""
    grant = want(name, memory)
    await gpus.acquire(grant, LONG_S)
    grant.holder = Replica(f"{name}-1", state, **more)
    return grant, grant.holder


def asking(gpus, grant, limit_s=LONG_S):
    return asyncio.ensure_future(gpus.acquire(grant, limit_s))


def waiters(gpus):
    return len(gpus.waiting())


def test_what_is_free_is_given_without_a_wait():
    async def scenario():
        gpus, grant = ledger(), want()
        acquiring = gpus.acquire(grant, LONG_S)
        with pytest.raises(StopIteration):
            acquiring.send(None)  # not even one turn of the loop
        assert (grant.is_held, grant.uuids) == (True, ("GPU-1",))

    run(scenario())


def test_who_waits_gets_what_is_released():
    async def scenario():
        gpus = ledger()
        first, _ = await holding(gpus, "a", state=ClaimState.RUNNING)
        second = want("b")
        task = asking(gpus, second)
        await until(lambda: waiters(gpus) == 1)
        assert not second.is_held
        gpus.release(first)
        await task
        assert (second.is_held, first.is_held) == (True, False)

    run(scenario())


def test_an_idle_neighbour_is_parked_and_goes_home_later():
    async def scenario():
        gpus = ledger()
        first, neighbour = await holding(gpus, "a")
        second = want("b")
        task = asking(gpus, second)
        await until(lambda: neighbour.asked == ("park",))
        assert not second.is_held  # not before it is gone
        gpus.parked(first)
        await task
        assert gpus.rows()[0]["parked"][0]["replica"] == "a-1"
        back = asking(gpus, first)
        await until(lambda: waiters(gpus) == 1)
        gpus.release(second)
        await back
        assert first.uuids == ("GPU-1",)

    run(scenario())


def test_one_that_cannot_park_is_stopped():
    async def scenario():
        gpus = ledger()
        first, neighbour = await holding(gpus, "a")
        first.parks = False
        task = asking(gpus, want("b"))
        await until(lambda: bool(neighbour.asked))
        assert neighbour.asked == ("stop",)
        gpus.release(first)
        await task

    run(scenario())


def test_nobody_is_parked_on_a_slice():
    async def scenario():
        gpus = ledger(Device("MIG-1", "NVIDIA A100 MIG 1g.5gb", 24, is_slice=True))
        _, neighbour = await holding(gpus, "a")
        task = asking(gpus, want("b"))
        await until(lambda: bool(neighbour.asked))
        assert neighbour.asked == ("stop",)
        task.cancel()

    run(scenario())


def test_one_that_was_busy_is_asked_again_and_one_that_never_parks_is_stopped(monkeypatch):
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)
    now = 1000.0

    async def scenario():
        nonlocal now
        gpus = ledger(clock=lambda: now)
        _, neighbour = await holding(gpus, "a")
        task = asking(gpus, want("b"))
        await until(lambda: neighbour.asked == ("park",))
        now += 1
        await until(lambda: neighbour.asked == ("park", "park"))
        neighbour.state = ClaimState.RUNNING
        await asyncio.sleep(0.05)
        now += 100
        assert len(neighbour.asked) == 2  # it works: it is left alone, and what was is forgotten
        neighbour.state = ClaimState.IDLE
        await until(lambda: neighbour.asked == ("park",) * 3)
        now += 41
        await until(lambda: len(neighbour.asked) == 4)
        assert neighbour.asked[-1] == "stop"
        task.cancel()

    run(scenario())


def test_a_choice_that_was_made_is_stuck_to():
    async def scenario():
        gpus = ledger(ONE, TWO)
        _, dear = await holding(gpus, "a", price_s=5)
        _, cheap = await holding(gpus, "b", state=ClaimState.RUNNING, price_s=1)
        task = asking(gpus, want("c"))
        await until(lambda: bool(dear.asked))
        cheap.state = ClaimState.IDLE
        gpus.changed()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert cheap.asked == ()
        task.cancel()

    run(scenario())


def test_a_large_want_is_not_starved_by_small_ones():
    async def scenario():
        gpus = ledger()
        small, _ = await holding(gpus, "a", 12, ClaimState.RUNNING)
        large, late = want("b", 24), want("c", 12)
        tasks = [asking(gpus, large), asking(gpus, late)]
        await until(lambda: waiters(gpus) == 2)
        assert not late.is_held  # though there is room for it
        gpus.release(small)
        await tasks[0]
        assert not late.is_held
        gpus.release(large)
        await tasks[1]

    run(scenario())


def test_devices_that_nobody_waits_for_are_given_to_later_ones():
    async def scenario():
        gpus = ledger(ONE, TWO)
        await holding(gpus, "a", 24, ClaimState.RUNNING)
        await holding(gpus, "b", 12, ClaimState.RUNNING)
        third, fourth = want("c", 24), want("d", 12)
        tasks = [asking(gpus, third), asking(gpus, fourth)]
        await until(lambda: waiters(gpus) == 2)
        assert not third.is_held  # it has the second device kept, where less is in the way
        assert not fourth.is_held
        for task in tasks:
            task.cancel()

    run(scenario())


def test_a_wait_is_bounded_and_says_who_holds_what():
    async def scenario():
        gpus = ledger()
        await holding(gpus, "a", state=ClaimState.RUNNING)
        grant = want("b")
        with pytest.raises(Overloaded) as raised:
            await gpus.acquire(grant, 0.01)
        assert raised.value.code == "gpu-wait"
        assert "gpu_wait" in raised.value.why
        assert "a-1 running" in raised.value.why
        assert raised.value.retry_after_s
        assert (grant.is_held, gpus.waiting()) == (False, [])

    run(scenario())


def test_who_goes_away_leaves_his_place_to_the_next():
    async def scenario():
        gpus = ledger()
        held, _ = await holding(gpus, "a", 12, ClaimState.RUNNING)
        gone, next_one = want("b", 24), want("c", 12)
        going = asking(gpus, gone)
        waiting = asking(gpus, next_one)
        await until(lambda: waiters(gpus) == 2)
        going.cancel()
        await waiting
        assert (gone.is_held, next_one.is_held, held.is_held) == (False, True, True)

    run(scenario())


def test_a_grant_that_was_given_to_someone_who_left_comes_back():
    async def scenario():
        gpus = ledger()
        held, _ = await holding(gpus, "a", state=ClaimState.RUNNING)
        unlucky = want("b")
        task = asking(gpus, unlucky)
        await until(lambda: waiters(gpus) == 1)
        gpus.release(held)
        await asyncio.sleep(0)  # it is given, and the task has not run yet
        assert unlucky.is_held
        task.cancel()
        await asyncio.wait([task])
        assert not unlucky.is_held
        assert gpus.rows()[0]["free_bytes"] == 24

    run(scenario())


def test_a_parked_one_that_leaves_at_the_last_moment_is_parked_still():
    async def scenario():
        gpus = ledger(ONE, TWO)
        parked, _ = await holding(gpus, "a")
        gpus.parked(parked)
        busy = [await holding(gpus, name, state=ClaimState.RUNNING) for name in "bc"]
        task = asking(gpus, parked)
        await until(lambda: waiters(gpus) == 1)
        gpus.release(busy[1][0])
        await asyncio.sleep(0)
        assert parked.uuids == ("GPU-2",)
        task.cancel()
        await asyncio.wait([task])
        assert (parked.is_held, parked.uuids) == (False, ("GPU-1",))
        assert gpus.rows()[1]["free_bytes"] == 24

    run(scenario())


def test_what_is_withdrawn_is_told_so():
    async def scenario():
        gpus = ledger()
        await holding(gpus, "a", state=ClaimState.RUNNING)
        grant = want("b")
        task = asking(gpus, grant)
        await until(lambda: waiters(gpus) == 1)
        gpus.withdraw(grant)
        with pytest.raises(Withdrawn):
            await task
        assert gpus.waiting() == []

    run(scenario())


def test_a_home_that_has_gone_is_said():
    async def scenario():
        gpus = ledger()
        grant, _ = await holding(gpus, "a")
        gpus.parked(grant)
        gpus.inventory = Inventory((TWO,))
        with pytest.raises(Unavailable) as raised:
            await gpus.acquire(grant, LONG_S)
        assert raised.value.code == "gpu-gone"

    run(scenario())


def test_what_comes_twice_changes_nothing():
    async def scenario():
        gpus = ledger()
        grant, _ = await holding(gpus, "a")
        for _ in range(2):
            gpus.parked(grant)
        for _ in range(2):
            gpus.release(grant)
        gpus.withdraw(grant)
        assert gpus.rows()[0]["free_bytes"] == 24

    run(scenario())


@pytest.mark.parametrize(("devices", "code"), [((), "no-gpu"), ((ONE,), "gpu-too-small")])
def test_what_can_never_be_is_refused_before_anything_is_started(devices, code):
    gpus = Gpus(Inventory(devices, why_not="" if devices else "No driver."))
    with pytest.raises(ConfigError) as raised:
        gpus.check(Want("a.ns", 1, 25))
    assert raised.value.code == code
    assert devices or "No driver." in raised.value.why


def test_decisions_are_logged_once_with_all_that_they_rest_on(caplog):
    async def scenario():
        gpus = ledger()
        await holding(gpus, "a", state=ClaimState.RUNNING)
        task = asking(gpus, want("b"))
        await until(lambda: waiters(gpus) == 1)
        for _ in range(3):
            gpus.changed()
            await asyncio.sleep(0)
        task.cancel()

    with caplog.at_level(logging.INFO, module.__name__):
        run(scenario())
    logged = [record.fields for record in caplog.records]
    assert [fields["decision"] for fields in logged] == ["granted", "wait"]
    assert logged[1]["claims"][0]["replica"] == "a-1"
    want_again = Want(**logged[1]["want"])
    assert decide([ONE], [], want_again).devices == (ONE,)
