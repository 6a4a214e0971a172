"""Where a caller is expected, a replica is ready before it comes."""

import asyncio

import pytest

from adapter.openfaas import fleet as module
from adapter.policy.grants import Device
from adapter.policy.keep_alive import Basis, KeepAlive, Prewarm
from tests.fakes.replicas import FakeHost, run, serving, until

ONE, TWO = (Device(f"GPU-{n}", "NVIDIA L4", 24 * 2**30) for n in (1, 2))
KEPT_S, AFTER_S, FOR_S = 60.0, 600.0, 120.0


@pytest.fixture(autouse=True)
def _learned(monkeypatch):
    """Everybody's callers come in the eleventh or the twelfth minute."""
    learned = KeepAlive(KEPT_S, Basis.LEARNED, "its callers are regular", Prewarm(AFTER_S, FOR_S))
    monkeypatch.setattr(module, "keep_alive", lambda *_, **__: learned)


class Clock:
    """The fleet's, which passes when a test says so."""

    def __init__(self, fleet):
        self._fleet, self.now_s = fleet, fleet.clock()
        fleet.clock = lambda: self.now_s

    def pass_by(self, seconds):
        self.now_s += seconds
        self._fleet.evaluate()


async def rested(up, **spec):
    """A function that was called once and has gone to zero; its fleet and clock."""
    fleet = await up.deploy(park="0", **spec)
    clock = Clock(fleet)
    assert (await up.call())[0] == 200
    clock.pass_by(KEPT_S)
    await until(lambda: not fleet.members)
    return fleet, clock


def test_it_is_ready_from_when_its_callers_come_until_they_do_not(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            fleet, clock = await rested(up)
            clock.pass_by(AFTER_S - KEPT_S - 1)
            assert fleet.desired == 0
            clock.pass_by(1)
            await until(lambda: fleet.available)
            clock.pass_by(FOR_S - 1)  # longer than it is kept
            assert fleet.desired == 1
            clock.pass_by(1)
            await until(lambda: not fleet.members)
            clock.pass_by(AFTER_S)
            assert (fleet.desired, up.host.started) == (0, 2)  # once for each time of rest

    run(scenario())


def test_a_timer_wakes_it(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            fleet, clock = await rested(up)
            clock.pass_by(AFTER_S - KEPT_S - 0.05)
            began_s, loop_s = clock.now_s, asyncio.get_running_loop().time()
            fleet.clock = lambda: began_s + asyncio.get_running_loop().time() - loop_s
            await until(lambda: up.host.started == 2)

    run(scenario())


def test_who_comes_meanwhile_has_it_and_begins_anew(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            fleet, clock = await rested(up)
            clock.pass_by(AFTER_S - KEPT_S)
            await until(lambda: fleet.available)
            assert (await up.call())[0] == 200
            clock.pass_by(KEPT_S)
            await until(lambda: not fleet.members)
            assert up.host.started == 2

    run(scenario())


@pytest.mark.parametrize(("gpus", "started"), [((ONE,), 1), ((ONE, TWO), 2)])
def test_a_guess_does_not_take_the_last_gpu(state_dir, gpus, started):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, gpus=gpus)) as up:
            fleet, clock = await rested(up, gpu="1")
            clock.pass_by(AFTER_S - KEPT_S)
            assert fleet.desired == started - 1
            await until(lambda: up.host.started == started)

    run(scenario())


def test_what_was_made_ready_on_a_gpu_makes_room_for_who_calls(state_dir):
    async def scenario():
        async with serving(
            state_dir, FakeHost(state_dir, gpus=(ONE, TWO), functions=("echo", "other", "another"))
        ) as up:
            fleet, clock = await rested(up, gpu="1")
            clock.pass_by(AFTER_S - KEPT_S)
            await until(lambda: fleet.available)
            others = [await up.deploy(name, gpu="1", park="0") for name in ("other", "another")]
            for each in others:
                assert (await up.call(each.deployment.name))[0] == 200

    run(scenario())
