"""Which node a GPU function's replica should run on.

Pure: nodes and one need in, a verdict for each node out. A node that does not fit says why; those that fit are
ordered by what choosing them costs: seconds until the function answers there, GPUs that nobody can use any more,
GPU nodes that could have become empty, spot machines that may go away. One currency for all of it, GPU-seconds,
so that they can be added up.

The scheduler has the last word. What is decided here becomes terms that it weighs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeAlias

from adapter.keys import NVIDIA_GPU
from adapter.policy.gpu_models import matches
from adapter.policy.node_terms import NO_TERMS, NodeTerms, Taint, Toleration, untolerated
from adapter.units import format_size

LOAD_S = 20.0
"""A start without a snapshot, where none of the function was measured: half of the base models of a large image
service load within 23 s (GenTD26)."""
RESTORE_S = 0.5
"""What a restore takes beside reading its files."""
DISK_BYTES_PER_S = 500e6
"""Of a node whose disk nobody has measured: a plain network disk."""

STRANDED_GPU_S = 30.0
"""What one more GPU left over on a partly used node costs, or one that nobody fits any more: replicas live for
minutes, and only some of that time would the GPU be asked for, or its node be taken away."""
NEXT_MODEL_GPU_S = 2000.0
"""What the next one of a list of models costs: more than all that follows from where a replica is."""
SPOT_GPU_S = 500.0
"""What a machine costs that is spot where that is to be avoided, or is not where it is preferred."""
MOST_PREFERRED = 32
"""Nodes that terms name: an object's size has a bound, and a scheduler's patience too."""
HALF_GPU_S = 60.0
"""A node that costs so much more than the best one has half its score."""

CLOSED = {
    "cordoned": "It is cordoned.",
    "not-ready": "It is not ready.",
    "driver-upgrade": "Its GPU driver is being upgraded.",
    "mig-config": "Its MIG slices are being made anew.",
}
"""Why nothing new goes to a node: the values of `Node.why_not`, for people."""


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


@dataclass(frozen=True, slots=True)
class Verdict:
    """One node for one need. `code` is stable (a metric label), `reason` is for people; both empty where it fits.

    `units` of `resource` are what a pod would ask for there. `wake_s`: estimated seconds until the function answers
    there. `cost_gpu_s`: what choosing it costs. `score`, 0 to 100: higher is better, 100 is the best of these nodes.
    """

    node: str
    code: str = ""
    reason: str = ""
    resource: str = ""
    units: int = 0
    wake_s: float = 0.0
    score: float = 0.0
    cost_gpu_s: float = 0.0

    @property
    def fits(self) -> bool:
        return not self.code


_GPU_TAINTS = ("nvidia.com/gpu", "amd.com/gpu", "gpu.intel.com/i915", "gpu.intel.com/xe")
"""Keys of taints that keep pods without a GPU away from nodes that have one."""
_SPOT_TAINTS = (
    "kubernetes.azure.com/scalesetpriority",
    "cloud.google.com/gke-spot",
    "cloud.google.com/gke-preemptible",
)


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
        return f"nvidia.com/mig-{_profile(need.mig_profile)}", math.ceil(need.gpus)
    return NVIDIA_GPU, math.ceil(need.gpus)


# What usually comes ---------------------------------------------------------------------------------


class Mix:
    """What replicas usually need: the measure of whether a GPU that is left over is of use to anybody.

    Fragmentation of a node, as FGD has it (Weng et al., USENIX ATC 2023): its free GPUs, each times the share of
    replicas that cannot have it.
    """

    def __init__(self, needs: Iterable[Need]) -> None:
        """`needs` as they came, the same one many times: their counts are the shares."""
        counted = Counter(replace(need, function="", snapshot="", terms=NO_TERMS) for need in needs if need.gpus)
        total = counted.total()
        self._shares = [(need, count / total) for need, count in counted.items()]
        self._tables: dict[_Kind, list[float]] = {}

    def unusable(self, offer: Offer, free: int) -> float:
        """How many of `free` units are of no use, on average over the needs."""
        table = self._tables.get(kind := _kind(offer))
        if table is None:
            table = self._tables[kind] = self._table(offer)
        return free * (1 - table[min(free, offer.allocatable)])

    def _table(self, offer: Offer) -> list[float]:
        """The share of needs that so many free units are enough for, by their number."""
        table = [0.0] * (offer.allocatable + 1)
        for need, share in self._shares:
            units = _units(need, offer)
            if not _mismatch(need, offer)[0] and units <= offer.allocatable:
                for free in range(units, offer.allocatable + 1):
                    table[free] += share
        return table


USUAL = Mix(Need("", gpus) for gpus, times in ((0.5, 3), (1.0, 12), (2.0, 2), (4.0, 1), (8.0, 2)) for _ in range(times))
"""Where nothing has come yet: mostly single GPUs."""


# Verdicts -------------------------------------------------------------------------------------------


def place(need: Need, nodes: Iterable[Node], mix: Mix = USUAL) -> list[Verdict]:
    """A verdict for each node: those that fit, the best first, then those that do not.

    Deterministic: the order of nodes does not matter, what is equally good goes by name.
    """
    judge = _Judge(need, mix)
    fitting, others = [], []
    for node in nodes:
        refused = judge.refusal(node)
        if isinstance(refused, Verdict):
            others.append(refused)
        else:
            fitting.append((*judge.cost(node, refused), node.name, refused))
    fitting.sort(key=lambda item: (item[0], item[2]))
    best = fitting[0][0] if fitting else 0.0
    chosen = [
        Verdict(
            name,
            resource=offer.resource if offer else "",
            units=judge.units(offer) if offer else 0,
            wake_s=wake_s,
            score=100 * 2 ** ((best - cost) / HALF_GPU_S),
            cost_gpu_s=cost,
        )
        for cost, wake_s, name, offer in fitting
    ]
    return chosen + sorted(others, key=lambda verdict: verdict.node)


_Kind: TypeAlias = tuple[object, ...]
"""All of an `Offer` but how much of it is used."""


def _kind(offer: Offer) -> _Kind:
    return (offer.resource, offer.allocatable, offer.model, offer.memory_bytes, offer.compute_capability,
            offer.mig_profile, offer.shares)  # fmt: skip


_NEAREST = ("gpu-busy", "gpu-count", "gpu-memory", "compute-capability", "gpu-model", "mig-profile", "gpu-kind")
"""Of several offers of a node, the one that is nearest to fit says why the node does not."""


class _Judge:
    """One need, and what was found out about kinds of offers on the way."""

    def __init__(self, need: Need, mix: Mix) -> None:
        self._need = need
        self._mix = mix
        self._tolerations = (*need.terms.tolerations, *tolerations(need))
        self._known: dict[_Kind, tuple[str, str]] = {}

    def refusal(self, node: Node) -> Verdict | Offer | None:
        """Why not there; or the offer to take; or None where no GPU is needed."""
        need = self._need
        code, reason = self._closed(node)
        offer: Offer | None = None
        if not code and need.gpus:
            offer, code, reason = self._offer(node)
        if not code:
            code, reason = _short_of(need, node)
        return Verdict(node.name, code, reason) if code else offer

    def units(self, offer: Offer) -> int:
        return _units(self._need, offer)

    def _closed(self, node: Node) -> tuple[str, str]:
        """Whether anything of this pod may go there at all."""
        need = self._need
        if node.why_not:
            return node.why_not, CLOSED.get(node.why_not, node.why_not)
        if need.spot == "require" and not node.is_spot:
            return "spot", "It is no spot machine."
        if need.spot == "never" and node.is_spot:
            return "spot", "It is a spot machine."
        if node.taints and (taint := untolerated(node.taints, self._tolerations)):
            return "taint", f"It has the taint {taint}."
        if need.terms is not NO_TERMS and (missing := need.terms.missing(node.labels)):
            return "node-selector", f"It does not meet {missing}."
        return "", ""

    def _offer(self, node: Node) -> tuple[Offer | None, str, str]:
        """The offer to take, the preferred model first; or the nearest miss."""
        found: Offer | None = None
        misses = []
        for offer in node.offers:
            code, reason = self._mismatch(offer)
            if not code and self.units(offer) > offer.free:
                code, reason = (
                    "gpu-busy",
                    f"{offer.free} of its {offer.allocatable} {offer.resource} are free, {self.units(offer)} are needed.",
                )
            if code:
                misses.append((_NEAREST.index(code), code, reason))
            elif found is None or self._rank(offer) < self._rank(found):
                found = offer
        if found is not None:
            return found, "", ""
        if not misses:
            return None, "no-gpu", "It has no GPU."
        return None, *min(misses)[1:]

    def _mismatch(self, offer: Offer) -> tuple[str, str]:
        kind = _kind(offer)
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = _mismatch(self._need, offer)
        return known

    def _rank(self, offer: Offer) -> tuple[int, int, str]:
        """Least first: the most preferred model, then what takes the least of a GPU."""
        return _preference(self._need, offer), -offer.shares, offer.resource

    def cost(self, node: Node, offer: Offer | None) -> tuple[float, float]:
        """GPU-seconds that choosing it costs, and the seconds until it answers there."""
        need = self._need
        wake_s = _wake_s(need, node)
        cost = need.cold_price * wake_s
        if (need.spot == "prefer" and not node.is_spot) or (need.spot == "avoid" and node.is_spot):
            cost += SPOT_GPU_S
        if offer is not None:
            cost += NEXT_MODEL_GPU_S * _preference(need, offer)
            cost += STRANDED_GPU_S * self._left_over(node, offer)
        return cost, wake_s

    def _left_over(self, node: Node, offer: Offer) -> float:
        """GPUs that choosing it leaves over: on a node that is no longer empty, and of no use to others."""
        units, free = self.units(offer), offer.free
        after = free - units
        partly = after if not any(o.used for o in node.offers) else -units
        fragmented = self._mix.unusable(offer, after) - self._mix.unusable(offer, free)
        return (partly + fragmented) / offer.shares


def _short_of(need: Need, node: Node) -> tuple[str, str]:
    if need.cpu_milli > node.free_cpu_milli:
        return "cpu", f"{node.free_cpu_milli}m CPU are free, {need.cpu_milli}m are needed."
    if need.host_memory_bytes > node.free_memory_bytes:
        free, needed = format_size(node.free_memory_bytes), format_size(need.host_memory_bytes)
        return "memory", f"{free} of memory are free, {needed} are needed."
    return "", ""


def _mismatch(need: Need, offer: Offer) -> tuple[str, str]:
    """Why an offer can never be what is needed, however empty: code and reason."""
    if need.resource and need.resource != offer.resource:
        return "gpu-kind", f"It has {offer.resource}, not {need.resource}."
    if need.mig_profile and _profile(need.mig_profile) != _profile(offer.mig_profile):
        return "mig-profile", f"It has {offer.mig_profile or 'no MIG slices'}, not {need.mig_profile}."
    if not need.resource and not need.models and not offer.resource.startswith("nvidia.com/"):
        return "gpu-kind", f"It has {offer.resource}; a function that names no model gets NVIDIA's."
    if not need.resource and not need.mig_profile and (offer.mig_profile or (need.gpus >= 1 and offer.shares > 1)):
        return (
            "gpu-kind",
            f"It has {offer.resource}, which is {'a slice' if offer.mig_profile else 'a share'} of a GPU.",
        )
    if need.models and _preference(need, offer) == len(need.models):
        return "gpu-model", f"It has {offer.model or 'a GPU of unknown model'}, not {' or '.join(need.models)}."
    wanted = need.compute_capability
    if wanted and (offer.compute_capability or (0, 0)) < wanted:
        has = ".".join(map(str, offer.compute_capability)) if offer.compute_capability else "unknown"
        return "compute-capability", f"Its compute capability is {has}, {wanted[0]}.{wanted[1]} is needed."
    units = _units(need, offer)
    one_bytes = offer.memory_bytes * (units if offer.shares > 1 else 1)
    if need.memory_bytes > one_bytes:
        has = format_size(one_bytes) if one_bytes else "unknown"
        return "gpu-memory", f"Its GPU memory is {has}, {format_size(need.memory_bytes)} are needed."
    if units > offer.allocatable:
        return "gpu-count", f"It has {offer.allocatable} {offer.resource}, {units} are needed."
    return "", ""


def _preference(need: Need, offer: Offer) -> int:
    """The place of its model in the list of those wanted; the list's length where it is not there."""
    for rank, model in enumerate(need.models):
        if matches(model, offer.model, offer.memory_bytes * offer.shares if offer.shares > 1 else offer.memory_bytes):
            return rank
    return len(need.models)


