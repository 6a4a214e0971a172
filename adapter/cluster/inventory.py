"""What a cluster has: nodes, pods and `GpuNode` objects, as the API says them, become `adapter.policy.placement` values.

Which labels say what of GPUs is in `adapter.cluster.gpu_labels`; what follows from it all is placement's. Everything here
is pure. JSON is read leniently: what makes no sense is not there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from adapter.cluster.gpu_labels import GpuFacts, Labels, facts_of
from adapter.cluster.json_parts import object_in as _object, objects_in as _objects
from adapter.cluster.quantity import parse_quantity
from adapter.errors import ConfigError
from adapter.keys import TASK_LABEL
from adapter.policy.gpu_models import matches
from adapter.policy.needs import Node, Offer
from adapter.policy.node_terms import KEEPING_OUT, Requirement, Taint
from adapter.policy.placement import WRONG_GPU, Verdict
from adapter.replica import TASK_SNAPSHOT

Amounts: TypeAlias = Mapping[str, int]
"""Of resources by name: ``cpu`` in thousandths, ``memory`` in bytes, devices as a count."""

_GPU_RESOURCE = re.compile(
    r"nvidia\.com/(gpu|mig-([1-9]c\.)?[1-9]g\.[1-9][0-9]{0,3}gb([.-][a-z0-9.-]{1,20}?)?)(\.shared)?|amd\.com/(gpu|[scdq]px_nps[0-9])|gpu\.intel\.com/(i915|xe)"
)


def is_gpu(resource: str) -> bool:
    """Whether a resource counts GPUs, or parts of them, that a container is given."""
    return _GPU_RESOURCE.fullmatch(resource) is not None


# Pods -----------------------------------------------------------------------------------------------


def pod_requests(pod: Mapping[str, Any]) -> Amounts:
    """What a pod, or the template of one, takes of a node while it is there.

    Init containers run one after the other before the others do, sidecars among them stay. Raises `ConfigError`
    for a quantity that is none: the API server lets no such pod in, but a template may have it.
    """
    spec = _object(pod, "spec")
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for container in _objects(spec, "initContainers"):
        own = _requested(container)
        if container.get("restartPolicy") == "Always":
            running.update(own)
            own = {}
        most |= running + Counter(own)
    for container in _objects(spec, "containers"):
        running.update(_requested(container))
    total = most | running
    total.update(_amounts(_object(spec, "overhead")))
    return {**total, **_requested(spec)}


def held_by_node(pods: Iterable[Mapping[str, Any]]) -> dict[str, Amounts]:
    """What pods take of each node; ``pods`` counts them. Those that end still hold theirs, those that ended do not."""
    held: dict[str, Counter[str]] = {}
    for pod in pods:
        if node := holder(pod):
            held.setdefault(node, Counter()).update({"pods": 1, **pod_requests(pod)})
    return dict(held)


def holder(pod: Mapping[str, Any]) -> str:
    """The node of which a pod takes something; empty where it takes nothing, not yet or no more.

    What takes a snapshot gives way to any function: of what functions may have it takes nothing.
    """
    over = _object(pod, "status").get("phase") in ("Succeeded", "Failed")
    name = _object(pod, "spec").get("nodeName")
    return name if isinstance(name, str) and not (over or takes_snapshot(pod)) else ""


def takes_snapshot(pod: Mapping[str, Any]) -> bool:
    """Whether it is one that the controller made for that: an admission policy lets nobody else say so."""
    return _object(_object(pod, "metadata"), "labels").get(TASK_LABEL) == TASK_SNAPSHOT


def _requested(of: Mapping[str, Any]) -> dict[str, int]:
    """Requests of a container or, where a pod has some of its own, of a pod; limits where no request is made."""
    resources = _object(of, "resources")
    return _amounts({**_object(resources, "limits"), **_object(resources, "requests")})


def _amounts(resources: Mapping[str, Any]) -> dict[str, int]:
    return {name: parse_quantity(value, thousandths=name == "cpu") for name, value in resources.items()}


# Nodes ----------------------------------------------------------------------------------------------


def read_node(node: Mapping[str, Any], held: Amounts, gpu_node: Mapping[str, Any] | None = None) -> Node:
    """A Node object, what pods hold of it, and its `GpuNode`, if its agent has written one."""
    meta, spec, status = _object(node, "metadata"), _object(node, "spec"), _object(node, "status")
    labels: Labels = _object(meta, "labels")
    said = _object(gpu_node or {}, "status")
    allocatable = _readable(_object(status, "allocatable"))
    return Node(
        name=str(meta.get("name", "")),
        offers=tuple(
            _offer(resource, count, held.get(resource, 0), labels, said)
            for resource, count in sorted(allocatable.items())
            if count and is_gpu(resource)
        ),
        free_cpu_milli=max(0, allocatable.get("cpu", 0) - held.get("cpu", 0)),
        free_memory_bytes=max(0, allocatable.get("memory", 0) - held.get("memory", 0)),
        is_spot=any(labels.get(key, "").lower() == value for key, value in _SPOT_LABELS),
        why_not=_why_not(spec, status, labels),
        labels=labels,
        snapshots=_snapshots(said),
        disk_bytes_per_s=_positive(said.get("diskBytesPerSecond")),
        taints=tuple(_taints(spec)),
    )


_SPOT_LABELS = (
    ("karpenter.sh/capacity-type", "spot"),
    ("eks.amazonaws.com/capacitytype", "spot"),
    ("eks.amazonaws.com/capacityType", "spot"),
    ("cloud.google.com/gke-spot", "true"),
    ("cloud.google.com/gke-preemptible", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
    ("node.kubernetes.io/lifecycle", "spot"),
)


def selects_spot(requirement: Requirement) -> bool | None:
    """Whether a condition on labels picks spot machines alone, or others alone; None: neither."""
    words = [value for key, value in _SPOT_LABELS if key == requirement.key]
    if not words or requirement.operator != "In" or not requirement.values:
        return None
    picked = {value.lower() in words for value in requirement.values}
    return picked.pop() if len(picked) == 1 else None


def spot_terms(spot: str) -> tuple[tuple[Requirement, ...], ...]:
    """Alternatives that hold a pod to spot machines (``require``), or away from them (``never``), by what autoscalers
    call them; none for what only weighs."""
    if spot == "require":
        return tuple((Requirement(key, "In", _spellings(word)),) for key, word in _SPOT_LABELS)
    if spot == "never":
        return (tuple(Requirement(key, "NotIn", _spellings(word)) for key, word in _SPOT_LABELS),)
    return ()


def _spellings(word: str) -> tuple[str, ...]:
    return word, word.upper()


_TAINTS_OF_STATES = ("node.kubernetes.io/", "node.cloudprovider.kubernetes.io/")
"""Taints that say what `Node.why_not` says already."""

_USABLE_DURING_UPGRADES = ("", "upgrade-done", "upgrade-required")
"""States of the GPU operator's driver upgrade; a node may wait for its turn for long."""


