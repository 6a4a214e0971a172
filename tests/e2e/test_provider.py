"""The provider as a process of its own, over a cluster of this process: its flags, its end, and its sudden end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager

import aiohttp
import pytest

from tests.contract.hosts.kubernetes import eventually, run
from tests.contract.openfaas.provider import HANDLERS
from tests.fakes.pods import in_this_process
from tests.ports import free_port

pytestmark = pytest.mark.e2e

LIMIT_S = 60.0


@pytest.fixture
def kube(tmp_path):
    with in_this_process(tmp_path, HANDLERS) as kube:
        yield kube


class Process:
    """One life of it, and a client."""

    def __init__(self, kube, process, port: int, status_port: int, client) -> None:
        self.kube, self.process, self.client = kube, process, client
        self.url, self.status_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{status_port}"

    async def get(self, url: str):
        try:
            async with self.client.get(url) as answer:
                return answer.status, await answer.text()
        except aiohttp.ClientError:
            return 0, ""

    async def is_ready(self) -> bool:
        assert self.process.returncode is None, "it ended"
        return (await self.get(f"{self.status_url}/readyz"))[0] == 200

    async def deploy(self, name: str) -> None:
        body = {"service": name, "image": self.kube.images["slow"], "annotations": {"gpufn.dev/snapshot": "off"}}
        async with self.client.post(f"{self.url}/system/functions", json=body) as answer:
            assert answer.status == 202, await answer.text()

    async def call(self, name: str, text: str):
        async with self.client.post(f"{self.url}/function/{name}", data=text.encode()) as answer:
            return answer.status, await answer.text()


@asynccontextmanager
async def running(kube, folder, *flags: str):
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": kube.fake.url}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    port, status_port = free_port(), free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "adapter.openfaas",
        "--kubeconfig", str(kubeconfig), "--listen", "127.0.0.1", "--port", str(port), "--status-port", str(status_port),
        "--state", str(folder / "state"), *flags,
        env={name: value for name, value in os.environ.items() if not name.startswith("GPUFN_")},
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    async with aiohttp.ClientSession() as client:
        life = Process(kube, process, port, status_port, client)
        try:
            await eventually(life.is_ready, LIMIT_S)
            yield life
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def test_told_to_stop_it_answers_what_came_and_ends_and_its_pods_stay(kube, tmp_path):
    async def scenario():
        async with kube.running():
            async with running(kube, tmp_path, "--basic-auth", "false") as life:
                assert "gpufn_build_info" in (await life.get(f"{life.status_url}/metrics"))[1]
                await life.deploy("fn")
                calls = [asyncio.create_task(life.call("fn", f"{n}")) for n in range(20)]
                await eventually(lambda: _has_pod(kube))
                life.process.send_signal(signal.SIGTERM)
                assert sorted(await asyncio.gather(*calls)) == sorted((200, f"{n}") for n in range(20))
                assert await asyncio.wait_for(life.process.wait(), LIMIT_S) == 0
            assert len(kube.fake.pods()) == 1

    run(scenario())


def test_killed_it_comes_back_to_the_same_pods(kube, tmp_path):
    async def scenario():
        async with kube.running():
            async with running(kube, tmp_path, "--basic-auth", "false") as life:
                await life.deploy("fn")
                assert await life.call("fn", "one") == (200, "one")
                (pod,) = kube.fake.pods()
                life.process.send_signal(signal.SIGKILL)
                await life.process.wait()
            async with running(kube, tmp_path, "--basic-auth", "false") as life:
                assert await life.call("fn", "two") == (200, "two")
                assert [one["metadata"]["name"] for one in kube.fake.pods()] == [pod["metadata"]["name"]]

    run(scenario())


async def _has_pod(kube) -> bool:
    return bool(kube.fake.pods())


@pytest.mark.parametrize(
    ("flags", "says"),
    [((), "has no user and password"), (("--port", "many"), "--port='many' cannot be used")],
)
def test_what_it_cannot_start_with_is_said_in_three_lines(tmp_path, flags, says):
    async def scenario():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "adapter.openfaas", "--credentials", str(tmp_path), *flags,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, said = await process.communicate()
        assert process.returncode == 3
        assert says in said.decode()
        assert "Traceback" not in said.decode()

    run(scenario())