def _units(need: Need, offer: Offer) -> int:
    """How many units of the offer it takes."""
    if need.resource:
        return need.units
    return math.ceil(round(need.gpus * offer.shares, 6))


def _profile(name: str) -> str:
    """Resource names cannot have a ``+``, labels neither: ``1g.10gb+me`` is ``1g.10gb.me`` there."""
    return name.replace("+", ".")


def _wake_s(need: Need, node: Node) -> float:
    size_bytes = node.snapshots.get(need.snapshot) if need.snapshot else None
    if size_bytes is None:
        return need.load_s
    return min(need.load_s, RESTORE_S + size_bytes / (node.disk_bytes_per_s or DISK_BYTES_PER_S))


# What becomes of verdicts ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preference:
    """A preferred term for the scheduler: `weight`, 1 to 100, for any of `nodes`."""

    weight: int
    nodes: tuple[str, ...]


def preferences(verdicts: Iterable[Verdict]) -> list[Preference]:
    """Terms that make a scheduler choose as the verdicts do, as far as one can; all for the best one's resource.

    Nodes that cost the same have one weight, and each next cost half of it: the default scheduler spreads pods by
    CPU and memory, and only such steps are larger than what it sees in that. Not only the best nodes are named,
    because in a large cluster it looks at a part of the nodes alone.
    """
    fitting = [verdict for verdict in verdicts if verdict.fits]
    named = [verdict for verdict in fitting if verdict.resource == fitting[0].resource][:MOST_PREFERRED]
    terms: list[Preference] = []
    for _, alike in groupby(named, key=lambda verdict: round(verdict.cost_gpu_s)):
        weight = 100 >> len(terms)
        if not weight:
            break
        terms.append(Preference(weight, tuple(verdict.node for verdict in alike)))
    return terms


