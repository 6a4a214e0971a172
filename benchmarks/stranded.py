"""GPUs left on partly used nodes: `stranded_gpus_over_default`, `stranded_gpus_over_binpack`.

The pods of a real GPU cluster (`benchmarks.openb`), one after the other, on 1,000 nodes that KWOK keeps, placed by a real
kube-scheduler in three ways: as it is by default, as it packs bins (its profile MostAllocated over CPU, memory and GPUs),
and by default with the terms that the pod webhook gives, by the webhook's own code over its own caches of this cluster.
The first 4,000 come, and nobody leaves. Who asks for a part of a GPU gets one, and who names models has them
required, in all three; a pod that fits nowhere is taken away and counted. After each hundred pods the GPUs are counted
that are free on nodes on which others are used; the mean of these counts is compared.

A list of models is an order of preference to us, and none in the trace: only a single one is asked for by annotation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter.cluster.api import Api, Pace
from adapter.cluster.credentials import Credentials
from adapter.cluster.informer import Informer
from adapter.cluster.resources import PODS
from adapter.controller.admission import Admission, Review
from adapter.controller.cluster_view import ClusterView
from adapter.errors import NotFound
from adapter.keys import DOMAIN, FUNCTION_LABEL, NVIDIA_GPU
from benchmarks.openb import TraceNode, TracePod, read_nodes, read_pods
from benchmarks.results_file import Bar
from benchmarks.scheduler_model import Fleet

if TYPE_CHECKING:
    from benchmarks.__main__ import Options
    from tests.testbed.cluster import Cluster

_GPU_NODES = Path(__file__).parents[1] / "manifests" / "base" / "gpunode.yaml"
ARMS = ("default", "binpack", "ours")
NAMESPACE = "openb"
_IN_FLIGHT = 16
"""Pods that wait for the scheduler at once."""
_PODS = 4000
"""Of 8,152: with these more than half of the GPUs are used. With many more, pods fit nowhere whoever places them, and
what counts is what is left. All of them take an hour on two cores that others share."""
_SAMPLE_EVERY = 100
_NODES_AT_ONCE = 100
_TAINTS = "--output=jsonpath={.items[*].spec.taints[*].key}"
_PACKED = ("cpu", "memory", NVIDIA_GPU)
_DEFAULT = "default-scheduler"
_MODEL_LABEL = "nvidia.com/gpu.product"


@dataclass(frozen=True, slots=True)
class Sample:
    """After so many pods: what is kept of a run, in this order."""

    pods: int
    used_gpus: int
    stranded_gpus: int
    refused: int


def run(options: Options) -> Iterable[Bar]:
    from tests.testbed.cluster import Cluster
    from tests.testbed.machines import wait_until

    nodes, pods = read_nodes(), read_pods()
    pods = pods[: _PODS if options.runs >= 10 else options.runs * _SAMPLE_EVERY]
    samples: dict[str, list[Sample]] = {}
    with Cluster() as cluster, _scheduler(cluster):
        cluster.kubectl("apply", "--filename=-", stdin=_GPU_NODES.read_text(encoding="utf-8"))
        cluster.make_namespace(NAMESPACE)
        ordered, names = _made(cluster, nodes)
        wait_until("nodes that are open", lambda: "not-ready" not in cluster.kubectl("get", "nodes", _TAINTS), 300)
        for name in ("kube-controller-manager", "kwok"):  # nobody is to say that nodes are gone, nor that pods run
            cluster.components[name].stop()
        for arm in ARMS:
            replay = _Replay(cluster, arm, Fleet(ordered), {name: at for at, name in enumerate(names)})
            samples[arm] = asyncio.run(replay.run(pods))
            mean = statistics.mean(sample.stranded_gpus for sample in samples[arm])
            print(f"… {arm}: mean {mean:.1f}, {samples[arm][-1]}", file=sys.stderr, flush=True)
            cluster.kubectl("delete", "--raw", f"{PODS.path(NAMESPACE)}?gracePeriodSeconds=0", timeout_s=1200)
    means = {arm: statistics.mean(sample.stranded_gpus for sample in taken) for arm, taken in samples.items()}
    for other in ("default", "binpack"):
        yield Bar.of(
            f"stranded_gpus_over_{other}", means["ours"] / means[other], "ratio", [round(m, 2) for m in means.values()]
        )
    for arm, taken in samples.items():
        yield Bar.of(f"stranded_gpus_{arm}", means[arm], "GPUs", [astuple(sample) for sample in taken])


@contextmanager
def _scheduler(cluster: Cluster) -> Iterator[None]:
    """Another kube-scheduler instead of the cluster's, as quick to bind as it can, with a profile for each way."""
    cluster.components["kube-scheduler"].stop()
    site = cluster.site
    fit = {"type": "MostAllocated", "resources": [{"name": name, "weight": 1} for name in _PACKED]}
    packing = {
        "schedulerName": "binpack",
        "pluginConfig": [{"name": "NodeResourcesFit", "args": {"scoringStrategy": fit}}],
    }
    settings = {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": False},
        "clientConnection": {"kubeconfig": str(site.kubeconfig("system:kube-scheduler")), "qps": 1000, "burst": 1000},
        "profiles": [{"schedulerName": _DEFAULT}, packing],
    }
    words = [str(site.programs.kubernetes / "kube-scheduler"), f"--config={site.write('benchmark.json', settings)}"]
    with ExitStack() as stack:
        log = stack.enter_context((cluster.folder / "logs" / "benchmark-scheduler.log").open("wb"))
        process = stack.enter_context(subprocess.Popen([*words, "--secure-port=0"], stdout=log, stderr=log))
        stack.callback(process.kill)
        yield