def _why_not(spec: Mapping[str, Any], status: Mapping[str, Any], labels: Labels) -> str:
    """A key of `adapter.policy.needs.CLOSED`, or empty."""
    if spec.get("unschedulable"):
        return "cordoned"
    if not any(c.get("type") == "Ready" and c.get("status") == "True" for c in _objects(status, "conditions")):
        return "not-ready"
    if labels.get("nvidia.com/gpu-driver-upgrade-state", "") not in _USABLE_DURING_UPGRADES:
        return "driver-upgrade"
    if labels.get("nvidia.com/mig.config.state", "success") != "success":
        return "mig-config"
    return ""


def _taints(spec: Mapping[str, Any]) -> Iterable[Taint]:
    for taint in _objects(spec, "taints"):
        key, effect = str(taint.get("key", "")), str(taint.get("effect", ""))
        if effect in KEEPING_OUT and not key.startswith(_TAINTS_OF_STATES):
            yield Taint(key, str(taint.get("value") or ""), effect)


def _snapshots(said: Mapping[str, Any]) -> dict[str, int]:
    """By name, where a restore works at all."""
    if _object(said, "restore").get("works") is False:
        return {}
    return {str(s.get("name")): int(_positive(s.get("bytes"))) for s in _objects(said, "snapshots") if s.get("name")}


def _offer(resource: str, count: int, used: int, labels: Labels, said: Mapping[str, Any]) -> Offer:
    facts = facts_of(labels, resource)
    shares = max(1, facts.shares)
    agents = _of_agent(said, is_slice=bool(facts.mig_profile))
    return Offer(
        resource=resource,
        allocatable=count,
        used=used,
        model=facts.model or agents.model,
        memory_bytes=(facts.memory_bytes or agents.memory_bytes) // shares,
        compute_capability=facts.compute_capability,
        mig_profile=facts.mig_profile,
        shares=shares,
    )


