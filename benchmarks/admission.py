"""How long the pod webhook thinks: `admission_p99_ms`, in process at 1,000 nodes with 500 snapshots each.

From a review's bytes to its answer's bytes: reading, placing on 1,000 nodes, patching, promising, and making anew what
the last promise changed. Between two reviews the pod before gets its node, as its cluster would tell. The cluster is
objects in memory, read by the real caches; what TLS and the API server add is `admission_tls_p99_ms`, on a cluster.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from adapter.cluster.api import Api, Listing
from adapter.cluster.resources import GPU_NODES, NAMESPACES, NODES, PODS
from adapter.controller.admission import Admission, Review
from adapter.controller.cluster_view import ClusterView
from adapter.keys import ADMITTED_ANNOTATION, NVIDIA_GPU, SNAPSHOTS_LABEL
from benchmarks.results_file import Bar

if TYPE_CHECKING:
    from benchmarks.__main__ import Options

NODE_COUNT, SNAPSHOTS, FUNCTIONS, REVIEWS = 1000, 500, 5000, 2000
NAMESPACE = "team-a"
TAINT = {"key": NVIDIA_GPU, "value": "present", "effect": "NoSchedule"}


class Model(NamedTuple):
    """What a node has, as GPU Feature Discovery says it."""

    product: str
    memory_mib: int
    gpus: int
    compute: tuple[int, int]


MODELS = (
    Model("NVIDIA-H100-80GB-HBM3", 81559, 8, (9, 0)),
    Model("NVIDIA-A100-SXM4-40GB", 40960, 8, (8, 0)),
    Model("NVIDIA-L4", 23034, 4, (8, 9)),
    Model("Tesla-T4", 15360, 1, (7, 5)),
)


def run(options: Options) -> Iterable[Bar]:
    rounds = [asyncio.run(_measure(REVIEWS if options.runs >= 10 else 200, seed)) for seed in range(3)]
    tails = [quantile(taken, 0.99) for taken in rounds]
    yield Bar.of("admission_p99_ms", statistics.median(tails), "ms", tails)
    yield Bar.of("admission_p50_ms", statistics.median(statistics.median(taken) for taken in rounds), "ms")


def quantile(taken: list[float], share: float) -> float:
    return sorted(taken)[int(share * len(taken))]


async def _measure(reviews: int, seed: int) -> list[float]:
    """Milliseconds of each review."""
    chance = random.Random(seed)  # noqa: S311  # the same each time, not secret
    cluster = _Cluster(chance)
    view = ClusterView(cast("Api", cluster))
    watching = asyncio.ensure_future(view.run())
    await asyncio.gather(*(informer.synced.wait() for informer in view.informers))
    admission = Admission(view)
    gc.collect()
    gc.freeze()  # as a server does when its caches are full
    taken = []
    for number in range(reviews):
        body = review(number, chance)
        began = time.perf_counter_ns()
        answer = admission.pod(Review.parse(body))
        said = json.dumps(answer.to_json()).encode()
        taken.append((time.perf_counter_ns() - began) / 1e6)
        assert answer.outcome == "patched", said
        cluster.bind(number, answer.operations, chance)
        await asyncio.sleep(0)  # the caches hear of it
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    gc.unfreeze()
    return taken


def review(number: int, chance: random.Random) -> bytes:
    """One of every kind of question, as the API server asks it of a Knative pod."""
    function = f"fn-{chance.randrange(FUNCTIONS)}"
    annotations = chance.choice(
        (
            {},
            {"gpufn.dev/models": "h100,a100"},
            {"gpufn.dev/models": "l4,t4", "gpufn.dev/spot": "prefer"},
            {"gpufn.dev/memory": "16Gi", "gpufn.dev/compute": ">= 8.0"},
        )
    )
    limits = {NVIDIA_GPU: chance.choice(("1", "1", "1", "2", "4"))}
    names = ("PORT", "K_REVISION", "K_CONFIGURATION", "K_SERVICE", *(f"SETTING_{n}" for n in range(20)))
    containers = [
        {
            "name": "user-container",
            "image": f"registry.example/{function}@sha256:{number:064x}",
            "env": [{"name": name, "value": "value"} for name in names],
            "resources": {"limits": {**limits, "memory": "4Gi"}, "requests": {"cpu": "2"}},
        },
        {
            "name": "queue-proxy",
            "image": "registry.example/queue",
            "env": [{"name": f"QUEUE_{n}", "value": "x"} for n in range(60)],
            "resources": {},
        },
    ]
    labels = {"serving.knative.dev/revision": f"{function}-00001", "serving.knative.dev/service": function}
    pod = PODS.body(
        function, NAMESPACE, metadata={"labels": labels, "annotations": annotations}, spec={"containers": containers}
    )
    request = {"uid": f"{number}", "namespace": NAMESPACE, "operation": "CREATE", "object": pod}
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}).encode()


def node_labels(model: Model, *, is_spot: bool) -> dict[str, str]:
    """About as many as a cloud's node has."""
    return {
        "nvidia.com/gpu.product": model.product,
        "nvidia.com/gpu.memory": str(model.memory_mib),
        "nvidia.com/gpu.compute.major": str(model.compute[0]),
        "nvidia.com/gpu.compute.minor": str(model.compute[1]),
        "karpenter.sh/capacity-type": "spot" if is_spot else "on-demand",
        **{f"example.com/label-{n}": "value" for n in range(40)},
    }


