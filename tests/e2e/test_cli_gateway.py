"""`gpufn list, describe, invoke, logs` against a gateway over fake replicas that runs beside the test."""

import asyncio
import csv
import io
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
from aiohttp import web

from adapter.cli.main import run
from adapter.openfaas.auth import ensure_credentials
from benchmarks.session import gpufn
from tests.contract.openfaas.scenario import fake_host
from tests.fakes.replicas import serving, until

pytestmark = pytest.mark.e2e


class Beside:
    """A gateway on a loop of its own thread; `do` runs a coroutine function of it there."""

    def __init__(self, up, loop):
        self.up = up
        self.url = up.url
        self._loop = loop

    def do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


@contextmanager
def gateway_beside(state, host_of):
    ready: Future = Future()

    async def live():
        over = asyncio.Event()
        async with serving(state, host_of(state), ensure_credentials(state)) as up:
            ready.set_result((Beside(up, asyncio.get_running_loop()), over))
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    beside, over = ready.result(30)
    try:
        yield beside
    finally:
        beside._loop.call_soon_threadsafe(over.set)
        thread.join()


@pytest.fixture
def gateway(state_dir, monkeypatch):
    monkeypatch.setenv("GPUFN_HOME", str(state_dir))
    with gateway_beside(state_dir, fake_host) as beside:
        monkeypatch.setenv("OPENFAAS_URL", beside.url)
        yield beside


