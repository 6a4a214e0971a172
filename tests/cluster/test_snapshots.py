"""The controller has snapshots taken: on a real API server, with the node's agent and kubelet played by the test."""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta

import pytest

from adapter.cluster.api import Api
from adapter.cluster.credentials import Credentials
from adapter.cluster.events import EventRecorder
from adapter.cluster.resources import EVENTS, GPU_NODES, NETWORK_POLICIES, PODS
from adapter.controller.cluster_view import ClusterView
from adapter.controller.snapshot_taker import SnapshotTaker
from adapter.errors import NotFound
from adapter.keys import SNAPSHOTS_LABEL

WAIT_S = 60
NODE = "node-a"


@pytest.fixture
def place(control_plane, repository):
    """A namespace that keeps snapshots."""
    for name in ("gpunode", "priority"):
        control_plane.kubectl("apply", "-f", str(repository / f"manifests/base/{name}.yaml"))
    control_plane.kubectl("wait", "crd/gpunodes.gpufn.dev", "--for=condition=Established", f"--timeout={WAIT_S}s")
    name = f"test-{uuid.uuid4().hex[:8]}"
    control_plane.make_namespace(name, {SNAPSHOTS_LABEL: "enabled"})
    control_plane.apply([{"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}])
    yield name
    control_plane.kubectl("delete", "namespace", name, "--wait=false")
    control_plane.kubectl("delete", "gpunode", NODE, "--ignore-not-found")
    control_plane.kubectl("delete", "node", NODE)


def function_pod(name, namespace, node=NODE, **annotations):
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"gpufn.dev/function": "embed"},
            "annotations": {"gpufn.dev/snapshot": "on", **annotations},
        },
        "spec": {"nodeName": node, "containers": [{"name": "fn", "image": "embed"}]},
    }


@asynccontextmanager
async def taking(cluster):
    """A leader's controller, with nothing to do but this."""
    async with Api(Credentials(cluster.kubeconfig)) as api:
        view = ClusterView(api)
        taker = SnapshotTaker(api, view, EventRecorder(api, "controller"))
        caches = (*view.informers, taker.takings)
        keys: asyncio.Queue[str] = asyncio.Queue()
        taker.start(keys.put_nowait)

        async def work():
            await asyncio.gather(*(cache.synced.wait() for cache in caches))
            while True:
                await taker.reconcile(await keys.get())

        tasks = [asyncio.ensure_future(run) for run in (*(cache.run() for cache in caches), work())]
        try:
            yield api
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert [end for end in ended if not isinstance(end, asyncio.CancelledError)] == []


async def until(look):
    """What `look` finds, once it finds something."""
    for _ in range(10 * WAIT_S):
        if found := await look():
            return found
        await asyncio.sleep(0.1)
    raise AssertionError("it did not come to that")


async def say_due(api, *pods):
    """As its node's agent does."""
    with suppress(NotFound):
        await api.delete(GPU_NODES.path(name=NODE))
    await api.create(GPU_NODES.path(), GPU_NODES.body(NODE))
    due = [{"namespace": namespace, "pod": pod} for namespace, pod in pods]
    await api.patch(GPU_NODES.path(name=NODE, part="status"), {"status": {"snapshotsDue": due}})


async def taken_in(api, namespace):
    found = await api.list(PODS.path(namespace), dict, label_selector="gpufn.dev/task=snapshot")
    return found.items


async def gone(api, pod):
    return pod["metadata"]["uid"] not in [item["metadata"]["uid"] for item in await taken_in(api, namespace_of(pod))]


def namespace_of(pod):
    return pod["metadata"]["namespace"]


async def end(api, pod, phase, message):
    """As a kubelet does, two minutes ago."""
    finished = datetime.fromisoformat(pod["metadata"]["creationTimestamp"].replace("Z", "+00:00")) - timedelta(
        minutes=2
    )
    state = {"exitCode": 0, "finishedAt": finished.strftime("%Y-%m-%dT%H:%M:%SZ"), "message": message}
    status = {"name": "snapshot", "state": {"terminated": state}, "image": "", "imageID": "", "ready": False,
              "restartCount": 0}  # fmt: skip
    path = PODS.path(namespace_of(pod), pod["metadata"]["name"], "status")
    await api.patch(path, {"status": {"phase": phase, "containerStatuses": [status]}})


async def notes(api, namespace):
    found = await api.list(EVENTS.path(namespace), dict)
    return {item["reason"]: item["note"] for item in found.items if item["reason"].startswith("Snapshot")}


def test_a_snapshot_that_is_due_is_taken_told_and_cleared_away(control_plane, place):
    async def scene():
        async with taking(control_plane) as api:
            await api.create(PODS.path(place), function_pod("embed-1", place))
            await say_due(api, (place, "embed-1"))
            (pod,) = await until(lambda: taken_in(api, place))
            assert (await api.list(NETWORK_POLICIES.path(place), dict)).items[0]["metadata"][
                "name"
            ] == "gpufn-snapshot-pods"
            said = {"state": "published", "key": "k", "bytes": 2**20, "seconds": 2.0}
            await end(api, pod, "Succeeded", json.dumps(said))
            await until(lambda: notes(api, place))
            await say_due(api)
            await until(lambda: gone(api, pod))
            assert await notes(api, place) == {
                "SnapshotTaken": f"Took the snapshot {place}/embed.{place} on {NODE}: 1.0Mi in 2.00s."
            }

    asyncio.run(scene())


def test_one_that_failed_is_told_and_not_tried_again(control_plane, place):
    async def scene():
        async with taking(control_plane) as api:
            await api.create(PODS.path(place), function_pod("embed-1", place))
            await say_due(api, (place, "embed-1"))
            (pod,) = await until(lambda: taken_in(api, place))
            await end(api, pod, "Failed", json.dumps({"state": "failed", "code": "no-rights", "reason": "Refused."}))
            told = await until(lambda: notes(api, place))
            assert "Refused. [no-rights]" in told["SnapshotNotTaken"]
            await api.create(PODS.path(place), function_pod("embed-2", place, **{"gpufn.dev/in-flight": "2"}))
            await say_due(api, (place, "embed-1"), (place, "embed-2"))
            await say_due(api, (place, "embed-2"))
            assert [item["metadata"]["uid"] for item in await taken_in(api, place)] == [pod["metadata"]["uid"]]

    asyncio.run(scene())


def test_where_such_pods_are_not_allowed_the_function_is_told_why(control_plane, place):
    control_plane.kubectl("label", "namespace", place, "pod-security.kubernetes.io/enforce=baseline")
    pod = function_pod("embed-1", place)

    async def scene():
        async with taking(control_plane) as api:
            await api.create(PODS.path(place), pod)
            await say_due(api, (place, "embed-1"))
            told = await until(lambda: notes(api, place))
            assert "not allowed there" in told["SnapshotNotTaken"]
            assert "PodSecurity" in told["SnapshotNotTaken"]
            assert await taken_in(api, place) == []

    asyncio.run(scene())


def test_an_agent_has_none_taken_of_what_runs_elsewhere(control_plane, place):
    async def scene():
        async with taking(control_plane) as api:
            await api.create(PODS.path(place), function_pod("another", place, node="node-b"))
            await api.create(PODS.path(place), function_pod("embed-1", place))
            await say_due(api, (place, "another"), (place, "embed-1"))
            (pod,) = await until(lambda: taken_in(api, place))
            assert pod["metadata"]["annotations"]["gpufn.dev/for-pod"] == "embed-1"

    asyncio.run(scene())