def agent_status(chance: random.Random) -> dict[str, Any]:
    """What the agent of a node with many snapshots writes."""
    seen = [
        {
            "name": f"{NAMESPACE}/fn-{function}.{NAMESPACE}",
            "key": f"{chance.getrandbits(256):064x}",
            "bytes": chance.randrange(10**8, 10**10),
            "usedAt": "2026-01-01T00:00:00Z",
        }
        for function in chance.sample(range(FUNCTIONS), SNAPSHOTS)
    ]
    return {"snapshots": seen, "diskBytesPerSecond": 2e9, "restore": {"works": True}}


class _Cluster:
    """An API whose objects are here: what the caches ask of `adapter.cluster.api.Api`, and no more."""

    def __init__(self, chance: random.Random) -> None:
        nodes, gpu_nodes = [], []
        for number in range(NODE_COUNT):
            name, model = f"node-{number:04}.example.internal", chance.choice(MODELS)
            nodes.append(_node(name, model, is_spot=number % 5 == 0))
            gpu_nodes.append(GPU_NODES.body(name, status=agent_status(chance)))
        self.names = [node["metadata"]["name"] for node in nodes]
        self._objects = {
            NODES.path(): nodes,
            GPU_NODES.path(): gpu_nodes,
            NAMESPACES.path(): [NAMESPACES.body(NAMESPACE, metadata={"labels": {SNAPSHOTS_LABEL: "enabled"}})],
        }
        self._bound: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def bind(self, number: int, operations: Iterable[Any], chance: random.Random) -> None:
        """The scheduler's decision, mostly for one of the nodes that were preferred; a pod of ten ends at once."""
        said = {operation["path"].rpartition("/")[2]: operation.get("value") for operation in operations}
        admitted = said.get(ADMITTED_ANNOTATION.replace("/", "~1"), "")
        pod = PODS.body(
            f"pod-{number}",
            NAMESPACE,
            metadata={"resourceVersion": str(number + 2), "annotations": {ADMITTED_ANNOTATION: admitted}},
            spec={
                "nodeName": chance.choice(self.names),
                "containers": [{"resources": {"limits": {NVIDIA_GPU: "1", "cpu": "1"}}}],
            },
            status={"phase": "Running"},
        )
        self._bound.put_nowait(pod)

    async def list(self, path: str, project: Callable[[dict[str, Any]], Any], **_: object) -> Listing[Any]:
        made = (project(value) for value in self._objects.get(path, ()))
        return Listing([value for value in made if value is not None], "1")

    async def watch(self, path: str, *_: object, **__: object) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        while path == PODS.path():
            yield "ADDED", await self._bound.get()
        await asyncio.Event().wait()


def _node(name: str, model: Model, *, is_spot: bool) -> dict[str, Any]:
    gpus = model.gpus
    status = {
        "allocatable": {"cpu": str(8 * gpus), "memory": f"{64 * gpus}Gi", "pods": "110", NVIDIA_GPU: str(gpus)},
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    labels = {"kubernetes.io/hostname": name, **node_labels(model, is_spot=is_spot)}
    return NODES.body(name, metadata={"labels": labels}, spec={"taints": [TAINT]}, status=status)
