"""The provider over a cluster of this process: its contract, and what a real one cannot be made to do at will."""

from __future__ import annotations

import json

import aiohttp
import pytest

from adapter.errors import Unavailable
from tests.contract.hosts.kubernetes import eventually
from tests.contract.openfaas.provider import HANDLERS, ProviderContract, providing, run
from tests.contract.openfaas.test_conversations import CONVERSATIONS
from tests.fakes.pods import in_this_process


@pytest.fixture
def kube(tmp_path):
    with in_this_process(tmp_path, HANDLERS) as kube:
        yield kube


class TestContract(ProviderContract):
    """Over the fake."""


# What faas-cli says --------------------------------------------------------------------------------

LEFT_OUT = frozenset({"login-wrong", "deploy-unknown-image"})
"""Steps of the recording that mean something else here: nobody is asked for a password, and what an image is its
registry says, which in this test nobody can ask."""


def test_what_faas_cli_was_recorded_to_say_is_answered_with_the_same_codes(tmp_path, state_dir, monkeypatch):
    def no_registry(*_):
        raise Unavailable("No registry.", why="There is none.")

    monkeypatch.setattr("adapter.openfaas.images._ask", no_registry)

    async def scenario(cluster):
        cluster.fake.default = cluster.fake.functions / "echo"
        async with cluster.running(), providing(cluster, state_dir) as provider:
            for path in CONVERSATIONS:
                step = path.stem.partition("-")[2]
                if step in LEFT_OUT:
                    continue
                for exchange in json.loads(path.read_text())["exchanges"]:
                    request, recorded = exchange["request"], exchange["answer"]
                    url = aiohttp.client.URL(provider.url + request["path"], encoded=True)
                    body, headers = request["body"].encode(), request["headers"]
                    async with provider.client.request(request["method"], url, data=body, headers=headers) as answer:
                        text = await answer.text()
                    assert answer.status == recorded["status"], (step, text)
                    if recorded["headers"].get("Content-Type", "").startswith("application/json"):
                        assert shape(json.loads(text)) == shape(json.loads(recorded["body"])), step
                await eventually(lambda: is_settled(provider))

    with in_this_process(tmp_path, HANDLERS) as cluster:
        run(scenario(cluster))


def shape(value):
    """Keys and types, but for what differs: how many replicas there are, and notes in annotations."""
    if isinstance(value, dict):
        counted = {"replicas", "availableReplicas", "annotations", "invocationCount"}
        return {key: shape(item) for key, item in value.items() if key not in counted}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return type(value).__name__


async def is_settled(provider) -> bool:
    fleets = provider.gateway.fleets.values()
    return all(not fleet.rollout.status and fleet.available == fleet.desired == len(fleet.members) for fleet in fleets)


def test_a_namespace_without_rights_hinders_none_but_its_own_functions(tmp_path, state_dir, monkeypatch):
    monkeypatch.setattr("adapter.openfaas.cluster_catalog._SYNC_LIMIT_S", 0.2)
    monkeypatch.setattr("adapter.hosts.kubernetes._SYNC_LIMIT_S", 0.2)

    async def scenario(cluster):
        cluster.fake.forbidden = "strange"
        async with cluster.running():
            await cluster.fake.put("/api/v1/namespaces/strange", {"metadata": {"labels": {"openfaas": "1"}}})
            async with providing(cluster, state_dir) as provider:
                assert json.loads((await provider.say("GET", "/system/namespaces"))[1]) == ["openfaas-fn", "strange"]
                await provider.deploy("fn")
                assert await provider.call("fn") == (200, " hi")
                assert provider.gateway.host.is_current
                code, text = await provider.say("POST", "/system/functions", provider.body("fn", namespace="strange"))
                assert code >= 400
                assert "forbidden in strange" in text
                await provider.remove("fn")

    with in_this_process(tmp_path, HANDLERS) as cluster:
        run(scenario(cluster))


def test_a_deploy_after_others_removed_the_function_is_what_runs(tmp_path, state_dir):
    async def scenario(cluster):
        async with cluster.running(), providing(cluster, state_dir) as provider:
            for greeting in ("one", "two", "three"):
                await provider.deploy("fn", envVars={"GREETING": greeting})
            assert await provider.call("fn") == (200, "three hi")
            cluster.fake.silent.set()  # the watch has not told yet
            await cluster.fake.remove(f"/api/v1/namespaces/{cluster.namespace}/configmaps/function-fn")
            await provider.deploy("fn", envVars={"GREETING": "anew"})
            cluster.fake.silent.clear()
            assert await provider.call("fn") == (200, "anew hi")
            await provider.remove("fn")

    with in_this_process(tmp_path, HANDLERS) as cluster:
        run(scenario(cluster))


def test_where_no_ledger_answers_a_budget_refuses_nobody(tmp_path, state_dir, caplog):
    async def scenario(cluster):
        async with cluster.running(), providing(cluster, state_dir) as provider:
            await provider.deploy("fn", annotations={"gpufn.dev/budget": "1"})
            assert await provider.call("fn") == (200, " hi")
            assert "the ledger does not tell what was held: budgets stop nobody" in caplog.messages
            await provider.remove("fn")

    with in_this_process(tmp_path, HANDLERS) as cluster:
        run(scenario(cluster))
