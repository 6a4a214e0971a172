"""How the default scheduler of Kubernetes chooses a node, as far as our terms meet it there.

Pure, and a model: it says how weights would do before a real scheduler is asked (`benchmarks.stranded`). It knows the
filters of resources and required affinity, the sample of nodes that are looked at, and the scores that differ between
nodes of the trace: preferred affinity, least or most allocated, balanced allocation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from adapter.policy.placement import Need, Node, Offer, Recent, place, preferences
from benchmarks.openb import TraceNode, TracePod

_AFFINITY_WEIGHT = 2
"""Of the plugin NodeAffinity in the default profile; the others here have 1."""
_FEWEST_LOOKED_AT = 100

GPU = "nvidia.com/gpu"


@dataclass(slots=True)
class Fleet:
    """Nodes, and what is free on them."""

    nodes: Sequence[TraceNode]
    cpu: list[int] = field(init=False)
    memory: list[int] = field(init=False)
    gpus: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.cpu = [node.cpu_milli for node in self.nodes]
        self.memory = [node.memory_mib for node in self.nodes]
        self.gpus = [node.gpus for node in self.nodes]

    def take(self, at: int, pod: TracePod) -> None:
        self.cpu[at] -= pod.cpu_milli
        self.memory[at] -= pod.memory_mib
        self.gpus[at] -= pod.gpus

    @property
    def stranded(self) -> int:
        """GPUs left on partly used nodes."""
        return sum(free for free, node in zip(self.gpus, self.nodes, strict=True) if 0 < free < node.gpus)

    @property
    def used(self) -> int:
        return sum(node.gpus for node in self.nodes) - sum(self.gpus)


Terms = Callable[[Fleet, TracePod], Mapping[int, int]]
"""The weights that a pod's preferred terms give to nodes, by their place in the fleet."""


def no_terms(_fleet: Fleet, _pod: TracePod) -> Mapping[int, int]:
    return {}


class Scheduler:
    """`packs`: most allocated counts, GPUs with CPU and memory, instead of least allocated."""

    def __init__(self, fleet: Fleet, *, packs: bool, terms: Terms = no_terms, seed: int = 0) -> None:
        self.fleet, self._packs, self._terms = fleet, packs, terms
        self._chance = random.Random(seed)  # noqa: S311  # the same each time, not secret
        self._next = 0

    def schedule(self, pod: TracePod) -> int | None:
        """The node that it gets; None where it fits nowhere."""
        able = self._able(pod)
        if not able:
            return None
        weights = self._terms(self.fleet, pod)
        most = max((weights.get(at, 0) for at in able), default=0)
        scored = []
        for at in able:
            score = self._allocation(at, pod)
            if most:
                score += _AFFINITY_WEIGHT * (100 * weights.get(at, 0) // most)
            scored.append((score, self._chance.random(), at))
        chosen = max(scored)[2]
        self.fleet.take(chosen, pod)
        return chosen

    def _able(self, pod: TracePod) -> list[int]:
        """Where it fits; of a large fleet only some are looked for, from where the last search ended."""
        fleet, count = self.fleet, len(self.fleet.nodes)
        enough = max(_FEWEST_LOOKED_AT, count * max(5, 50 - count // 125) // 100)
        able: list[int] = []
        for step in range(count):
            at = (self._next + step) % count
            if (
                fleet.gpus[at] >= pod.gpus
                and fleet.cpu[at] >= pod.cpu_milli
                and fleet.memory[at] >= pod.memory_mib
                and (not pod.models or fleet.nodes[at].model in pod.models)
            ):
                able.append(at)
                if len(able) == enough:
                    self._next = at + 1
                    break
        return able

    def _allocation(self, at: int, pod: TracePod) -> int:
        fleet, node = self.fleet, self.fleet.nodes[at]
        cpu = 1 - (fleet.cpu[at] - pod.cpu_milli) / node.cpu_milli
        memory = 1 - (fleet.memory[at] - pod.memory_mib) / node.memory_mib
        balance = int(100 * (1 - abs(cpu - memory) / 2))
        if not self._packs:
            return (int(100 * (1 - cpu)) + int(100 * (1 - memory))) // 2 + balance
        shares = [cpu, memory, *([1 - (fleet.gpus[at] - pod.gpus) / node.gpus] if pod.gpus else [])]
        return sum(int(100 * share) for share in shares) // len(shares) + balance


class OurTerms:
    """What the webhook would say: placement's verdicts, as preferred terms."""

    def __init__(self) -> None:
        self._made: list[Node] = []
        self._recent = Recent()

    def __call__(self, fleet: Fleet, pod: TracePod) -> Mapping[int, int]:
        need = need_of(pod)
        self._recent.add(need)
        nodes = [self._node(fleet, at) for at in range(len(fleet.nodes))]
        terms = preferences(place(need, nodes, self._recent.mix))
        return {int(name): term.weight for term in terms for name in term.nodes}

    def _node(self, fleet: Fleet, at: int) -> Node:
        """As it is now; made anew only where it changed."""
        node = fleet.nodes[at]
        if at == len(self._made):
            self._made.append(Node(f"{at:04}", (Offer(GPU, node.gpus, model=node.model),), -1))
        made, used = self._made[at], node.gpus - fleet.gpus[at]
        if made.free_cpu_milli != fleet.cpu[at] or made.offers[0].used != used:
            made = self._made[at] = replace(
                made,
                offers=(replace(made.offers[0], used=used),),
                free_cpu_milli=fleet.cpu[at],
                free_memory_bytes=fleet.memory[at] * 2**20,
            )
        return made


def need_of(pod: TracePod) -> Need:
    return Need(
        pod.name, float(pod.gpus), pod.models, cpu_milli=pod.cpu_milli, host_memory_bytes=pod.memory_mib * 2**20
    )
