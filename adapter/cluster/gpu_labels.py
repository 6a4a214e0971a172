"""What labels of a node say of its GPUs: every vendor's and cloud's, of the units of one resource.

Pure. A label that makes no sense says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from adapter.keys import NVIDIA_GPU

Labels: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What some labels say of the units of a resource; empty and 0 where they do not."""

    model: str = ""
    memory_bytes: int = 0
    compute_capability: tuple[int, int] | None = None
    mig_profile: str = ""
    shares: int = 0


def facts_of(labels: Labels, resource: str) -> GpuFacts:
    return _merged(extract(labels, resource) for extract in _EXTRACTORS)


def _merged(found: Iterable[GpuFacts]) -> GpuFacts:
    """The first word on each thing."""
    merged: dict[str, Any] = {}
    for facts in found:
        for item in fields(GpuFacts):
            merged[item.name] = merged.get(item.name) or getattr(facts, item.name)
    return GpuFacts(**merged)


_MI = 2**20


def _feature_discovery(labels: Labels, resource: str) -> GpuFacts:
    """NVIDIA's GPU Feature Discovery, of whole GPUs, shared ones, and slices that are all alike (`single`)."""
    if resource not in (NVIDIA_GPU, f"{NVIDIA_GPU}.shared"):
        return GpuFacts()
    product = labels.get("nvidia.com/gpu.product", "").removesuffix("-SHARED")
    model, _, profile = product.partition("-MIG-")
    return GpuFacts(
        model=model,
        memory_bytes=_number(labels.get("nvidia.com/gpu.memory")) * _MI,
        compute_capability=_capability(labels),
        mig_profile=profile,
        shares=_number(labels.get("nvidia.com/gpu.replicas")),
    )


def _mixed_slices(labels: Labels, resource: str) -> GpuFacts:
    """Feature Discovery where slices are resources of their own (`mixed`)."""
    if not resource.startswith("nvidia.com/mig-"):
        return GpuFacts()
    name = resource.removesuffix(".shared")
    product = labels.get(f"{name}.product") or labels.get("nvidia.com/gpu.product", "")
    return GpuFacts(
        model=product.removesuffix("-SHARED").partition("-MIG-")[0],
        memory_bytes=_number(labels.get(f"{name}.memory")) * _MI,
        compute_capability=_capability(labels),
        mig_profile=name.removeprefix("nvidia.com/mig-"),
        shares=_number(labels.get(f"{name}.replicas")),
    )


def _capability(labels: Labels) -> tuple[int, int] | None:
    major = _number(labels.get("nvidia.com/gpu.compute.major"))
    return (major, _number(labels.get("nvidia.com/gpu.compute.minor"))) if major else None


def _gke(labels: Labels, resource: str) -> GpuFacts:
    """Google's nodes, which sell slices and shares as whole GPUs."""
    if resource != NVIDIA_GPU:
        return GpuFacts()
    return GpuFacts(
        model=labels.get("cloud.google.com/gke-accelerator", ""),
        mig_profile=labels.get("cloud.google.com/gke-gpu-partition-size", ""),
        shares=_number(labels.get("cloud.google.com/gke-max-shared-clients-per-gpu")),
    )


def _karpenter(labels: Labels, resource: str) -> GpuFacts:
    """Karpenter's instance labels on AWS and Azure, which are there before a node is."""
    if not resource.startswith("nvidia.com/"):
        return GpuFacts()
    return GpuFacts(
        model=labels.get("karpenter.k8s.aws/instance-gpu-name") or labels.get("karpenter.azure.com/sku-gpu-name", ""),
        memory_bytes=0 if "mig-" in resource else _number(labels.get("karpenter.k8s.aws/instance-gpu-memory")) * _MI,
    )


def _eks(labels: Labels, resource: str) -> GpuFacts:
    """The label that AWS documents for its cluster autoscaler."""
    return GpuFacts(model=labels.get("k8s.amazonaws.com/accelerator", "") if resource.startswith("nvidia.com/") else "")


def _amd(labels: Labels, resource: str) -> GpuFacts:
    """AMD's labeller; older ones write ``beta.amd.com/gpu.vram.64G=1``. Partitions count as slices."""
    if not resource.startswith("amd.com/"):
        return GpuFacts()
    product = labels.get("amd.com/gpu.product-name") or labels.get("beta.amd.com/gpu.product-name", "")
    vram = labels.get("amd.com/gpu.vram") or labels.get("beta.amd.com/gpu.vram", "")
    vram = vram or _in_key(labels, "beta.amd.com/gpu.vram.")
    kind = resource.removeprefix("amd.com/")
    return GpuFacts(
        model=product or _in_key(labels, "beta.amd.com/gpu.product-name."),
        memory_bytes=_number(vram.removesuffix("G")) * 2**30,
        mig_profile="" if kind == "gpu" else kind,
    )


def _intel(labels: Labels, resource: str) -> GpuFacts:
    if not resource.startswith("gpu.intel.com/"):
        return GpuFacts()
    return GpuFacts(
        model=labels.get("gpu.intel.com/product", ""), memory_bytes=_number(labels.get("gpu.intel.com/memory.max"))
    )


_EXTRACTORS: tuple[Callable[[Labels, str], GpuFacts], ...] = (
    _feature_discovery, _mixed_slices, _gke, _karpenter, _eks, _amd, _intel,
)  # fmt: skip
"""Of two that know a thing, the first is believed: what looked at the hardware before what a provider calls it."""


def _in_key(labels: Labels, prefix: str) -> str:
    return next((key.removeprefix(prefix) for key in sorted(labels) if key.startswith(prefix)), "")


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 19 else 0
