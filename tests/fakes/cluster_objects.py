"""Kubernetes objects as tests need them, as the API says them."""

from __future__ import annotations

from adapter.cluster.resources import GPU_NODES, NAMESPACES, NODES, PODS
from adapter.controller.cluster_view import ClusterView

GPU = "nvidia.com/gpu"


def node(name, gpus=8, model="NVIDIA-A100-SXM4-80GB", **spec):
    labels = {"kubernetes.io/hostname": name}
    if gpus:
        labels |= {"nvidia.com/gpu.product": model, "nvidia.com/gpu.memory": "81920"}
    allocatable = {"cpu": "64", "memory": "512Gi", "pods": "110", **({GPU: str(gpus)} if gpus else {})}
    status = {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True"}]}
    return NODES.body(name, metadata={"labels": labels}, spec=spec, status=status)


def gpu_node(name, snapshots=(), restores=True, due=()):
    """`due`: pods, as ``namespace/name``."""
    seen = [{"name": snapshot, "bytes": 10**9} for snapshot in snapshots]
    status = {"snapshots": seen, "diskBytesPerSecond": 2e9, "restore": {"works": restores}}
    status["snapshotsDue"] = [dict(zip(("namespace", "pod"), each.split("/"), strict=True)) for each in due]
    return GPU_NODES.body(name, status=status)


def function_pod(name="fn", namespace="team", gpus=1, annotations=None, node_name="", phase="Pending", **labels):
    container = {"name": "user-container", "image": "fn", "resources": {"limits": {GPU: str(gpus)}} if gpus else {}}
    return PODS.body(
        name,
        namespace,
        metadata={"labels": {"gpufn.dev/function": name, **labels}, "annotations": annotations or {}},
        spec={"containers": [container], **({"nodeName": node_name} if node_name else {})},
        status={"phase": phase},
    )


def namespace(name, **labels):
    return NAMESPACES.body(name, metadata={"labels": labels})


class View(ClusterView):
    """Of a cluster that tests say, without an API server."""

    def __init__(self, *objects, ready=""):
        super().__init__(None)
        self.ready = ready
        caches = {"Node": self.nodes, "GpuNode": self.gpu_nodes, "Namespace": self.namespaces}
        for value in objects:
            cache = caches[value["kind"]]
            cache._set(value["metadata"]["name"], cache._project(value))

    def why_not(self):
        return self.ready
