import asyncio

from adapter.cluster.queue import WorkQueue
from tests.fakes.virtual_time import in_virtual_time


def play(scene):
    async def played():
        await scene(WorkQueue(first_pause_s=1.0, pause_limit_s=60.0), asyncio.get_running_loop().time)

    in_virtual_time(played())


def test_a_key_added_twice_comes_once():
    async def scene(queue, now):
        for key in ("a", "b", "a"):
            queue.add(key)
        assert [(await queue.get())[0] for _ in range(2)] == ["a", "b"]
        assert len(queue) == 0

    play(scene)


def test_a_key_added_while_it_is_worked_on_comes_after_and_not_beside():
    async def scene(queue, now):
        queue.add("a")
        await queue.get()
        queue.add("a")
        assert len(queue) == 0
        waiting = asyncio.ensure_future(queue.get())
        await asyncio.sleep(5)
        assert not waiting.done()
        queue.done("a")
        assert await waiting == ("a", 5.0)

    play(scene)


def test_a_delay_is_kept_and_the_sooner_one_wins():
    async def scene(queue, now):
        begun = now()
        queue.add_after("a", 30)
        queue.add_after("a", 10)
        queue.add_after("a", 20)
        assert (await queue.get())[0] == "a"
        assert now() - begun == 10
        queue.done("a")
        await asyncio.sleep(60)
        assert len(queue) == 0

    play(scene)


def test_now_is_sooner_than_later():
    async def scene(queue, now):
        begun = now()
        queue.add_after("a", 30)
        queue.add("a")
        await queue.get()
        assert now() == begun
        queue.done("a")
        await asyncio.sleep(60)
        assert len(queue) == 0

    play(scene)


def test_pauses_grow_while_a_key_fails_up_to_a_limit_and_begin_anew_when_it_does_not():
    async def scene(queue, now):
        async def pause():
            begun = now()
            queue.retry("a")
            await queue.get()
            queue.done("a")
            return now() - begun

        for limit in (1, 2, 4, 8, 16, 32, 60, 60):
            assert limit / 2 <= await pause() <= limit
        queue.forget("a")
        assert await pause() <= 1

    play(scene)


def test_one_key_that_fails_holds_no_other_up():
    async def scene(queue, now):
        queue.retry("a")
        queue.add("b")
        assert await queue.get() == ("b", 0.0)

    play(scene)


def test_many_workers_share_the_keys():
    async def scene(queue, now):
        done = []

        async def work():
            while True:
                key, _ = await queue.get()
                await asyncio.sleep(1)
                done.append(key)
                queue.done(key)

        workers = [asyncio.ensure_future(work()) for _ in range(3)]
        for key in range(9):
            queue.add(key)
        await asyncio.sleep(3.5)
        assert sorted(done) == list(range(9))
        for worker in workers:
            worker.cancel()

    play(scene)


def test_a_closed_queue_brings_nothing_later():
    async def scene(queue, now):
        queue.add_after("a", 1)
        queue.close()
        await asyncio.sleep(10)
        assert len(queue) == 0

    play(scene)
