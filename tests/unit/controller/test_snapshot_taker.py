"""What is done of what `snapshots` decides; `tests/cluster/test_snapshots.py` does the same on a real API server."""

import asyncio

from adapter.cluster.resources import PODS
from adapter.controller.snapshot_taker import SnapshotTaker
from tests.fakes.api_server import FakeApiServer
from tests.fakes.cluster_objects import View, function_pod, gpu_node, namespace

TASKS = "/api/v1/namespaces/team/pods/gpufn-snapshot-"


class Events:
    async def say(self, about, reason, message, **_):
        raise AssertionError(message)


def taken(*due, pods):
    """The pods that take snapshots, after one look at the node."""

    async def scene():
        server = FakeApiServer()
        async with server.serving(), server.client() as api:
            for pod in pods:
                await server.put(PODS.path("team", pod["metadata"]["name"]), pod)
            view = View(gpu_node("n1", due=due), namespace("team", **{"gpufn.dev/snapshots": "enabled"}))
            taker = SnapshotTaker(api, view, Events())
            assert taker.all_keys() == {"n1"}
            await taker.reconcile("n1")
            return [value for path, value in server.objects.items() if path.startswith(TASKS)]

    return asyncio.run(scene())


def replica(name, node_name="n1"):
    return function_pod(name, gpus=0, node_name=node_name, annotations={"gpufn.dev/snapshot": "on"})


def test_what_a_nodes_agent_says_is_due_is_taken_one_at_a_time():
    [pod] = taken("team/a", "team/b", pods=[replica("a"), replica("b")])
    assert pod["metadata"]["annotations"]["gpufn.dev/for-pod"] == "a"


def test_where_the_first_is_gone_or_runs_elsewhere_the_next_has_its_turn():
    [pod] = taken("team/a", "team/b", "team/c", pods=[replica("b", node_name="n2"), replica("c")])
    assert pod["metadata"]["annotations"]["gpufn.dev/for-pod"] == "c"


def test_a_change_of_what_is_due_is_noticed():
    async def scene():
        async with FakeApiServer().client() as api:
            view, changed = View(gpu_node("n1")), []
            SnapshotTaker(api, view, Events()).start(changed.append)
            view.gpu_nodes._set("n1", view.gpu_nodes._project(gpu_node("n1", due=["team/a"])))
            assert changed == ["n1"]

    asyncio.run(scene())
