"""Which node a GPU function's replica should run on.

Pure: nodes and one need in, a verdict for each node out. A node that does not fit says why; those that fit are
ordered by what choosing them costs: seconds until the function answers there, GPUs that nobody can use any more,
GPU nodes that could have become empty, spot machines that may go away. One currency for all of it, GPU-seconds,
so that they can be added up.

The scheduler has the last word. What is decided here becomes terms that it weighs (`preferences`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from adapter.policy.fragmentation import USUAL, Mix, Recent
from adapter.policy.needs import CLOSED, Fit, Kind, Need, Node, Offer, default_resource, fit, tolerations
from adapter.policy.node_terms import NO_TERMS, untolerated
from adapter.units import format_size

__all__ = [
    "CLOSED", "USUAL", "Mix", "Need", "Node", "Offer", "Preference", "Recent", "Verdict", "default_resource", "explain",
    "may_fit_later", "place", "preferences", "tolerations",
]  # fmt: skip

RESTORE_S = 0.5
"""What a restore takes beside reading its files."""
DISK_BYTES_PER_S = 500e6
"""Of a node whose disk nobody has measured: a plain network disk."""

UNUSABLE_GPU_S = 30.0
"""What one more free GPU that nobody can use costs (`adapter.policy.fragmentation`): replicas live for minutes, and
only some of that time would it be asked for."""
STRANDED_GPU_S = 3.0
"""What one more GPU left over on a partly used node costs, usable as it may be: the node cannot be taken away. A
tenth of the above packs best (benchmarks/stranded.py)."""
NEXT_MODEL_GPU_S = 2000.0
"""What the next one of a list of models costs: more than all that follows from where a replica is."""
SPOT_GPU_S = 500.0
"""What a machine costs that is spot where that is to be avoided, or is not where it is preferred."""

HALF_GPU_S = 60.0
"""A node that costs so much more than the best one has half its score."""
MOST_PREFERRED = 64
"""Nodes that terms name. Enough that some of them are among the part of a large cluster that the scheduler looks at."""


@dataclass(slots=True)  # frozen ones take five times as long to make, and a pod waits for a thousand of these
class Verdict:
    """One node for one need; not to be changed. `code` is stable (a metric label), `reason` is for people; both empty where it fits.

    `units` of `resource` are what a pod would ask for there, `shares` of which are one GPU. `wake_s`: estimated seconds until the function answers
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
    shares: int = 1

    @property
    def fits(self) -> bool:
        return not self.code


def place(need: Need, nodes: Iterable[Node], mix: Mix = USUAL) -> list[Verdict]:
    """A verdict for each node: those that fit, the best first, then those that do not, by name.

    `mix`: what replicas usually need. Deterministic: the order of nodes does not matter, and what is equally good
    goes by name.
    """
    judge = _Judge(need, mix)
    fitting: list[tuple[float, str, float, str, int, int]] = []
    others: list[Verdict] = []
    for node in nodes:
        offer, found = judge.look(node)
        if found.code:
            others.append(Verdict(node.name, found.code, found.reason))
        else:
            wake_s = _wake_s(need, node)
            cost = judge.cost(node, offer, found) + need.cold_price * wake_s
            resource, shares = (offer.resource, offer.shares) if offer else ("", 1)
            fitting.append((cost, node.name, wake_s, resource, found.units, shares))
    fitting.sort()
    others.sort(key=lambda verdict: verdict.node)
    return [
        Verdict(name, "", "", resource, units, wake_s, 100 * 2 ** ((fitting[0][0] - cost) / HALF_GPU_S), cost, shares)
        for cost, name, wake_s, resource, units, shares in fitting
    ] + others


_NO_GPU = Fit("no-gpu", "It has no GPU.")
_NONE_NEEDED = Fit()
_NEAREST = ("gpu-busy", "gpu-count", "gpu-memory", "compute-capability", "gpu-model", "mig-profile", "gpu-kind")
"""Of several offers of a node, the one that is nearest to fit says why the node does not."""


