import asyncio

import pytest

from adapter.errors import Unavailable
from adapter.openfaas.activator import Waiters


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 20))


def test_first_come_first_served():
    async def scenario():
        waiters = Waiters(lambda _: pytest.fail("nobody left"))
        tasks = [asyncio.create_task(waiters.claim(waiters.enter(), 10)) for _ in range(3)]
        assert len(waiters) == 3
        assert all(waiters.give(n) for n in range(3))
        assert not waiters.give(3)
        assert await asyncio.gather(*tasks) == [0, 1, 2]

    run(scenario())


def test_who_leaves_is_passed_over():
    async def scenario():
        waiters = Waiters(lambda _: pytest.fail("nobody left with a place"))
        first, second = (asyncio.create_task(waiters.claim(waiters.enter(), 10)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert waiters.give("place")
        assert await second == "place"
        assert len(waiters) == 0

    run(scenario())


def test_a_place_given_to_somebody_who_leaves_at_that_moment_comes_back():
    async def scenario():
        returned = []
        waiters = Waiters(returned.append)
        task = asyncio.create_task(waiters.claim(waiters.enter(), 10))
        await asyncio.sleep(0)
        assert waiters.give("place")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert returned == ["place"]

    run(scenario())


def test_waiting_ends():
    async def scenario():
        waiters = Waiters(lambda _: None)
        with pytest.raises(asyncio.TimeoutError):
            await waiters.claim(waiters.enter(), 0.001)
        assert len(waiters) == 0
        assert not waiters.give("place")

    run(scenario())


def test_everybody_gets_an_error_of_his_own():
    async def scenario():
        waiters = Waiters(lambda _: None)
        tasks = [asyncio.create_task(waiters.claim(waiters.enter(), 10)) for _ in range(2)]
        await asyncio.sleep(0)
        waiters.fail(lambda: Unavailable("gone"))
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(error) for error in errors] == ["gone", "gone"]
        assert errors[0] is not errors[1]

    run(scenario())