@pytest.fixture
def stdin(monkeypatch):
    def give(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    give(b"")
    return give


def test_list_says_what_to_do_first(gateway, capsys):
    assert run(["list"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "faas-cli deploy" in err


def test_list(gateway, capsys, stdin):
    gateway.do(gateway.up.deploy("echo"))
    gateway.do(gateway.up.deploy("other"))
    assert run(["invoke", "echo", "-d", "hi"]) == 0
    capsys.readouterr()
    assert run(["list"]) == 0
    header, echo, other = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["NAME", "READY", "STATUS", "LAST", "START", "INVOCATIONS", "AGE"]
    assert echo[:3] == ["echo", "1/1", "serving"]
    assert echo[4:6] == ["load", "1"]
    assert other[:4] == ["other", "0/0", "zero", "–"]
    assert run(["ls", "-q", "-A"]) == 0
    assert capsys.readouterr().out == "echo\nother\n"
    assert run(["list", "-o", "json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["image"], first["ready"], first["wanted"], first["last_start_rung"]) == ("echo:1", 1, 1, "load")
    assert first["last_start_ns"] > 0
    assert abs(first["created_at_ns"] - time.time_ns()) < 3600 * 10**9
    assert (second["ready"], second["last_start_ns"], second["last_start_rung"]) == (0, None, None)
    assert run(["list", "-o", "csv"]) == 0
    (row, _) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["ready"], row["created_at_ns"]) == ("1", str(first["created_at_ns"]))
    assert run(["list", "-n", "absent"]) == 4


def test_list_of_every_namespace_names_them(gateway, capsys):
    gateway.do(gateway.up.deploy("echo"))
    assert run(["list", "-A"]) == 0
    header, echo = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[:2] == ["NAME", "NAMESPACE"]
    assert echo[:2] == ["echo", "openfaas-fn"]


def test_list_says_what_failed_and_notes_what_runs(gateway, capsys):
    async def fail():
        gateway.up.host.serves = False
        await gateway.up.deploy("echo", min="1")
        (await gateway.up.host.new_replica()).fail("ValueError: no weights")
        await until(lambda: not gateway.up.host.replicas)

    async def limited():
        body = {"service": "other", "image": "other", "limits": {"memory": "1Mi"}}
        body["annotations"] = {"gpufn.dev/initial": "0"}
        async with gateway.up.client.post(f"{gateway.url}/system/functions", json=body) as response:
            assert response.status == 202
        fleet = gateway.up.gateway.fleet("other.openfaas-fn")
        await until(lambda: not fleet.rollout.preparing)

    gateway.do(fail())
    gateway.do(limited())
    assert run(["list", "-o", "wide"]) == 0
    _, echo, other = capsys.readouterr().out.splitlines()
    assert echo.split()[3] == "failed"
    assert echo.endswith("ValueError: no weights")
    assert other.split()[3] == "zero"
    assert other.endswith("limits of memory are not enforced here")
    assert run(["describe", "other"]) == 0
    assert capsys.readouterr().err == "! limits of memory are not enforced here\n"


def test_describe(gateway, capsys, stdin):
    gateway.do(gateway.up.deploy("echo", idle="10m"))
    assert run(["invoke", "echo", "-d", "hi"]) == 0
    capsys.readouterr()
    assert run(["describe", "echo"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    shown = {key: value.strip() for key, value in lines.items()}
    assert shown["READY"] == "1/1"
    assert shown["ANNOTATIONS"] == "gpufn.dev/idle=10m,gpufn.dev/initial=0"
    assert shown["KEEP ALIVE"] == "10m00s idle: scale.idle says 10m00s"
    assert shown["LATEST STARTS"].endswith("load")
    assert run(["describe", "echo.openfaas-fn", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["starts"][0]["rung"] == "load"
    assert [replica["state"] for replica in whole["replicas"]] == ["serving"]
    assert (whole["ready"], whole["wanted"], whole["annotations"]["gpufn.dev/idle"]) == (1, 1, "10m")
    assert run(["describe", "absent"]) == 4
    assert "No function absent.openfaas-fn.  [function-unknown]" in capsys.readouterr().err


def test_invoke(gateway, capsys, stdin, tmp_path):
    seen = []

    async def handler(request):
        seen.append((request.method, request.raw_path, request.headers.copy(), await request.read()))
        return web.Response(body=seen[-1][3])

    gateway.up.host.handler = handler
    gateway.do(gateway.up.deploy("echo"))
    assert run(["invoke", "echo", "-i", "n=3", "-i", "text=a=b", "-H", "X-Own: 1", "--path", "/p?q=1"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"n": 3, "text": "a=b"}
    assert "✓ 200 in" in err
    assert "(cold: load)" in err
    method, path, headers, _ = seen[-1]
    assert (method, path, headers["X-Own"]) == ("POST", "/p?q=1", "1")
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers  # a function must not see the gateway's password

    (tmp_path / "body").write_bytes(b"\0\x01")
    assert run(["invoke", "echo", "-d", f"@{tmp_path / 'body'}"]) == 0
    assert seen[-1][3] == b"\0\x01"
    stdin(b"piped")
    assert run(["invoke", "echo"]) == 0
    assert seen[-1][3] == b"piped"
    assert run(["invoke", "echo", "-X", "get", "-d", ""]) == 0
    assert seen[-1][0] == "GET"
    capsys.readouterr()
    assert run(["invoke", "echo", "--async", "-d", "later"]) == 0
    assert "✓ 202" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["absent"], 4),
        (["echo", "-i", "novalue"], 2),
        (["echo", "-H", "novalue"], 2),
        (["echo", "-d", "x", "-i", "a=1"], 2),
        (["echo", "-d", "@/does/not/exist"], 3),
        (["echo", "--async", "--callback", "ftp://x"], 3),
        (["echo", "-g", "http://127.0.0.1:1"], 6),
    ],
)
def test_what_invoke_refuses(gateway, capsys, stdin, words, code):
    gateway.do(gateway.up.deploy("echo"))
    assert run(["invoke", *words]) == code


def test_a_function_that_answers_with_an_error(gateway, capsys, stdin):
    async def handler(_):
        return web.Response(status=418, text="short and stout")

    gateway.up.host.handler = handler
    gateway.do(gateway.up.deploy("echo"))
    assert run(["invoke", "echo"]) == 1
    out, err = capsys.readouterr()
    assert out == "short and stout"
    assert "echo answered 418." in err


def test_logs(gateway, capsys):
    gateway.do(gateway.up.deploy("echo"))
    assert run(["logs", "echo"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "2026-01-02T03:04:05Z echo-1  loading"
    assert second.endswith(" echo-1  ready")
    assert run(["logs", "echo", "--tail", "1", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "ready"
    assert run(["logs", "echo", "--since", "5m"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", "echo has printed nothing in that time.\n")
    assert run(["logs", "echo", "--since", "soon"]) == 2
    assert run(["logs", "echo.openfaas-fn", "--tail", "1"]) == 0
    assert run(["logs", "absent"]) == 4
    assert "[function-unknown]" in capsys.readouterr().err


def test_a_followed_log_goes_on_until_the_gateway_ends(gateway):
    gateway.do(gateway.up.deploy("echo"))
    path = gateway.up.host.log_path(gateway.up.gateway.fleet("echo.openfaas-fn").deployment)
    command = [*gpufn(), "logs", "echo", "-f", "-o", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert [json.loads(follower.stdout.readline())["text"] for _ in range(2)] == ["loading", "ready"]
        with path.open("a") as file:
            file.write('{"timestamp": "2026-01-02T03:04:07+00:00", "instance": "echo-1", "text": "more"}\n')
        assert json.loads(follower.stdout.readline())["text"] == "more"
        gateway.do(asyncio.wait_for(_stop(gateway.up), 30))
        assert follower.wait(30) == 0


async def _stop(up):
    up.stop.set()
    up.gateway.stopping.set()


def test_a_wrong_password_is_said(gateway, state_dir, capsys):
    (state_dir / "basic-auth-password").write_text("wrong")
    assert run(["describe", "echo"]) == 6
    assert "refuses the password" in capsys.readouterr().err
