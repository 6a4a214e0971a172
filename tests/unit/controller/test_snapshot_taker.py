"""What is done of what `snapshots` decides; `tests/cluster/test_snapshots.py` does the same on a real API server."""

import asyncio

import pytest

from adapter.cluster.resources import PODS
from adapter.controller.snapshot_taker import SnapshotTaker
from adapter.controller.snapshots import taking_of
from tests.fakes.api_server import FakeApiServer
from tests.fakes.cluster_objects import View, function_pod, gpu_node, namespace

NOW_S = 1_767_225_600.0
"""2026-01-01T00:00:00Z"""
TASKS = "/api/v1/namespaces/team/pods/gpufn-snapshot-"


class Events:
    async def say(self, about, reason, message, **_):
        raise AssertionError(message)


def just_made(pod):
    return {**pod, "metadata": {**pod["metadata"], "creationTimestamp": "2026-01-01T00:00:00Z"}}


def taken(*due, pods, looks=1):
    """The pods that take snapshots, after some looks at the node, whose scheduler finds a place for none."""

    async def scene():
        server = FakeApiServer()
        async with server.serving(), server.client() as api:
            for pod in pods:
                await server.put(PODS.path("team", pod["metadata"]["name"]), pod)
            view = View(gpu_node("n1", due=due), namespace("team", **{"gpufn.dev/snapshots": "enabled"}))
            taker = SnapshotTaker(api, view, Events(), clock_s=lambda: NOW_S)
            assert taker.all_keys() == {"n1"}
            found = []
            for _ in range(looks):
                await taker.reconcile("n1")
                found = [value for path, value in server.objects.items() if path.startswith(TASKS)]
                for pod in found:
                    taker.takings._set(pod["metadata"]["name"], taking_of(just_made(pod)))
            return found

    return asyncio.run(scene())


def replica(name, node_name="n1", gpus=0):
    return function_pod(name, gpus=gpus, node_name=node_name, annotations={"gpufn.dev/snapshot": "on"})


def test_what_a_nodes_agent_says_is_due_is_taken_one_at_a_time():
    [pod] = taken("team/a", "team/b", pods=[replica("a"), replica("b")])
    assert pod["metadata"]["annotations"]["gpufn.dev/for-pod"] == "a"


def test_where_the_first_is_gone_or_runs_elsewhere_the_next_has_its_turn():
    [pod] = taken("team/a", "team/b", "team/c", pods=[replica("b", node_name="n2"), replica("c")])
    assert pod["metadata"]["annotations"]["gpufn.dev/for-pod"] == "c"


def test_while_one_waits_for_a_gpu_the_next_is_one_that_needs_none():
    replicas = [replica("a", gpus=1), replica("b", gpus=1), replica("c")]
    pods = taken("team/a", "team/b", "team/c", pods=replicas, looks=3)
    assert [pod["metadata"]["annotations"]["gpufn.dev/for-pod"] for pod in pods] == ["a", "c"]


def test_one_that_was_preempted_is_no_alarm_and_is_made_anew_when_it_is_gone():
    said = []

    class Heard:
        async def say(self, about, reason, message, *, is_warning=True):
            said.append((about["name"], reason, is_warning))

    preempted = {"phase": "Failed", "reason": "Preempting"}

    async def scene():
        server = FakeApiServer()
        async with server.serving(), server.client() as api:
            await server.put(PODS.path("team", "a"), replica("a", gpus=1))
            view = View(gpu_node("n1", due=["team/a"]), namespace("team", **{"gpufn.dev/snapshots": "enabled"}))
            taker = SnapshotTaker(api, view, Heard(), clock_s=lambda: NOW_S)
            await taker.reconcile("n1")
            [(path, first)] = [item for item in server.objects.items() if item[0].startswith(TASKS)]
            taker.takings._set("x", taking_of({**just_made(first), "status": preempted}))
            await taker.reconcile("n1")
            assert path not in server.objects
            taker.takings._set("x", None)
            await taker.reconcile("n1")
            assert server.objects[path]["metadata"]["uid"] != first["metadata"]["uid"]

    asyncio.run(scene())
    assert said == [("a", "SnapshotNotTaken", False)]


def test_one_that_waits_goes_with_its_node():
    async def scene():
        server = FakeApiServer()
        async with server.serving(), server.client() as api:
            await server.put(PODS.path("team", "a"), replica("a", gpus=1))
            view = View(gpu_node("n1", due=["team/a"]), namespace("team", **{"gpufn.dev/snapshots": "enabled"}))
            taker = SnapshotTaker(api, view, Events(), clock_s=lambda: NOW_S)
            await taker.reconcile("n1")
            [(path, waiting)] = [item for item in server.objects.items() if item[0].startswith(TASKS)]
            taker.takings._set("x", taking_of(just_made(waiting)))
            view.gpu_nodes._set("n1", None)
            await taker.reconcile("n1")
            assert path not in server.objects

    asyncio.run(scene())


def waiting(server):
    return [
        pod["metadata"]["annotations"]["gpufn.dev/for-pod"] for path, pod in server.objects.items() if TASKS in path
    ]


async def look(taker, server):
    """At the node, with every pod known that is there by then."""
    for name in list(taker.takings.snapshot()):
        taker.takings._set(name, None)
    for path, pod in server.objects.items():
        if path.startswith(TASKS):
            taker.takings._set(pod["metadata"]["name"], taking_of(just_made(pod)))
    await taker.reconcile("n1")


@pytest.mark.parametrize(("due", "waits_for"), [(["team/new"], ["new"]), (["team/new", "team/old"], ["old"])])
def test_one_of_a_revision_that_runs_no_more_waits_for_no_gpu_once_another_runs(due, waits_for):
    async def scene():
        server = FakeApiServer()
        async with server.serving(), server.client() as api:
            view = View(gpu_node("n1", due=["team/old"]), namespace("team", **{"gpufn.dev/snapshots": "enabled"}))
            taker = SnapshotTaker(api, view, Events(), clock_s=lambda: NOW_S)
            for name in ("old", "new"):
                pod = function_pod(name, node_name="n1", **{"gpufn.dev/function": "fn", "gpufn.dev/revision": name})
                await server.put(PODS.path("team", name), pod)
            await look(taker, server)
            assert waiting(server) == ["old"]
            view.gpu_nodes._set("n1", view.gpu_nodes._project(gpu_node("n1", due=due)))
            await look(taker, server)
            await look(taker, server)
            assert waiting(server) == waits_for

    asyncio.run(scene())


def test_a_change_of_what_is_due_is_noticed():
    async def scene():
        async with FakeApiServer().client() as api:
            view, changed = View(gpu_node("n1")), []
            SnapshotTaker(api, view, Events()).start(changed.append)
            view.gpu_nodes._set("n1", view.gpu_nodes._project(gpu_node("n1", due=["team/a"])))
            assert changed == ["n1"]

    asyncio.run(scene())
