"""Ctrl-C ends what a command does asynchronously, whichever thread the kernel gives it to."""

import asyncio
import signal
import threading
import time

import pytest

from adapter.cli.cluster import Connection
from adapter.cli.interrupt import run_interruptible

LIMIT_S = 20.0


def by_itself(work):
    return run_interruptible(work)


def of_a_cluster(work):
    loop = asyncio.new_event_loop()
    try:
        return Connection(None, loop).wait(work)
    finally:
        loop.close()


@pytest.mark.parametrize("run", [by_itself, of_a_cluster])
def test_ctrl_c_that_another_thread_is_given_ends_the_work(run):
    waits, ended = threading.Event(), []

    def other() -> None:
        waits.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    async def work():
        asyncio.get_running_loop().call_later(0.05, waits.set)
        try:
            await asyncio.sleep(LIMIT_S)
        finally:
            ended.append(True)

    thread, began = threading.Thread(target=other), time.monotonic()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(work())
    thread.join()
    assert time.monotonic() - began < LIMIT_S / 2
    assert ended


@pytest.mark.parametrize("run", [by_itself, of_a_cluster])
def test_what_is_not_interrupted_gives_its_result_and_leaves_ctrl_c_as_it_was(run):
    async def work():
        return 7

    assert run(work()) == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("run", [by_itself, of_a_cluster])
def test_work_that_was_cancelled_by_itself_is_no_ctrl_c(run):
    async def work():
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run(work())
