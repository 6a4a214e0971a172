"""Routes that faas-cli's recorded conversations do not show: refusals, our own, and what survives a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from multidict import CIMultiDict

from adapter.openfaas.file_catalog import FileCatalog
from adapter.openfaas.queue import Queue
from adapter.policy.grants import Device
from tests.contract.openfaas.scenario import fake_host
from tests.fakes.replicas import FakeHost, basic, run, serving, until

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).parents[2]
GPU = Device("GPU-1", "NVIDIA L4", 24 * 2**30)


async def ask(up, method: str, path: str, body: object = None, **options):
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    async with up.client.request(method, up.url + path, data=data, **options) as answer:
        return answer.status, await answer.text()


def test_who_must_say_who_he_is(state_dir):
    closed = [
        ("GET", "/system/functions"), ("POST", "/system/functions"), ("PUT", "/system/functions"),
        ("DELETE", "/system/functions"), ("GET", "/system/function/echo"), ("POST", "/system/scale-function/echo"),
        ("GET", "/system/info"), ("GET", "/system/secrets"), ("POST", "/system/secrets"), ("GET", "/system/logs?name=echo"),
        ("POST", "/system/namespace/x"), ("DELETE", "/system/namespace/x"), ("POST", "/system/namespaces"),
        ("GET", "/gpufn/v1/starts"), ("GET", "/gpufn/v1/replicas"), ("GET", "/gpufn/v1/snapshots"),
        ("GET", "/gpufn/v1/nodes"), ("GET", "/gpufn/v1/keep-alives"), ("GET", "/system/other"),
        ("GET", "//system/functions"), ("GET", "/nothing"),
    ]  # fmt: skip
    opened = ["/healthz", "/metrics", "/system/namespaces", "/system/namespace/openfaas-fn", "/function/echo"]

    async def scenario():
        async with serving(state_dir, credentials=("admin", "right")) as up:
            await up.deploy()
            for given in (
                None,
                basic("admin", "wrong"),
                basic("other", "right"),
                "Bearer right",
                "Basic",
                "Basic \udcff",
            ):
                up.client.headers.popall("Authorization", None)
                if given is not None:
                    up.client.headers["Authorization"] = given
                for method, path in closed:
                    status, text = await ask(up, method, path, {})
                    assert (status, text) == (401, "invalid credentials"), (given, method, path)
                for path in opened:
                    assert (await ask(up, "GET", path))[0] == 200, path

    run(scenario())


def test_without_a_password_other_sites_pages_are_kept_out(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            assert (await ask(up, "GET", "/system/functions"))[0] == 200
            headers = {"Origin": "https://elsewhere.example"}
            assert (await ask(up, "POST", "/system/functions", {}, headers=headers))[0] == 401

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/system/functions", b"{", 400, "no JSON"),
        ("POST", "/system/functions", {"service": "echo"}, 400, "names no image"),
        ("POST", "/system/functions", {"service": "echo", "image": "echo", "namespace": "absent"}, 404, "No namespace absent"),
        ("POST", "/system/functions", {"service": "echo", "image": "echo", "envVars": {"max_inflight": "-5"}}, 400, "max_inflight='-5'"),
        ("POST", "/system/functions", {"service": "echo", "image": "echo", "envVars": {"exec_timeout": "-1s"}}, 400, "exec_timeout='-1s'"),
        ("PUT", "/system/functions", {"service": "other", "image": "other"}, 404, "No function other.openfaas-fn"),
        ("DELETE", "/system/functions", {"functionName": "other"}, 404, "No function"),
        ("DELETE", "/system/functions", {}, 400, "functionName"),
        ("PATCH", "/system/functions", {}, 501, "not supported"),
        ("GET", "/system/function/other", None, 404, "No function"),
        ("GET", "/system/functions?namespace=absent", None, 404, "No namespace"),
        ("POST", "/system/scale-function/echo", {"replicas": -1}, 400, "whole number"),
        ("POST", "/system/scale-function/echo", {"replicas": "1"}, 400, "whole number"),
        ("POST", "/system/scale-function/other", {"replicas": 1}, 404, "No function"),
        ("POST", "/system/secrets", {"name": "../x", "value": "1"}, 400, "cannot be used"),
        ("POST", "/system/secrets", {"name": "x", "rawValue": "***"}, 400, "base64"),
        ("POST", "/system/secrets", {"name": "x", "value": ["1"]}, 400, "value is no text"),
        ("POST", "/system/secrets", {"name": "x", "rawValue": 1}, 400, "rawValue is no text"),
        ("GET", "/system/secrets?namespace=absent", None, 404, "No namespace"),
        ("GET", "/system/secrets?namespace=..", None, 404, "No namespace"),
        ("GET", "/system/secrets?namespace=/etc", None, 404, "No namespace"),
        ("POST", "/system/namespace/second", {"labels": {"a": 1}}, 400, "labels"),
        ("POST", "/system/secrets", {"name": "s" * 253, "value": "1"}, 202, ""),
        ("PATCH", "/system/secrets", {}, 405, "Method Not Allowed"),
        ("HEAD", "/healthz", None, 200, ""),
        ("POST", "/system/namespace/Second", {}, 400, "cannot be used"),
        ("DELETE", "/system/namespace/openfaas-fn", None, 409, "it has functions"),
        ("GET", "/system/logs", None, 422, "name is missing"),
        ("GET", "/system/logs?name=echo&tail=x", None, 422, "no number"),
        ("GET", "/system/logs?name=other", None, 404, "No function"),
        ("GET", "/system/telemetry", None, 501, "GET /system/telemetry is not supported"),
        ("POST", "/system/alert", {}, 501, "not supported"),
        ("GET", "/gpufn/v1/starts?limit=x", None, 400, '"bad-value"'),
        ("GET", "/async-function/echo", None, 405, ""),
        ("POST", "/async-function/other", b"x", 404, '"function-unknown"'),
        ("POST", "/function/other", b"x", 404, '"function-unknown"'),
    ],
)  # fmt: skip
def test_refusals(state_dir, method, path, body, status, words):
    async def scenario():
        async with serving(state_dir, fake_host(state_dir)) as up:
            await up.deploy()
            found = await ask(up, method, path, body)
            assert found[0] == status
            assert words in found[1]

    run(scenario())


def test_an_error_in_plain_text_has_its_code_in_a_header(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            for path in ("/system/function/absent", "/system/logs?name=absent"):
                async with up.client.get(up.url + path) as answer:
                    assert (answer.status, answer.headers["X-Gpufn-Error"]) == (404, "function-unknown")

    run(scenario())


def test_a_handler_that_does_not_parse_is_refused_at_the_deploy(state_dir):
    async def scenario():
        host = FakeHost(state_dir, functions=("broken",))
        folder_of = host.folder_of
        host.folder_of = lambda image: broken(folder_of(image))
        async with serving(state_dir, host) as up:
            status, text = await ask(up, "POST", "/system/functions", {"service": "broken", "image": "broken"})
            assert status == 400
            assert "handler.py does not parse." in text
            assert "line 1" in text

    def broken(folder: Path) -> Path:
        (folder / "handler.py").write_text("def handle(:\n")
        return folder

    run(scenario())


def test_a_secret_of_another_namespace_is_created_with_its_name(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await ask(up, "POST", "/system/namespace/team1", {"name": "team1"})
            body = {"service": "echo", "image": "echo", "namespace": "team1", "secrets": ["key"]}
            status, text = await ask(up, "POST", "/system/functions", body)
            assert status == 400
            assert "faas-cli secret create key --namespace team1" in text
            _, text = await ask(up, "PUT", "/system/secrets", {"name": "key", "namespace": "team1", "value": "x"})
            assert "faas-cli secret create key --namespace team1" in text

    run(scenario())


def test_limits_that_are_not_enforced_are_a_note_in_the_status(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            body = {"service": "echo", "image": "echo", "annotations": {"gpufn.dev/initial": "0"}}
            await ask(up, "POST", "/system/functions", {**body, "limits": {"memory": "1Mi", "cpu": "100m"}})
            fleet = up.gateway.fleet("echo.openfaas-fn")
            await until(lambda: not fleet.rollout.preparing)
            status = (await up.json("/system/function/echo"))["annotations"]["gpufn.dev/status"]
            assert status == "note: limits of cpu and memory are not enforced here"

    run(scenario())


def test_a_function_that_does_not_start_says_so_until_it_does(state_dir):
    async def status(up) -> str:
        text: str = (await up.json("/system/function/echo"))["annotations"].get("gpufn.dev/status", "")
        return text

    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            await up.deploy()
            async with up.client.post(f"{up.url}/system/scale-function/echo", json={"replicas": 1}) as answer:
                assert answer.status == 202
            replica = await up.host.new_replica()
            assert await status(up) == ""
            replica.fail("ValueError: no weights")
            await until(lambda: not up.host.replicas)
            assert await status(up) == "failed: echo.openfaas-fn cannot be started. ValueError: no weights"
            async with up.client.post(f"{up.url}/system/scale-function/echo", json={"replicas": 1}) as answer:
                assert answer.status == 202
            (await up.host.new_replica(2)).serve()
            assert await status(up) == ""

    run(scenario())


def test_a_replica_that_gets_no_more_requests_is_shown_as_stopping(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy()
            await up.call()
            (replica,) = up.host.replicas
            replica.building_snapshot = True  # it is let finish
            await ask(up, "POST", "/system/scale-function/echo", {"replicas": 0})
            (row,) = await up.json("/gpufn/v1/replicas")
            assert row["state"] == "stopping"
            assert not replica.stop_asked.is_set()
            replica.snapshot("published")

    run(scenario())


def test_no_series_are_exported_that_no_page_names(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            await up.deploy()
            await up.call()
            _, text = await ask(up, "GET", "/metrics")
            assert "gateway_function_invocation_total{" in text
            assert "_created" not in text

    run(scenario())


def test_a_secret_is_written_as_it_came(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            assert (await ask(up, "POST", "/system/secrets", {"name": "a", "rawValue": "AP8="}))[0] == 202
            assert (await ask(up, "POST", "/system/secrets", {"name": "b", "value": " x\n"}))[0] == 202
            _, text = await ask(up, "GET", "/system/secrets")
            assert json.loads(text) == [{"name": name, "namespace": "openfaas-fn"} for name in "ab"]
        folder = state_dir / "secrets" / "openfaas-fn"
        assert ((folder / "a").read_bytes(), (folder / "b").read_bytes()) == (b"\0\xff", b" x\n")

    run(scenario())


def test_a_watchdogs_variables_bind_the_gateway_too(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            env = {"max_inflight": "3", "exec_timeout": "2m"}
            body = {"service": "echo", "image": "echo", "envVars": env, "annotations": {"gpufn.dev/in-flight": "7"}}
            assert (await ask(up, "POST", "/system/functions", body))[0] == 202
            spec = up.gateway.fleet("echo.openfaas-fn").deployment.spec
            assert (spec.in_flight, spec.exec_timeout_s) == (3, 120.0)

    run(scenario())


def test_gpus_of_limits_reach_the_host(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, gpus=(GPU,))) as up:
            body = {"service": "echo", "image": "echo", "limits": {"nvidia.com/gpu": "1"}}
            assert (await ask(up, "POST", "/system/functions", body))[0] == 202
            assert (await up.host.new_replica()).devices == ("GPU-1",)
            assert up.host.prepared[0].spec.gpus == 1

    run(scenario())


def test_a_function_whose_gpu_is_not_here_is_refused_with_the_reason(state_dir):
    async def scenario():
        async with serving(state_dir) as up:
            body = {"service": "echo", "image": "echo", "limits": {"nvidia.com/gpu": "1"}}
            status, text = await ask(up, "POST", "/system/functions", body)
            assert status == 400
            assert "There is no GPU here. No driver." in text
        async with serving(state_dir, FakeHost(state_dir, gpus=(GPU,))) as up:
            body["annotations"] = {"gpufn.dev/models": "h100"}
            status, text = await ask(up, "POST", "/system/functions", body)
            assert status == 400
            assert "None is a h100; here: NVIDIA L4." in text

    run(scenario())


def test_a_function_whose_gpu_has_gone_is_there_and_says_so(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, gpus=(GPU,))) as up:
            await up.deploy(gpu="1")
        async with serving(state_dir) as up:
            status, _, body = await up.call()
            assert (status, json.loads(body)["error"]["code"]) == (503, "no-gpu")

    run(scenario())


def test_nodes_show_who_holds_what(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, gpus=(GPU,))) as up:
            await up.deploy(gpu="0.5")
            await up.call()
            (replica,) = up.host.replicas
            (node,) = await up.json("/gpufn/v1/nodes")
            (device,) = node["devices"]
            held = {
                "replica": replica.id,
                "function": "echo.openfaas-fn",
                "state": "idle",
                "bytes": GPU.memory_bytes // 2,
            }
            assert (device["uuid"], device["model"], device["free_bytes"]) == ("GPU-1", "NVIDIA L4", held["bytes"])
            assert (device["holders"], device["parked"], node["waiting"]) == ([held], [], [])
            assert (await up.json("/gpufn/v1/replicas"))[0]["devices"] == ["GPU-1"]
            replica.park()
            (node,) = await up.json("/gpufn/v1/nodes")
            (device,) = node["devices"]
            assert (device["free_bytes"], device["holders"]) == (GPU.memory_bytes, [])
            assert device["parked"] == [{**held, "state": "parked"}]

    run(scenario())


def test_asynchronous_calls_wake_functions(state_dir):
    async def scenario():
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            await up.deploy()
            async with up.client.post(f"{up.url}/async-function/echo/p?q=1", data=b"x" * 300_000) as answer:
                assert (answer.status, bool(answer.headers["X-Call-Id"])) == (202, True)
            replica = await up.host.new_replica()
            replica.serve()
            await until(lambda: up.gateway.metrics.answered("echo.openfaas-fn") == 1)

    run(scenario())


# Killed -------------------------------------------------------------------------------------------

_DEPLOYS = """
import asyncio, sys
from adapter.openfaas.file_catalog import FileCatalog
from adapter.openfaas.wire import FunctionDeployment
from pathlib import Path
catalog = FileCatalog(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    wanted = FunctionDeployment("fn", f"fn:{number}", env_vars={"x": str(number) * 10_000})
    asyncio.run(catalog.put(wanted, "then"))
    is_new = number == 1 and "ns" not in sys.argv[2:]
    asyncio.run(catalog.put_secret("ns", "token", str(number).encode() * 10_000, new=is_new))
    print(number, flush=True)
"""

_QUEUES = """
import asyncio, sys
from pathlib import Path
from multidict import CIMultiDict
from adapter.openfaas.invocation import Invocation
from adapter.openfaas.queue import Queue
from adapter.policy.grants import Device

async def main():
    async def never(*_):
        await asyncio.Event().wait()
    queue = Queue(Path(sys.argv[1]) / "queue.sqlite", never)
    queue.start()
    number = 0
    while True:
        number += 1
        await queue.put("fn.ns", Invocation("POST", "/", CIMultiDict({"X-Call-Id": str(number)}), b"x"))
        print(number, flush=True)

asyncio.run(main())
"""


def killed(program: str, state: Path, acknowledged: int, *arguments: str) -> int:
    """Run `program`, kill -9 it once it has said that number; returns the last number that it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(state), *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= acknowledged:
            break
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.stdout.close()
    process.wait()
    return int((rest or [str(acknowledged)])[-1])


def test_a_catalog_that_is_killed_while_writing_has_what_it_acknowledged(state_dir):
    for life in range(3):
        last = killed(_DEPLOYS, state_dir, 3, *(["ns"] if life else []))
        catalog = FileCatalog(state_dir)
        image = catalog.get("fn.openfaas-fn").deployment
        number = image.image.removeprefix("fn:")
        assert int(number) in (last, last + 1)
        assert image.env_vars == {"x": number * 10_000}  # whole
        secret = (state_dir / "secrets" / "ns" / "token").read_bytes()
        assert secret in (str(last).encode() * 10_000, str(last + 1).encode() * 10_000)


def test_a_queue_that_is_killed_does_what_it_accepted(state_dir):
    last = killed(_QUEUES, state_dir, 20)

    async def scenario():
        done = set()

        async def call(_, invocation):
            done.add(int(invocation.call_id))
            return 200, CIMultiDict(), b""

        queue = Queue(state_dir / "queue.sqlite", call)
        queue.start()
        await until(lambda: not queue._lanes)
        await queue.close()
        assert done >= set(range(1, last + 1))

    run(scenario())
