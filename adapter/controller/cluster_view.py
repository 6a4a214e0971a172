"""What the webhook and the controller know of the cluster, kept current by watches: nodes and what is free on them.

Everything is ready when it is asked for: a change of one node, or of a pod on it, makes that node's value anew and no
other's. Only what decisions need stays in memory.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.informer import USUAL, Informer, Rhythm
from adapter.cluster.intent import TENANT_ANNOTATION, read_intent, trimmed
from adapter.cluster.inventory import Amounts, holder, label_values, pod_requests, read_node
from adapter.cluster.json_parts import object_in, objects_in
from adapter.cluster.resources import GPU_NODES, NAMESPACES, NODES, PODS, RUNTIME_CLASSES
from adapter.controller.references import owner_and_service
from adapter.controller.reservations import Reservations
from adapter.controller.snapshots import Due, due_of
from adapter.errors import ConfigError
from adapter.keys import (
    ADMITTED_ANNOTATION,
    DOMAIN,
    FUNCTION_LABEL,
    KNATIVE_REVISION_LABEL,
    OPENFAAS_LABEL,
    PLACEMENT_ANNOTATION,
)
from adapter.policy.placement import Node

_PODS_AT_ONCE = 50
"""Of a list: a pod may have more than a megabyte."""
_SHARED = 10_000
"""Amounts that are kept to be shared: over weeks there may be any number that no pod has any more."""
_HOSTNAME = "kubernetes.io/hostname"
BUDGET_ANNOTATION = f"{DOMAIN}/budget"
_FUNCTION_LABELS = frozenset({KNATIVE_REVISION_LABEL, OPENFAAS_LABEL, FUNCTION_LABEL})


@dataclass(frozen=True, slots=True)
class Budgeted:
    """A pod whose `function` (``name.namespace``) has a budget; `about` are the objects on which people are told."""

    function: str
    limit_gpu_s: float
    about: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class PodFacts:
    """A pod that takes `amounts` of a `node`; or one of a function that has no node yet: then `waiting` is the pod.
    `mark` is what its reservation is known by, and `promised` the node that a webhook chose for it."""

    node: str
    amounts: Amounts = field(default_factory=dict)
    mark: str = ""
    waiting: Mapping[str, Any] | None = None
    promised: str = ""
    budget: Budgeted | None = None


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """What a node's agent says: as `read_node` takes it, and its snapshots apart, which are many; those that it has
    not got and should."""

    said: Mapping[str, Any]
    snapshots: Mapping[str, int]
    restores: bool
    due: tuple[Due, ...] = ()


class ClusterView:
    """Run it in a task; `why_not` says when it knows all. Nodes it gives are new values when something changed.

    `hears_promises`: what other webhooks chose for pods without a node counts as used, as what this one chose does.
    """

    def __init__(
        self,
        api: Api,
        reservations: Reservations | None = None,
        rhythm: Rhythm = USUAL,
        *,
        hears_promises: bool = True,
    ) -> None:
        self.reservations = Reservations() if reservations is None else reservations
        self.nodes: Informer[Mapping[str, Any]] = Informer(api, NODES.path(), _read_node, rhythm=rhythm)
        self.gpu_nodes: Informer[AgentFacts] = Informer(
            api, GPU_NODES.path(), _read_gpu_node, optional=True, rhythm=rhythm
        )
        self.pods: Informer[PodFacts] = Informer(
            api,
            PODS.path(),
            _PodReader(),
            field_selector="status.phase!=Succeeded,status.phase!=Failed",
            page_items=_PODS_AT_ONCE,
            rhythm=rhythm,
        )
        self.namespaces: Informer[Mapping[str, str]] = Informer(api, NAMESPACES.path(), _labels, rhythm=rhythm)
        self.runtime_classes: Informer[bool] = Informer(api, RUNTIME_CLASSES.path(), lambda _: True, rhythm=rhythm)
        self._hears_promises = hears_promises
        self._held: dict[str, Counter[str]] = {}
        self._made: dict[str, Node] = {}
        self._stale: set[str] = set()
        self._labels_stale = True
        self._inventory: tuple[Node, ...] = ()
        self._seen: Mapping[str, set[str]] = {}
        self._hostnames: Mapping[str, str] = {}
        self._restoring = self._budgeted = 0
        self.nodes.on_change(self._node_changed)
        self.gpu_nodes.on_change(self._agent_changed)
        self.pods.on_change(self._pod_changed)

    @property
    def informers(self) -> tuple[Informer[Any], ...]:
        return self.nodes, self.gpu_nodes, self.pods, self.namespaces, self.runtime_classes

    async def run(self) -> None:
        """Until it is cancelled."""
        await asyncio.gather(*(informer.run() for informer in self.informers))

    def why_not(self) -> str:
        """Why this view is not to be relied on; empty where it is. For a readiness check."""
        late = [informer.path.rsplit("/", 1)[1] for informer in self.informers if not informer.healthy]
        return f"nothing is heard of {', '.join(late)}" if late else ""

    # ------------------------------------------------------------------------------------------- what it knows

    def inventory(self) -> tuple[Node, ...]:
        """All nodes; what is promised counts as used."""
        self._stale |= self.reservations.expire()
        if self._stale:
            for name in self._stale:
                self._remake(name)
            self._stale.clear()
            self._inventory = tuple(self._made.values())
        if self._labels_stale:
            self._labels_stale = False
            self._seen = label_values(self._inventory)
            hosts = ((node.name, node.labels.get(_HOSTNAME, node.name)) for node in self._inventory)
            self._hostnames = {name: host for name, host in hosts if name != host}
        return self._inventory

    @property
    def model_labels(self) -> Mapping[str, set[str]]:
        """As of the last `inventory`: which GPU models labels name."""
        return self._seen

    @property
    def hostnames(self) -> Mapping[str, str]:
        """As of the last `inventory`: of nodes whose label is not their name."""
        return self._hostnames

    @property
    def restores(self) -> bool:
        """Whether some node's agent says that CRIU works there."""
        return self._restoring > 0

    @property
    def has_budgets(self) -> bool:
        """Whether there are pods of functions with a budget."""
        return self._budgeted > 0

    def promise(self, mark: str, node: str, amounts: Amounts) -> None:
        """Count it as used until a pod with that mark has a node."""
        self.reservations.add(mark, node, amounts)
        self._stale.add(node)

    # ------------------------------------------------------------------------------------------- what changes

    def _remake(self, name: str) -> None:
        node, agent = self.nodes.get(name), self.gpu_nodes.get(name)
        if node is None:
            self._made.pop(name, None)
            return
        held = self._held.get(name, Counter()) + self.reservations.on(name)
        made = read_node(node, held, agent.said if agent else None)
        self._made[name] = replace(made, snapshots=agent.snapshots) if agent else made

    def _node_changed(self, key: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> None:
        if old != new:
            self._stale.add(key)
            self._labels_stale = True

    def _agent_changed(self, key: str, old: AgentFacts | None, new: AgentFacts | None) -> None:
        self._restoring += bool(new and new.restores) - bool(old and old.restores)
        if old != new:
            self._stale.add(key)

    def _pod_changed(self, _key: str, old: PodFacts | None, new: PodFacts | None) -> None:
        if old == new:
            return
        self._budgeted += bool(new and new.budget) - bool(old and old.budget)
        for facts, sign in ((old, -1), (new, 1)):
            if facts is not None and facts.node:
                held = self._held.setdefault(facts.node, Counter())
                for resource, amount in facts.amounts.items():
                    held[resource] += sign * amount
                if not any(held.values()):  # the node may be gone for good
                    del self._held[facts.node]
                self._stale.add(facts.node)
        if new is not None and not new.node:
            if new.promised and old is None:
                self._hear(new)
        elif (pod := new or old) is not None and (node := self.reservations.drop(pod.mark)):
            self._stale.add(node)

    def _hear(self, pod: PodFacts) -> None:
        """Of a choice that may be another's."""
        if self._hears_promises and pod.mark not in self.reservations:
            self.promise(pod.mark, pod.promised, pod.amounts)


async def settle(caches: Iterable[Informer[Any]]) -> None:
    """Returns when all have synced; garbage collections do not look at what they hold then: it is there to stay."""
    await asyncio.gather(*(cache.synced.wait() for cache in caches))
    gc.collect()
    gc.freeze()


# ----------------------------------------------------------------------------------------------- projections


def mark_of(namespace: str, admitted: str) -> str:
    """What a pod's reservation is known by: its namespace, and when the webhook saw it."""
    return f"{namespace}/{admitted}" if admitted else ""


class _PodReader:
    """Makes `PodFacts`; of amounts that are the same in many pods, one is kept."""

    def __init__(self) -> None:
        self._shared: dict[tuple[tuple[str, int], ...], Amounts] = {}

    def __call__(self, pod: Mapping[str, Any]) -> PodFacts | None:
        metadata = object_in(pod, "metadata")
        admitted = str(object_in(metadata, "annotations").get(ADMITTED_ANNOTATION) or "")
        mark = mark_of(str(metadata.get("namespace")), admitted)
        node = holder(pod)
        if node:
            return PodFacts(sys.intern(node), self._one(_requests(pod)), mark, budget=_budget(pod))
        is_ours = admitted or not _FUNCTION_LABELS.isdisjoint(object_in(metadata, "labels"))
        if is_ours and not object_in(pod, "spec").get("nodeName") and not metadata.get("deletionTimestamp"):
            promised = _first_preferred(metadata) if mark else ""
            return PodFacts("", self._one(_requests(pod)), mark, trimmed(pod), promised, _budget(pod))
        return None

    def _one(self, amounts: Amounts) -> Amounts:
        if len(self._shared) >= _SHARED:
            self._shared.clear()
        return self._shared.setdefault(tuple(sorted(amounts.items())), amounts)


def _requests(pod: Mapping[str, Any]) -> Amounts:
    try:
        return pod_requests(pod)
    except ConfigError:  # no API server lets it in
        return {}


def _budget(pod: Mapping[str, Any]) -> Budgeted | None:
    """None where it has none, or says something that cannot be used: whoever made it was told."""
    annotations = object_in(pod["metadata"], "annotations")
    if not annotations.get(BUDGET_ANNOTATION):
        return None
    said = {name: text for name, text in annotations.items() if name != TENANT_ANNOTATION}  # judged when it was made
    value = {**pod, "metadata": {**pod["metadata"], "annotations": said}}
    try:
        intent = read_intent(value, namespace=str(pod["metadata"].get("namespace")), namespace_labels={})
    except ConfigError:
        return None
    if intent is None or not intent.spec.budget_gpu_s:
        return None
    return Budgeted(intent.key, intent.spec.budget_gpu_s, tuple(owner_and_service(pod)))


def _first_preferred(metadata: Mapping[str, Any]) -> str:
    """The node that the webhook's note names first. Whoever makes a pod may write anything there."""
    try:
        return str(json.loads(object_in(metadata, "annotations").get(PLACEMENT_ANNOTATION) or "{}")["prefer"][0][0])
    except (ValueError, TypeError, LookupError, RecursionError):
        return ""


def _read_node(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `read_node` looks at; not the heartbeats in it, which would make it a change each time."""
    spec, status = object_in(node, "spec"), object_in(node, "status")
    ready = [c for c in objects_in(status, "conditions") if c.get("type") == "Ready"]
    return {
        "metadata": {"name": node["metadata"]["name"], "labels": object_in(node["metadata"], "labels")},
        "spec": {key: spec[key] for key in ("unschedulable", "taints") if key in spec},
        "status": {
            "allocatable": object_in(status, "allocatable"),
            "conditions": [{"type": "Ready", "status": c.get("status")} for c in ready],
        },
    }


def _read_gpu_node(gpu_node: Mapping[str, Any]) -> AgentFacts:
    status = object_in(gpu_node, "status")
    snapshots = read_node({}, {}, gpu_node).snapshots
    said = {key: status[key] for key in ("gpus", "diskBytesPerSecond", "restore") if key in status}
    return AgentFacts(
        {"status": said},
        {sys.intern(name): size for name, size in snapshots.items()},
        restores=object_in(status, "restore").get("works") is True,
        due=due_of(gpu_node),
    )


def _labels(value: Mapping[str, Any]) -> Mapping[str, str]:
    return dict(object_in(object_in(value, "metadata"), "labels"))
