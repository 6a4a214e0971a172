import asyncio

import pytest

from adapter.agent import node_keeper
from adapter.agent.metrics import Metrics
from adapter.agent.node_keeper import NodeKeeper
from adapter.agent.settings import AgentSettings
from adapter.cluster.resources import GPU_NODES, NODES
from adapter.settings import from_environment
from tests.fakes.api_server import FakeApiServer
from tests.fakes.cluster_objects import node
from tests.fakes.replicas import until

GPU_NODE = GPU_NODES.path(name="n1")


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(node_keeper, "_WRITE_S", 0.01)
    monkeypatch.setattr(node_keeper, "disk_bytes_per_s", lambda folder: 0.0)


def play(tmp_path, scene):
    """`scene(server, writes)` while the node is looked after; `writes()` counts those of its status."""
    settings = from_environment(AgentSettings, {"GPUFN_NODE": "n1", "GPUFN_SNAPSHOT_DIR": str(tmp_path)})

    async def played():
        server = FakeApiServer()
        async with server.serving(), server.client() as api:
            await server.put(NODES.path(name="n1"), node("n1"))
            keeper = NodeKeeper(settings, api, Metrics(), lambda: ["GPU-1"])
            running = asyncio.ensure_future(keeper.run(""))

            def writes():
                return sum(path.startswith(f"{GPU_NODE}/status") for _, path in server.requests)

            try:
                await until(writes)
                await asyncio.wait_for(scene(server, writes), 30)
            finally:
                running.cancel()

    asyncio.run(played())


def test_what_does_not_change_is_written_once(tmp_path, monkeypatch):
    looks, look = [], node_keeper.node.status_of
    monkeypatch.setattr(node_keeper.node, "status_of", lambda *a, **k: looks.append(1) or look(*a, **k))

    async def scene(server, writes):
        assert [gpu["uuid"] for gpu in server.objects[f"{GPU_NODE}/status"]["status"]["gpus"]] == ["GPU-1"]
        await until(lambda: len(looks) > 5)
        assert writes() == 1

    play(tmp_path, scene)


def test_one_that_somebody_deleted_comes_again(tmp_path, monkeypatch):
    monkeypatch.setattr(node_keeper, "_AGAIN_S", 0.1)

    async def scene(server, writes):
        await server.remove(GPU_NODE)
        await until(lambda: GPU_NODE in server.objects)

    play(tmp_path, scene)
