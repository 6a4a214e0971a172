"""What the provider does over any cluster: the same tests for the one in this process and for a real one.

A class that takes these tests over has a fixture `kube` as `tests.contract.hosts.kubernetes` has, whose `images` are
those of `HANDLERS` and ``missing``, and `state_dir`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections import Counter
from contextlib import asynccontextmanager

import aiohttp
import pytest

from adapter.cluster.resources import CONFIG_MAPS, PODS, SECRETS
from adapter.errors import NotFound
from adapter.hosts.kubernetes_pods import record_name
from adapter.hosts.ports import listen
from adapter.openfaas.cluster_server import opened
from adapter.openfaas.cluster_settings import ProviderSettings
from adapter.openfaas.server import run_gateway
from adapter.openfaas.wire import STATUS_ANNOTATION
from tests.contract.hosts.kubernetes import eventually

LIMIT_S = 120.0

ECHO = """
import os
def load(device):
    print("loaded", flush=True)
    return "model"
def handle(event, context):
    text = event.body.decode()
    if text.startswith("secret"):
        return context.secret(text.split()[1])
    if text.startswith("print"):
        print(text[6:], flush=True)
    return f"{os.environ.get('GREETING', '')} {text}"
"""
SLOW = """
import time
def load(device):
    time.sleep(1)
def handle(event, context):
    time.sleep(0.02)
    return event.body
"""
HANDLERS = {"echo": ECHO, "slow": SLOW}


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, LIMIT_S))


class Provider:
    """One life of a provider, and a client that speaks as faas-cli does."""

    def __init__(self, cluster, api, gateway, url, client, stop) -> None:
        self.cluster, self.api, self.gateway, self.url, self.client = cluster, api, gateway, url, client
        self.stop = stop
        self.namespace = cluster.namespace

    async def say(self, method: str, path: str, body=None):
        """Status and text of one answer."""
        async with self.client.request(method, self.url + path, json=body) as answer:
            return answer.status, await answer.text()

    def body(self, name: str, image: str = "echo", namespace: str = "", annotations=None, **fields):
        """As `faas-cli deploy` sends it."""
        return {
            "service": name,
            "image": self.cluster.images[image],
            "namespace": namespace or self.namespace,
            "annotations": {"gpufn.dev/snapshot": "off", "gpufn.dev/initial": "0", **(annotations or {})},
            **fields,
        }

    async def deploy(self, name: str, *arguments, **fields) -> None:
        """``faas-cli deploy``: change it, and where there is nothing to change, make it; prepared when this returns."""
        body = self.body(name, *arguments, **fields)
        code, text = await self.say("PUT", "/system/functions", body)
        if code == 404:
            code, text = await self.say("POST", "/system/functions", body)
        assert code == 202, text
        fleet = self.gateway.fleet(f"{name}.{body['namespace']}")

        async def is_prepared():
            return not fleet.rollout.preparing and "environment" not in fleet.status

        await eventually(is_prepared)

    async def call(self, name: str, text: str = "hi", namespace: str = ""):
        return await self.say_text(f"/function/{name}.{namespace or self.namespace}", text)

    async def say_text(self, path: str, text: str):
        async with self.client.post(self.url + path, data=text.encode()) as answer:
            return answer.status, await answer.text()

    async def pods(self, name: str, namespace: str = "") -> list[str]:
        found = await self.api.list(
            PODS.path(namespace or self.namespace), lambda pod: pod["metadata"], label_selector=f"faas_function={name}"
        )
        return [one["name"] for one in found.items if "deletionTimestamp" not in one]

    async def describe(self, name: str):
        code, text = await self.say("GET", f"/system/function/{name}?namespace={self.namespace}")
        assert code == 200, text
        return json.loads(text)

    async def remove(self, name: str, namespace: str = "") -> None:
        where = namespace or self.namespace
        code, _ = await self.say("DELETE", "/system/functions", {"functionName": name, "namespace": where})
        assert code in (202, 404)

        async def is_gone():
            found = await self.api.list(PODS.path(where), lambda pod: pod, label_selector=f"faas_function={name}")
            return not found.items

        await eventually(is_gone)


@asynccontextmanager
async def providing(cluster, state):
    """A provider's life over a cluster that runs; its end is a polite one."""
    settings = ProviderSettings(state=str(state), insecure_registries=getattr(cluster, "insecure", ()))
    async with cluster.client() as api, opened(api, settings) as (gateway, _):
        stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
        with listen("127.0.0.1", 0) as listener:
            serving = asyncio.create_task(run_gateway(gateway, None, listener, stop, ready.set_result))
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as client:
                try:
                    yield Provider(cluster, api, gateway, await ready, client, stop)
                finally:
                    stop.set()
                    await serving


