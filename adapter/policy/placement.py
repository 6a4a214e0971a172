"""Which node a GPU function's replica should run on.

Pure: nodes and one need in, a verdict for each node out. A node that does not fit says why; those that fit are
ordered by what choosing them costs: seconds until the function answers there, GPUs that nobody can use any more,
GPU nodes that could have become empty, spot machines that may go away.

The scheduler has the last word. What is decided here becomes terms that it weighs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    """A node as placement sees it. `why_not` says why nothing new goes there (cordoned, not ready, …); else empty.

    `snapshots`: the functions whose process snapshot it has (``tenant/name.namespace``), with their bytes.
    `labels`: those that terms can name. CPU and memory are what is free.
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


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica of `function` (``name.namespace``) needs of a node.

    `gpus` is a count, or a share below 1. `models` are in order of preference, empty: any. `memory_bytes`: least GPU
    memory of one unit. `spot`: ``any``, ``prefer``, ``avoid``, ``require`` or ``never``. `snapshot`: the name under
    which its process snapshot would be on a node; empty: it has none. `resource`: what its pod asks for by name
    already; empty: ours to choose.
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


@dataclass(frozen=True, slots=True)
class Verdict:
    """One node for one need. `code` is stable (a metric label), `reason` is for people; both empty where it fits.

    `units` of `resource` are what a pod would ask for there. `wake_s`: estimated seconds until the function answers
    there. `score`, 0 to 100: higher is better.
    """

    node: str
    code: str = ""
    reason: str = ""
    resource: str = ""
    units: int = 0
    wake_s: float = 0.0
    score: float = 0.0

    @property
    def fits(self) -> bool:
        return not self.code
