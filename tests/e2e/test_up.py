"""`gpufn up` as users run it: a process of its own, real replicas, signals."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import aiohttp
import pytest

from benchmarks.session import REPOSITORY, Session, wait_until_gone

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def envs(tmp_path_factory):
    """Built once for all tests here."""
    return tmp_path_factory.mktemp("envs")


@pytest.fixture
def session(tmp_path, envs):
    session = Session(tmp_path / "state", functions=REPOSITORY / "tests" / "functions", envs=envs)
    yield session
    session.end()
    assert not wait_until_gone(tmp_path / "state")


def up(*arguments: object) -> subprocess.CompletedProcess[str]:
    """One that is expected to end by itself."""
    command = [sys.executable, "-m", "adapter.cli.main", "up", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_deploy_call_stop(session):
    with session:
        session.deploy("counts", {"gpufn.dev/initial": "1"})
        assert session.call("counts").status == 200
        session.wait(lambda: session.starts("counts"), "its start is told", 30)
        assert [record["rung"] for record in session.starts("counts")] == ["load"]
        assert (session.state / "gateway").read_text() == session.url
    assert not (session.state / "gateway").exists()
    assert not wait_until_gone(session.state, session.port)


def test_500_requests_at_zero_are_one_replica(session):
    async def all_at_once():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:

            async def call():
                async with client.post(f"{session.url}/function/load-slow", data=b"x") as answer:
                    await answer.read()
                    return answer.status

            return await asyncio.gather(*(call() for _ in range(500)))

    with session:
        session.deploy("load-slow", {"gpufn.dev/initial": "0"})
        assert asyncio.run(all_at_once()) == [200] * 500
        assert len(session.replicas("load-slow")) == 1


def test_what_was_deployed_survives_a_kill_and_no_replica_does(session):
    session.start()
    session.api("POST", "/system/secrets", {"name": "token", "value": "s3cret"})
    body = {"service": "reads-secret", "image": "reads-secret", "secrets": ["token"]}
    session.api("POST", "/system/functions", {**body, "annotations": {"gpufn.dev/snapshot": "off"}})
    session.wait(lambda: session.request("POST", "/function/reads-secret?name=token").status == 200, "it answers", 60)
    digest = session.request("POST", "/function/reads-secret?name=token").body
    session.wait(lambda: session.starts("reads-secret"), "its start is told", 30)
    before = session.starts("reads-secret")
    session.kill()
    assert not wait_until_gone(session.state)
    with session:
        assert session.request("POST", "/function/reads-secret?name=token").body == digest
        session.wait(lambda: len(session.starts("reads-secret")) == 2, "the second start is told", 30)
        assert session.starts("reads-secret")[1:] == before
        assert "reads-secret" in session.cli("list")


def test_a_second_one_on_one_state_folder_is_refused(session):
    with session:
        done = up("--port", 0, "--state", session.state)
        assert done.returncode == 5
        assert f"process id is {session.pid}" in done.stderr


def test_a_taken_port_is_refused_with_who_has_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = up("--port", taken.getsockname()[1], "--state", tmp_path / "state")
        assert done.returncode == 5
        assert f"Process {os.getpid()} (" in done.stderr


def _state_is_a_file(state):
    state.write_text("")


def _queue_is_damaged(state):
    state.mkdir()
    (state / "queue.sqlite").write_bytes(b"no database" * 1000)


def _password_is_no_text(state):
    state.mkdir()
    (state / "basic-auth-password").write_bytes(b"\xff\xfe")


def _secrets_are_a_file(state):
    state.mkdir()
    (state / "secrets").write_text("")


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (_state_is_a_file, 3, "state: File exists."),
        (_queue_is_damaged, 1, "queue.sqlite cannot be opened"),
        (_password_is_no_text, 3, "basic-auth-password cannot be used"),
        (_secrets_are_a_file, 3, "secrets: File exists."),
    ],
)
def test_what_is_wrong_with_a_state_folder_is_said(tmp_path, damage, code, words):
    damage(tmp_path / "state")
    done = up("--port", 0, "--state", tmp_path / "state", "--functions", REPOSITORY / "tests" / "functions")
    assert (done.returncode, "[bug]" in done.stderr) == (code, False)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "nclosed" not in done.stderr


def test_everybody_on_the_network_without_a_password_is_refused(tmp_path):
    done = up("--port", 0, "--state", tmp_path / "state", "--no-auth", "--listen", "0.0.0.0")
    assert done.returncode == 3
    assert "anybody" in done.stderr


def test_a_stop_lets_running_requests_finish(session):
    async def call_and_stop():
        async with aiohttp.ClientSession() as client:

            async def call():
                async with client.post(f"{session.url}/function/slow?seconds=1") as answer:
                    await answer.read()
                    return answer.status

            task = asyncio.create_task(call())
            while not any(replica["in_flight"] for replica in session.replicas("slow")):  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.01)
            os.kill(session.pid, signal.SIGTERM)
            return await task

    session.start()
    session.deploy("slow", {"gpufn.dev/initial": "1"})
    session.wait(lambda: session.request("POST", "/function/slow?seconds=0").status == 200, "it is up", 30)
    assert asyncio.run(call_and_stop()) == 200
    assert not wait_until_gone(session.state, session.port)


def test_a_second_signal_ends_replicas_at_once(session):
    async def call_and_stop():
        async with aiohttp.ClientSession() as client:

            async def call():
                async with client.post(f"{session.url}/function/slow?seconds=50") as answer:
                    return answer.status

            task = asyncio.create_task(call())
            while not any(replica["in_flight"] for replica in session.replicas("slow")):  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.01)
            os.kill(session.pid, signal.SIGTERM)
            with suppress(OSError):  # once the first has been heard, nobody new is let in
                while session.replicas("slow"):  # noqa: ASYNC110  # another process
                    await asyncio.sleep(0.01)
            os.kill(session.pid, signal.SIGTERM)
            return await task

    session.start()
    session.deploy("slow", {"gpufn.dev/initial": "1"})
    session.wait(lambda: session.request("POST", "/function/slow?seconds=0").status == 200, "it is up", 30)
    assert asyncio.run(call_and_stop()) == 502
    assert not wait_until_gone(session.state, session.port)