@asynccontextmanager
async def function_of(cluster, state):
    """A provider and a name for a function of this test alone, which is gone afterwards."""
    name = f"fn-{secrets.token_hex(3)}"
    async with cluster.running(), providing(cluster, state) as provider:
        try:
            yield provider, name
        finally:
            await provider.remove(name)


class Load:
    """Requests one after another in some lanes, until it is told to end; what came back is counted."""

    def __init__(self, provider: Provider, name: str, lanes: int = 4) -> None:
        self.answers: Counter = Counter()
        self._ends = asyncio.Event()
        self._tasks = [asyncio.create_task(self._lane(provider, name)) for _ in range(lanes)]

    async def _lane(self, provider: Provider, name: str) -> None:
        while not self._ends.is_set():
            try:
                self.answers[await provider.call(name)] += 1
            except aiohttp.ClientError as error:
                self.answers[type(error).__name__] += 1

    async def reaches(self, count: int) -> None:
        async def enough():
            return sum(self.answers.values()) >= count

        await eventually(enough)

    async def end(self) -> Counter:
        self._ends.set()
        await asyncio.gather(*self._tasks)
        return self.answers


class ProviderContract:
    def test_a_function_is_deployed_called_scaled_and_removed_as_faas_cli_does_it(self, kube, state_dir):
        async def scenario():
            async with function_of(kube, state_dir) as (provider, name):
                code, _ = await provider.say("PUT", "/system/functions", provider.body(name))
                assert code == 404  # then faas-cli deploys anew
                await provider.deploy(name, envVars={"GREETING": "hello"}, labels={"team": "ml"})
                assert await provider.call(name) == (200, "hello hi")
                (pod,) = await provider.pods(name)
                told = await provider.describe(name)
                assert (told["replicas"], told["availableReplicas"], told["labels"]) == (1, 1, {"team": "ml"})
                code, text = await provider.say("GET", f"/system/functions?namespace={provider.namespace}")
                assert name in [one["name"] for one in json.loads(text)]
                scaled = {"serviceName": name, "replicas": 0, "namespace": provider.namespace}
                code, _ = await provider.say("POST", f"/system/scale-function/{name}", scaled)
                assert code == 202
                await eventually(lambda: _are(provider, name, 0))
                assert await provider.call(name, "again") == (200, "hello again")
                assert pod not in await provider.pods(name)
                await provider.remove(name)
                assert (await provider.call(name))[0] == 404
                with pytest.raises(NotFound):
                    await provider.api.get(CONFIG_MAPS.path(provider.namespace, record_name(name)))

        run(scenario())

    def test_two_hundred_requests_at_zero_are_all_answered_by_one_pod(self, kube, state_dir):
        async def scenario():
            async with function_of(kube, state_dir) as (provider, name):
                await provider.deploy(name, "slow", annotations={"gpufn.dev/in-flight": "8"})
                texts = [f"number {n}" for n in range(200)]
                answers = await asyncio.gather(*(provider.call(name, text) for text in texts))
                assert Counter(answers) == Counter((200, text) for text in texts)
                assert len(await provider.pods(name)) == 1

        run(scenario())

    def test_a_new_revision_takes_over_and_no_request_is_lost(self, kube, state_dir):
        async def scenario():
            async with function_of(kube, state_dir) as (provider, name):
                await provider.deploy(name, envVars={"GREETING": "old"}, annotations={"gpufn.dev/initial": "1"})
                load = Load(provider, name)
                await load.reaches(50)
                await provider.deploy(name, envVars={"GREETING": "new"}, annotations={"gpufn.dev/initial": "1"})
                await eventually(lambda: _said(load, (200, "new hi")))
                await load.reaches(sum(load.answers.values()) + 50)
                answers = await load.end()
                assert set(answers) == {(200, "old hi"), (200, "new hi")}
                await eventually(lambda: _are(provider, name, 1))

        run(scenario())

    def test_a_revision_that_cannot_start_leaves_the_one_before(self, kube, state_dir):
        async def scenario():
            async with function_of(kube, state_dir) as (provider, name):
                await provider.deploy(name, annotations={"gpufn.dev/initial": "1"})
                assert await provider.call(name) == (200, " hi")
                body = provider.body(name, annotations={"gpufn.dev/initial": "1"})
                body["limits"] = {"memory": "much"}
                code, text = await provider.say("PUT", "/system/functions", body)
                assert code == 400, text
                assert await provider.call(name) == (200, " hi")

        run(scenario())

    def test_secrets_are_what_functions_read_and_nobody_else_is_told(self, kube, state_dir):
        async def scenario():
            async with function_of(kube, state_dir) as (provider, name):
                secret = {"name": f"{name}-token", "namespace": provider.namespace, "value": "seven"}
                refused = await provider.say("POST", "/system/functions", provider.body(name, secrets=[secret["name"]]))
                assert refused[0] == 400
                assert secret["name"] in refused[1]
                assert (await provider.say("PUT", "/system/secrets", secret))[0] == 404
                assert (await provider.say("POST", "/system/secrets", secret))[0] == 202
                assert (await provider.say("POST", "/system/secrets", secret))[0] == 409
                _, text = await provider.say("GET", f"/system/secrets?namespace={provider.namespace}")
                assert {"name": secret["name"], "namespace": provider.namespace} in json.loads(text)
                assert "seven" not in text
                await provider.deploy(name, secrets=[secret["name"]])
                assert await provider.call(name, f"secret {secret['name']}") == (200, "seven")
                assert (await provider.say("PUT", "/system/secrets", {**secret, "value": "eight"}))[0] == 202
                assert (await provider.say("DELETE", "/system/secrets", secret))[0] == 202
                assert (await provider.say("DELETE", "/system/secrets", secret))[0] == 404

        run(scenario())

    def test_logs_are_told_and_followed_without_what_entrypoints_say(self, kube, state_dir):
        async def scenario():
            async with function_of(kube, state_dir) as (provider, name):
                await provider.deploy(name)
                await provider.call(name, "print one")
                (pod,) = await provider.pods(name)
                query = f"/system/logs?name={name}&namespace={provider.namespace}"

                async def is_told():
                    return '"one"' in (await provider.say("GET", query))[1]

                await eventually(is_told)
                lines = [json.loads(line) for line in (await provider.say("GET", query))[1].splitlines()]
                assert [line["text"] for line in lines] == ["loaded", "one"]
                assert {(line["name"], line["instance"]) for line in lines} == {(name, pod)}
                tail = (await provider.say("GET", f"{query}&tail=1"))[1].splitlines()
                assert [json.loads(line)["text"] for line in tail] == ["one"]
                async with provider.client.get(f"{provider.url}{query}&follow=1") as answer:
                    for text in ("loaded", "one"):
                        assert json.loads(await answer.content.readline())["text"] == text
                    await provider.call(name, "print two")
                    assert json.loads(await answer.content.readline())["text"] == "two"

        run(scenario())

    def test_what_kubectl_writes_is_a_deploy_and_what_it_deletes_is_removed(self, kube, state_dir):
        async def scenario():
            async with function_of(kube, state_dir) as (provider, name):
                await provider.deploy(name, envVars={"GREETING": "old"})
                assert await provider.call(name) == (200, "old hi")
                path = CONFIG_MAPS.path(provider.namespace, record_name(name))
                record = await provider.api.get(path)
                edited = record["data"]["deployment"].replace('"old"', '"edited"')
                await provider.api.patch(path, {"data": {"deployment": edited}})

                async def is_taken():
                    return await provider.call(name) == (200, "edited hi")

                await eventually(is_taken)
                assert (await provider.api.get(path))["data"]["revision"] == "2"
                await provider.api.delete(path)

                async def is_removed():
                    return (await provider.call(name))[0] == 404

                await eventually(is_removed)
                await eventually(lambda: _are(provider, name, 0))

        run(scenario())

    def test_what_kubectl_writes_may_ask_for_no_more_than_a_deploy(self, kube, state_dir):
        async def scenario():
            async with function_of(kube, state_dir) as (provider, name):
                foreign, path = (
                    SECRETS.path(provider.namespace, f"{name}-foreign"),
                    CONFIG_MAPS.path(provider.namespace, record_name(name)),
                )
                secret = {"type": "Opaque", "data": {"token": base64.b64encode(b"seven").decode()}}
                await provider.api.create(
                    SECRETS.path(provider.namespace), SECRETS.body(f"{name}-foreign", provider.namespace, **secret)
                )
                try:
                    await provider.deploy(name)
                    for edit, reason in (
                        ({"secrets": [f"{name}-foreign"]}, "is not one of functions"),
                        ({"annotations": {"gpufn.dev/idle": "soon"}}, "gpufn.dev/idle"),
                    ):
                        record = json.loads((await provider.api.get(path))["data"]["deployment"])
                        edited = json.dumps({**record, "secrets": [], "annotations": {}} | edit)
                        await provider.api.patch(path, {"data": {"deployment": edited}})

                        async def is_told(reason=reason):
                            status = (await provider.describe(name))["annotations"].get(STATUS_ANNOTATION, "")
                            return status.startswith("failed") and reason in status

                        await eventually(is_told)
                        assert await provider.call(name) == (200, " hi")  # the one before
                finally:
                    await provider.api.delete(foreign)

        run(scenario())

    def test_a_provider_that_ends_answers_what_came_and_the_next_one_takes_the_pods_back(self, kube, state_dir):
        async def scenario():
            name = f"fn-{secrets.token_hex(3)}"
            async with kube.running():
                async with providing(kube, state_dir) as provider:
                    await provider.deploy(name, "slow", annotations={"gpufn.dev/in-flight": "8"})
                    calls = [asyncio.create_task(provider.call(name, f"{n}")) for n in range(50)]
                    await eventually(lambda: _are(provider, name, 1))
                    provider.stop.set()
                    assert Counter(await asyncio.gather(*calls)) == Counter((200, f"{n}") for n in range(50))
                    (pod,) = await provider.pods(name)
                async with providing(kube, state_dir) as provider:
                    assert await provider.call(name) == (200, "hi")
                    assert await provider.pods(name) == [pod]
                    await provider.remove(name)

        run(scenario())

    def test_an_idle_function_goes_to_zero(self, kube, state_dir):
        async def scenario():
            async with function_of(kube, state_dir) as (provider, name):
                await provider.deploy(name, annotations={"gpufn.dev/idle": "1s"})
                assert await provider.call(name) == (200, " hi")
                await eventually(lambda: _are(provider, name, 0))

        run(scenario())


async def _are(provider: Provider, name: str, count: int) -> bool:
    return len(await provider.pods(name)) == count


async def _said(load: Load, answer) -> bool:
    return load.answers[answer] > 0
