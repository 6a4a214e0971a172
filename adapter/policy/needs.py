"""What nodes offer, what a function's replica needs, and whether the one can ever meet the other.

Pure values, and the rules of hard fit; which of the nodes that fit is best is `adapter.policy.placement`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from adapter.keys import NVIDIA_GPU
from adapter.policy.gpu_models import matches
from adapter.policy.node_terms import NO_TERMS, NodeTerms, Taint, Toleration
from adapter.units import format_size

LOAD_S = 20.0
"""A start without a snapshot, where none of the function was measured: half of the base models of a large image
service load within 23 s (GenTD26)."""

CLOSED = {
    "cordoned": "It is cordoned.",
    "not-ready": "It is not ready.",
    "driver-upgrade": "Its GPU driver is being upgraded.",
    "mig-config": "Its MIG slices are being made anew.",
}
"""Why nothing new goes to a node: the values of `Node.why_not`, for people."""

_GPU_TAINTS = ("nvidia.com/gpu", "amd.com/gpu", "gpu.intel.com/i915", "gpu.intel.com/xe")
"""Keys of taints that keep pods without a GPU away from nodes that have one."""
_SPOT_TAINTS = (
    "kubernetes.azure.com/scalesetpriority",
    "cloud.google.com/gke-spot",
    "cloud.google.com/gke-preemptible",
)

Kind: TypeAlias = tuple[object, ...]
"""All of an `Offer` but how much of it is used: nodes of one make have the same."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One GPU resource that a node has: whole GPUs, shared ones, or the slices of one MIG profile.

    `resource` is what a pod asks for (``nvidia.com/gpu``, ``nvidia.com/mig-1g.5gb``), `model` the product as the
    node's labels say it, `memory_bytes` that of one unit, 0 where nobody says. `used` counts units that pods hold,
    or that were promised to pods which are not there yet. `shares`: how many units one GPU is sold as; 1 is whole.
    """

    resource: str
    allocatable: int
    used: int = 0
    model: str = ""
    memory_bytes: int = 0
    compute_capability: tuple[int, int] | None = None
    mig_profile: str = ""
    shares: int = 1
    kind: Kind = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kind = (self.resource, self.allocatable, self.model, self.memory_bytes, self.compute_capability,
                self.mig_profile, self.shares)  # fmt: skip
        object.__setattr__(self, "kind", kind)  # once, not at each look: a fleet is looked at for each pod

    @property
    def free(self) -> int:
        return max(0, self.allocatable - self.used)


@dataclass(frozen=True, slots=True)
class Node:
    """A node as placement sees it. `why_not`: a key of `CLOSED` where nothing new goes there, else empty.

    `snapshots`: the functions whose process snapshot it has (``tenant/name.namespace``), with their bytes.
    `labels`: those that terms can name. CPU and memory are what is free. `taints`: those that keep pods out.
    """

    name: str
    offers: tuple[Offer, ...] = ()
    free_cpu_milli: int = 0
    free_memory_bytes: int = 0
    is_spot: bool = False
    why_not: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    snapshots: Mapping[str, int] = field(default_factory=dict)
    disk_bytes_per_s: float = 0.0
    """Measured there; 0: not known."""
    taints: tuple[Taint, ...] = ()


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica of `function` (``name.namespace``) needs of a node.

    `gpus` is a count, or a share below 1. `models` are in order of preference, empty: any. `memory_bytes`: least GPU
    memory of one unit. `spot`: ``any``, ``prefer``, ``avoid``, ``require`` or ``never``. `snapshot`: the name under
    which its process snapshot would be on a node; empty: it has none. `resource`, and `units` of it: what its pod
    asks for by name already; empty: ours to choose. `terms`: what its pod asks of nodes beside.

    `load_s`: how long a start without a snapshot takes. `cold_price`: GPU-seconds that a second of waiting is worth.
    """

    function: str
    gpus: float = 0.0
    models: tuple[str, ...] = ()
    memory_bytes: int = 0
    compute_capability: tuple[int, int] | None = None
    mig_profile: str = ""
    spot: str = "any"
    cpu_milli: int = 0
    host_memory_bytes: int = 0
    snapshot: str = ""
    resource: str = ""
    units: int = 0
    terms: NodeTerms = NO_TERMS
    load_s: float = LOAD_S
    cold_price: float = 10.0