class _Replay:
    """One way, in a cluster of its own."""

    def __init__(self, cluster: Cluster, arm: str, fleet: Fleet, places: Mapping[str, int]) -> None:
        self._cluster, self._arm = cluster, arm
        self._fleet, self._places = fleet, places
        self._asked: dict[str, tuple[TracePod, asyncio.Future[str]]] = {}
        self._samples: list[Sample] = []
        self._done = self._refused = 0

    async def run(self, pods: Iterable[TracePod]) -> list[Sample]:
        self._room = asyncio.Semaphore(_IN_FLIGHT)
        async with Api(Credentials(self._cluster.kubeconfig), pace=Pace(10_000, 10_000)) as self._api:
            found: Informer[str] = Informer(self._api, PODS.path(NAMESPACE), _outcome)
            found.on_change(self._heard)
            view = ClusterView(self._api)
            self._admission = Admission(view)
            watching = [asyncio.ensure_future(task) for task in (found.run(), view.run())]
            await asyncio.gather(*(informer.synced.wait() for informer in (found, *view.informers)))
            placing = []
            for pod in pods:
                await self._room.acquire()
                placing.append(asyncio.ensure_future(self._place(pod)))
            await asyncio.gather(*placing)
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        return self._samples

    def _heard(self, key: str, _old: str | None, new: str | None) -> None:
        pod, outcome = self._asked.get(key.partition("/")[2], (None, None))
        if pod and outcome and new and not outcome.done():
            outcome.set_result(new)

    async def _place(self, pod: TracePod) -> None:
        outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._asked[pod.name] = pod, outcome
        try:
            await self._api.create(PODS.path(NAMESPACE), self._made_pod(pod))
            node = await outcome
            if node == _NOWHERE:
                self._refused += 1
                with contextlib.suppress(NotFound):
                    await self._api.delete(PODS.path(NAMESPACE, pod.name), grace_s=0)
            else:
                self._fleet.take(self._places[node], pod)
        finally:
            del self._asked[pod.name]
            self._room.release()
        self._done += 1
        if self._done % _SAMPLE_EVERY == 0:
            fleet = self._fleet
            self._samples.append(Sample(self._done, fleet.used, fleet.stranded, self._refused))

    def _made_pod(self, pod: TracePod) -> dict[str, Any]:
        body = _pod(pod, "binpack" if self._arm == "binpack" else _DEFAULT, is_ours=self._arm == "ours")
        if self._arm != "ours":
            return body
        import jsonpatch

        request = {"uid": pod.name, "namespace": NAMESPACE, "operation": "CREATE", "object": body}
        review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
        answer = self._admission.pod(Review.parse(json.dumps(review).encode()))
        assert answer.outcome in {"patched", "refused"}, answer
        patched: dict[str, Any] = jsonpatch.apply_patch(body, list(answer.operations))
        return patched


_NOWHERE = "-"


def _outcome(pod: Mapping[str, Any]) -> str | None:
    """The node that a pod got; `_NOWHERE` where the scheduler found none; None while it has not looked."""
    if node := pod["spec"].get("nodeName"):
        return str(node)
    conditions = pod.get("status", {}).get("conditions") or ()
    return _NOWHERE if any(c.get("reason") == "Unschedulable" for c in conditions) else None


def _made(cluster: Cluster, nodes: Sequence[TraceNode]) -> tuple[list[TraceNode], list[str]]:
    """The trace's nodes, made by KWOK, those of one kind together; and the name that each has there."""

    def kind(node: TraceNode) -> tuple[str, int, int, int]:
        return node.model, node.gpus, node.cpu_milli // 1000, node.memory_mib

    ordered = sorted(nodes, key=kind)
    names: list[str] = []
    for (model, gpus, cpus, memory_mib), group in groupby(ordered, key=kind):
        left = len(list(group))
        while left:
            count = min(left, _NODES_AT_ONCE)
            left -= count
            names += cluster.add_kwok_nodes(
                count,
                gpus=gpus,
                cpus=cpus,
                memory=f"{memory_mib}Mi",
                labels={_MODEL_LABEL: model},
                prefix=f"node-{len(names)}",
            )
    return ordered, names


def _pod(pod: TracePod, scheduler: str, *, is_ours: bool) -> dict[str, Any]:
    amounts = {"cpu": f"{pod.cpu_milli}m", "memory": f"{pod.memory_mib}Mi"}
    limits = {NVIDIA_GPU: str(pod.gpus)} if pod.gpus else {}
    spec: dict[str, Any] = {
        "schedulerName": scheduler,
        "automountServiceAccountToken": False,
        "containers": [
            {"name": "main", "image": "none", "resources": {"requests": {**amounts, **limits}, "limits": limits}}
        ],
    }
    annotations = {f"{DOMAIN}/max": "1"} if is_ours else {}
    if is_ours and len(pod.models) == 1:
        annotations[f"{DOMAIN}/models"] = pod.models[0]
    elif pod.models:
        models = {"key": _MODEL_LABEL, "operator": "In", "values": list(pod.models)}
        required = {"nodeSelectorTerms": [{"matchExpressions": [models]}]}
        spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    metadata = {"labels": {FUNCTION_LABEL: pod.name}, "annotations": annotations}
    return PODS.body(pod.name, NAMESPACE, metadata=metadata, spec=spec)