def _of_agent(said: Mapping[str, Any], *, is_slice: bool) -> GpuFacts:
    """What the agent saw of the devices, if they are all alike."""
    seen = {
        (str(gpu.get("model", "")), int(_positive(gpu.get("memoryBytes"))))
        for gpu in _objects(said, "gpus")
        if bool(gpu.get("slice")) == is_slice
    }
    return GpuFacts(*seen.pop()) if len(seen) == 1 else GpuFacts()


# What an autoscaler knows ---------------------------------------------------------------------------

_MODEL_LABELS = (
    "nvidia.com/gpu.product",
    "amd.com/gpu.product-name",
    "gpu.intel.com/product",
    "cloud.google.com/gke-accelerator",
    "karpenter.k8s.aws/instance-gpu-name",
    "karpenter.azure.com/sku-gpu-name",
    "k8s.amazonaws.com/accelerator",
)
_NODES_OWN = 3
"""Labels that name a GPU model. So many of the first are there only once a node is."""

_OFFERED = {
    "cloud.google.com/gke-accelerator": (
        "nvidia-tesla-t4", "nvidia-tesla-p4", "nvidia-tesla-p100", "nvidia-tesla-v100", "nvidia-l4", "nvidia-tesla-a100",
        "nvidia-a100-80gb", "nvidia-h100-80gb", "nvidia-h100-mega-80gb", "nvidia-h200-141gb", "nvidia-b200",
    ),
    "karpenter.k8s.aws/instance-gpu-name": (
        "m60", "v100", "t4", "t4g", "a10g", "l4", "l40s", "a100", "h100", "h200", "b200",
    ),
}  # fmt: skip
"""Values that are not seen in a cluster while no such node is up."""


def model_terms(models: Collection[str], seen: Mapping[str, Collection[str]]) -> tuple[tuple[Requirement, ...], ...]:
    """Alternatives that hold a pod to GPU models: one for each label that names models in this cluster.

    `seen`: the values of each label that nodes have (`label_values`). A required term on a label of nodes alone would
    keep an autoscaler from making the first node, so the labels it knows stand beside it with all the values it may
    give. Empty where no label here names any of the models: then nothing can be required.
    """
    terms = []
    for key in _MODEL_LABELS:
        if key in seen:
            values = {*seen[key], *_OFFERED.get(key, ())}
            meant = sorted(value for value in values if any(matches(model, value) for model in models))
            terms += [(Requirement(key, "In", tuple(meant)),)] if meant else []
    return tuple(terms)


def ruled_out(verdicts: Iterable[Verdict], nodes: Iterable[Node]) -> tuple[Requirement, ...]:
    """What keeps a pod from GPUs that can never do: products all of whose nodes have a verdict of `WRONG_GPU`.

    Only labels are named that a node brings with it: one that an autoscaler may yet make does not have them.
    """
    wrong = {verdict.node for verdict in verdicts if verdict.code in WRONG_GPU}
    found = []
    for key in _MODEL_LABELS[:_NODES_OWN]:
        bad: set[str] = set()
        good: set[str] = set()
        for node in nodes:
            if value := node.labels.get(key):
                (bad if node.name in wrong else good).add(value)
        if bad - good:
            found.append(Requirement(key, "NotIn", tuple(sorted(bad - good))))
    return tuple(found)


def label_values(nodes: Iterable[Node]) -> dict[str, set[str]]:
    """The values of labels that name GPU models, by label."""
    seen: dict[str, set[str]] = {}
    for node in nodes:
        for key in _MODEL_LABELS:
            if value := node.labels.get(key):
                seen.setdefault(key, set()).add(value)
    return seen


# JSON -----------------------------------------------------------------------------------------------


def _positive(value: object) -> float:
    return float(value) if isinstance(value, int | float) and 0 < value < 1e18 else 0.0


def _readable(resources: Mapping[str, Any]) -> dict[str, int]:
    """Amounts; what cannot be read is not there."""
    amounts: dict[str, int] = {}
    for name, value in resources.items():
        try:
            amounts[name] = parse_quantity(value, thousandths=name == "cpu")
        except ConfigError:
            continue
    return amounts