def tolerations(need: Need) -> tuple[Toleration, ...]:
    """What its pod is to tolerate beside what it says itself: nodes for GPUs, and spot ones where these are liked."""
    gpus = _GPU_TAINTS if need.gpus else ()
    spot = _SPOT_TAINTS if need.spot in ("prefer", "require") else ()
    return tuple(Toleration(key) for key in (*gpus, *spot))


def default_resource(need: Need) -> tuple[str, int]:
    """The resource, and how many units of it, for a pod that no node fits now: what an autoscaler can look for."""
    if need.resource:
        return need.resource, need.units
    if need.mig_profile:
        return f"nvidia.com/mig-{_as_label(need.mig_profile)}", math.ceil(need.gpus)
    return NVIDIA_GPU, math.ceil(need.gpus)


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a kind of offer, if nobody used any of it, is what a need asks for.

    `code` and `reason` say why not, and are empty where it is. `units` are what would be taken of it. `rank` is the
    place of its model among those wanted.
    """

    code: str = ""
    reason: str = ""
    units: int = 0
    rank: int = 0


def fit(need: Need, offer: Offer) -> Fit:
    """The same for every offer of one `Offer.kind`."""
    rank, units = _rank(need, offer), _units(need, offer)
    code, reason = _misfit(need, offer, rank, units)
    return Fit(code, reason, units, rank)


def _misfit(need: Need, offer: Offer, rank: int, units: int) -> tuple[str, str]:
    if need.resource and need.resource != offer.resource:
        return "gpu-kind", f"It has {offer.resource}, not {need.resource}."
    if need.mig_profile and _as_label(need.mig_profile) != _as_label(offer.mig_profile):
        return "mig-profile", f"It has {offer.mig_profile or 'no MIG slices'}, not {need.mig_profile}."
    if not need.resource and (part := _part(need, offer)):
        return "gpu-kind", f"It has {offer.resource}, {part}."
    if need.models and rank == len(need.models):
        return "gpu-model", f"It has {offer.model or 'a GPU of unknown model'}, not {' or '.join(need.models)}."
    wanted, has = need.compute_capability, offer.compute_capability
    if wanted and (has or (0, 0)) < wanted:
        said = f"{has[0]}.{has[1]}" if has else "unknown"
        return "compute-capability", f"Its compute capability is {said}, {wanted[0]}.{wanted[1]} is needed."
    one_bytes = offer.memory_bytes * (units if offer.shares > 1 else 1)
    if need.memory_bytes > one_bytes:
        known = format_size(one_bytes) if one_bytes else "unknown"
        return "gpu-memory", f"Its GPU memory is {known}, {format_size(need.memory_bytes)} are needed."
    if units > offer.allocatable:
        return "gpu-count", f"It has {offer.allocatable} {offer.resource}, {units} are needed."
    return "", ""


def _part(need: Need, offer: Offer) -> str:
    """Why an offer is not to be chosen unless it is asked for by its name."""
    if not need.models and not offer.resource.startswith("nvidia.com/"):
        return "and who names no model gets NVIDIA's"
    if offer.mig_profile and not need.mig_profile:
        return "which is a slice of a GPU"
    return "which is a share of a GPU" if offer.shares > 1 and need.gpus >= 1 else ""


def _rank(need: Need, offer: Offer) -> int:
    """The place of its model in the list of those wanted; the list's length where it is not there."""
    whole_bytes = 0 if offer.mig_profile else offer.memory_bytes * offer.shares
    for rank, model in enumerate(need.models):
        if matches(model, offer.model, whole_bytes):
            return rank
    return len(need.models)


def _units(need: Need, offer: Offer) -> int:
    return need.units if need.resource else math.ceil(round(need.gpus * offer.shares, 6))


def _as_label(profile: str) -> str:
    """Names of resources and labels have no ``+``: ``1g.10gb+me`` is ``1g.10gb.me`` there."""
    return profile.replace("+", ".")
