import asyncio
import os
import signal

import pytest

from adapter.cluster.component import run, stop_asked, until
from adapter.errors import ConfigError, Unavailable


@pytest.fixture(autouse=True)
def _logs_as_they_were(monkeypatch):
    monkeypatch.setattr("adapter.logs.setup", lambda **_: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_works_until_a_signal_ends_it_and_what_it_did_ends_first(number):
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def serve():
        stop = stop_asked()
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
        await until(stop.wait(), work())

    assert run(serve, {}) == 0
    assert ended


def test_what_cannot_be_is_said_to_whoever_started_it(capsys):
    async def serve():
        await until(asyncio.Event().wait(), fails())

    async def fails():
        raise Unavailable("There is none.", code="none")

    assert run(serve, {}) == Unavailable("").exit_code
    assert "There is none." in capsys.readouterr().err


def test_a_level_of_the_log_that_is_none_is_said(capsys):
    assert (
        run(lambda: pytest.fail("it must not come to that"), {"GPUFN_LOG_LEVEL": "loud"}) == ConfigError("").exit_code
    )
    assert "GPUFN_LOG_LEVEL" in capsys.readouterr().err


def test_a_work_that_ends_ends_all():
    async def scene():
        others = asyncio.ensure_future(asyncio.sleep(60))
        await until(asyncio.sleep(60), asyncio.sleep(0), others)
        assert others.cancelled()

    asyncio.run(scene())