# For people -----------------------------------------------------------------------------------------

_SHORT = {
    "no-gpu": "no GPU",
    "gpu-kind": "another kind of GPU resource",
    "mig-profile": "no such MIG slices",
    "gpu-model": "another GPU model",
    "gpu-memory": "too little GPU memory",
    "compute-capability": "too low a compute capability",
    "gpu-count": "too few GPUs",
    "gpu-busy": "no free GPU",
    "spot": "spot or not, against what is asked",
    "taint": "a taint that is not tolerated",
    "node-selector": "against its node selector",
    "cpu": "too little CPU",
    "memory": "too little memory",
    "cordoned": "cordoned",
    "not-ready": "not ready",
    "driver-upgrade": "its driver is being upgraded",
    "mig-config": "its MIG slices are being made anew",
}
"""What each code means, in a summary."""


_PASSING = frozenset({"gpu-busy", "cpu", "memory", *CLOSED})
"""Codes that time may change."""


def may_fit_later(verdicts: Iterable[Verdict]) -> bool:
    """Whether a node fits, or would if others went or it came back. If not, only another node can help."""
    return any(verdict.fits or verdict.code in _PASSING for verdict in verdicts)


def explain(verdicts: Sequence[Verdict]) -> str:
    """One line for an Event: ``3 of 12 nodes fit; 5: no free GPU; 4: another GPU model.``"""
    if not verdicts:
        return "The cluster has no nodes."
    fitting = sum(verdict.fits for verdict in verdicts)
    codes = Counter(verdict.code for verdict in verdicts if verdict.code)
    parts = [f"{fitting} of {len(verdicts)} nodes fit" if fitting else f"None of {len(verdicts)} nodes fits"]
    parts += [
        f"{count}: {_SHORT.get(code, code)}" for code, count in sorted(codes.items(), key=lambda c: (-c[1], c[0]))
    ]
    if may_fit_later(verdicts):
        return "; ".join(parts) + "."
    more = "It needs more GPUs than any node has. " if "gpu-count" in codes else "No node here can ever fit. "
    return more + "; ".join(parts) + "."
