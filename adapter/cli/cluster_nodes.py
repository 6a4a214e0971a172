"""What a cluster has, asked for once: its nodes as placement sees them, who holds their GPUs, their agents."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.inventory import held_by_node, is_gpu, pod_requests, read_node, takes_snapshot
from adapter.cluster.json_parts import object_in, objects_in
from adapter.cluster.resources import GPU_NODES, NODES, PODS
from adapter.errors import NotFound
from adapter.keys import FUNCTION_LABEL, KNATIVE_SERVICE_LABEL, OPENFAAS_LABEL, SNAPSHOT_OF_ANNOTATION
from adapter.policy.placement import Node

AGENTS_NAMESPACE = "gpufn-agents"
_AGENTS = "app.kubernetes.io/name=gpufn,app.kubernetes.io/component=agent"
_NOT_OVER = "status.phase!=Succeeded,status.phase!=Failed"


@dataclass(frozen=True, slots=True)
class Holding:
    """A pod that holds `units` of a GPU resource. `function` is empty where it is none of ours. One that takes a snapshot
    (`takes`, else empty) gives way to any function: what it holds counts as free."""

    pod: str
    namespace: str
    function: str
    resource: str
    units: int
    takes: str = ""


@dataclass(frozen=True, slots=True)
class Agent:
    """The agent's pod on a node."""

    pod: str
    is_ready: bool
    started_at: str


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node. `said` is the status of its `GpuNode`; empty where its agent has written none."""

    node: Node
    held: tuple[Holding, ...] = ()
    agent: Agent | None = None
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_of_interest(self) -> bool:
        """It has GPUs, or an agent looks after it."""
        return bool(self.node.offers or self.said)


async def read_nodes(api: Api, *, without: str = "") -> list[NodeFacts]:
    """Every node, in order of their names. `without`: UID of a pod that is to count as not being there."""
    nodes, pods, gpu_nodes, agents = await asyncio.gather(
        api.list(NODES.path(), dict),
        api.list(PODS.path(), lambda pod: None if pod["metadata"]["uid"] == without else pod, field_selector=_NOT_OVER),
        _gpu_nodes(api),
        api.list(PODS.path(AGENTS_NAMESPACE), dict, label_selector=_AGENTS),
    )
    held = held_by_node(pods.items)
    holdings = _holdings(pods.items)
    looked_after = {object_in(pod, "spec").get("nodeName"): _agent(pod) for pod in agents.items}
    return sorted(
        (
            NodeFacts(
                node=read_node(node, held.get(name, {}), gpu_nodes.get(name)),
                held=tuple(holdings.get(name, ())),
                agent=looked_after.get(name),
                said=object_in(gpu_nodes.get(name, {}), "status"),
            )
            for node in nodes.items
            for name in [node["metadata"]["name"]]
        ),
        key=lambda facts: facts.node.name,
    )


async def _gpu_nodes(api: Api) -> dict[str, dict[str, Any]]:
    """By name; none where gpufn is not installed."""
    try:
        found = await api.list(GPU_NODES.path(), dict)
    except NotFound:
        return {}
    return {gpu_node["metadata"]["name"]: gpu_node for gpu_node in found.items}


def _holdings(pods: Iterable[Mapping[str, Any]]) -> dict[str, list[Holding]]:
    """By node, in order of the pods' names. Of pods that are not over."""
    found: dict[str, list[Holding]] = {}
    for pod in pods:
        metadata, node = pod["metadata"], str(object_in(pod, "spec").get("nodeName") or "")
        takes = str(object_in(metadata, "annotations").get(SNAPSHOT_OF_ANNOTATION) or "") if takes_snapshot(pod) else ""
        for resource, units in pod_requests(pod).items() if node else ():
            if is_gpu(resource) and units:
                holding = Holding(metadata["name"], metadata["namespace"], function_of(pod), resource, units, takes)
                found.setdefault(node, []).append(holding)
    return {name: sorted(of, key=lambda held: (held.namespace, held.pod)) for name, of in found.items()}


def function_of(pod: Mapping[str, Any]) -> str:
    """The name of the function whose pod it is; empty where it is nobody's."""
    labels = object_in(object_in(pod, "metadata"), "labels")
    return str(next((labels[key] for key in FUNCTION_LABELS if labels.get(key)), ""))


FUNCTION_LABELS = (KNATIVE_SERVICE_LABEL, OPENFAAS_LABEL, FUNCTION_LABEL)


def _agent(pod: Mapping[str, Any]) -> Agent:
    status = object_in(pod, "status")
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in objects_in(status, "conditions"))
    return Agent(pod["metadata"]["name"], ready, str(status.get("startTime") or ""))