class _Judge:
    """One need, and what was found out about kinds of offers on the way: a fleet has few.

    It sees every node of a cluster while a pod waits to be made: what is the same for many nodes is done once.
    """

    def __init__(self, need: Need, mix: Mix) -> None:
        self._need = need
        self._mix = mix
        self._tolerations = (*need.terms.tolerations, *tolerations(need))
        self._has_terms = need.terms != NO_TERMS or need.spot in ("require", "never")
        self._against = {"prefer": False, "avoid": True}.get(need.spot)
        """Of a machine: whether it is spot, where that counts against it."""
        self._fits: dict[Kind, Fit] = {}

    def look(self, node: Node) -> tuple[Offer | None, Fit]:
        """The offer to take, None where no GPU is needed; or, with a code, why there is none to take."""
        need = self._need
        if node.why_not:
            return None, Fit(node.why_not, CLOSED.get(node.why_not, node.why_not))
        if node.taints and (taint := untolerated(node.taints, self._tolerations)):
            return None, Fit("taint", f"It has the taint {taint}.")
        if self._has_terms and (refused := self._terms(node)):
            _, found = self._offer(node) if need.gpus else (None, _NONE_NEEDED)
            return None, found if found.code in WRONG_GPU else refused  # terms may follow from that: it says more
        offer, found = self._offer(node) if need.gpus else (None, _NONE_NEEDED)
        if not found.code and (need.cpu_milli > node.free_cpu_milli or need.host_memory_bytes > node.free_memory_bytes):
            return None, _short(need, node)
        return offer, found

    def _terms(self, node: Node) -> Fit | None:
        need = self._need
        if need.spot == "require" and not node.is_spot:
            return Fit("spot", "It is no spot machine.")
        if need.spot == "never" and node.is_spot:
            return Fit("spot", "It is a spot machine.")
        missing = need.terms.missing(node.labels)
        return Fit("node-selector", f"It does not meet {missing}.") if missing else None

    def _offer(self, node: Node) -> tuple[Offer | None, Fit]:
        """The offer to take: of the most preferred model, then what takes the least of a GPU; or the nearest miss."""
        best: Offer | None = None
        best_fit = miss = _NO_GPU
        for offer in node.offers:
            found = self._fits.get(offer.kind)
            if found is None:
                found = self._fits[offer.kind] = fit(self._need, offer)
            if not found.code and found.units > offer.allocatable - offer.used:
                said = f"{offer.free} of its {offer.allocatable} {offer.resource} are free, {found.units} are needed."
                found = Fit("gpu-busy", said)
            if found.code:
                if miss is _NO_GPU or _NEAREST.index(found.code) < _NEAREST.index(miss.code):
                    miss = found
            elif best is None or (found.rank, -offer.shares) < (best_fit.rank, -best.shares):
                best, best_fit = offer, found
        return (best, best_fit) if best else (None, miss)

    def cost(self, node: Node, offer: Offer | None, chosen: Fit) -> float:
        """GPU-seconds that choosing a node costs beside the wait for it."""
        cost = NEXT_MODEL_GPU_S * chosen.rank + (SPOT_GPU_S if node.is_spot is self._against else 0.0)
        if offer is not None:
            was_empty = not (offer.used or any(other.used for other in node.offers))
            left = offer.allocatable - offer.used - chosen.units if was_empty else -chosen.units
            cost += STRANDED_GPU_S * left / offer.shares
        return cost + UNUSABLE_GPU_S * self._unusable(node, offer, chosen)

    def _unusable(self, node: Node, chosen: Offer | None, taken: Fit) -> float:
        """How many GPUs there become of no use to anybody, by the GPUs that it takes and by the CPU."""
        cpu_milli, more = node.free_cpu_milli, 0.0
        cpu_left_milli = cpu_milli - self._need.cpu_milli
        for offer in node.offers:
            free = offer.allocatable - offer.used
            if free > 0:
                left = free - taken.units if offer is chosen else free
                more += self._mix.more_unusable(offer, (free, cpu_milli), (left, cpu_left_milli)) / offer.shares
        return more


def _short(need: Need, node: Node) -> Fit:
    if need.cpu_milli > node.free_cpu_milli:
        return Fit("cpu", f"{node.free_cpu_milli}m CPU are free, {need.cpu_milli}m are needed.")
    free, needed = format_size(node.free_memory_bytes), format_size(need.host_memory_bytes)
    return Fit("memory", f"{free} of memory are free, {needed} are needed.")


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


WRONG_GPU = frozenset({"gpu-model", "gpu-memory", "compute-capability"})
"""Codes of verdicts that stay as long as a node has the GPUs that it has."""


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
