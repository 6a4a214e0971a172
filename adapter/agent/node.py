"""What the node has, as the object `GpuNode` of its name: for whoever places pods, and for `kubectl get gpunodes`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from adapter import __version__
from adapter.agent.cache import Cached
from adapter.cluster.api import Api
from adapter.cluster.resources import GPU_NODES, NODES
from adapter.hosts import Inventory

_USED_STEP_NS = 60 * 10**9
"""A restore is not worth a write to the API server sooner."""
_LAST_NS = 253_402_300_799 * 10**9
"""The last second of the year 9999."""
_SNAPSHOTS = 4096
_GPUS = 256
_TEXT = 2048


@dataclass(frozen=True, slots=True)
class Gpu:
    """`slice`: its MIG profile, empty for a whole GPU. `memory_bytes` is 0 where nobody says."""

    uuid: str
    model: str = ""
    memory_bytes: int = 0
    slice: str = ""


def gpus_of(inventory: Inventory, allocatable: Iterable[str], labels: Mapping[str, str]) -> list[Gpu]:
    """Those that the driver lists, and those that the kubelet hands out though no driver is seen from here: what these
    are only the node's labels say."""
    seen = {
        device.uuid: Gpu(
            device.uuid,
            device.model,
            device.memory_bytes,
            device.model.partition(" MIG ")[2] if device.is_slice else "",
        )
        for device in inventory.devices
    }
    model = labels.get("nvidia.com/gpu.product", "")
    memory = labels.get("nvidia.com/gpu.memory", "")
    memory_bytes = int(memory) * 2**20 if memory.isascii() and memory.isdecimal() else 0
    for uuid in allocatable:
        if uuid not in seen:
            seen[uuid] = Gpu(uuid, model, memory_bytes)
    return sorted(seen.values(), key=lambda gpu: gpu.uuid)


def status_of(
    gpus: Iterable[Gpu],
    inventory: Inventory,
    cached: Iterable[Cached],
    due: Sequence[Mapping[str, str]] = (),
    *,
    disk_bytes_per_s: float,
    why_no_restore: str,
) -> dict[str, Any]:
    """Without the time at which it was observed. Of each function the process snapshot that was used last."""
    listed = [
        {"uuid": gpu.uuid, "model": gpu.model, "memoryBytes": gpu.memory_bytes, "slice": gpu.slice} for gpu in gpus
    ]
    latest: dict[str, Cached] = {}
    for one in cached:
        if one.kind == "process" and (one.name not in latest or latest[one.name].used_at_ns < one.used_at_ns):
            latest[one.name] = one
    by_use = sorted(latest.values(), key=lambda one: -one.used_at_ns)[:_SNAPSHOTS]
    return {
        "agent": {"version": __version__},
        "driver": inventory.driver,
        "whyNot": "" if listed else (inventory.why_not or "The driver lists none.")[:_TEXT],
        "gpus": listed[:_GPUS],
        "snapshots": [
            {"name": one.name, "key": one.key, "bytes": one.bytes, "usedAt": _text(one.used_at_ns)}
            for one in sorted(by_use, key=lambda one: one.name)
        ],
        "snapshotsDue": [dict(one) for one in due] if not why_no_restore else [],
        "diskBytesPerSecond": float(round(disk_bytes_per_s, -6)),
        "restore": {"works": not why_no_restore, "whyNot": why_no_restore[:_TEXT]},
    }


async def write(api: Api, node: str, status: Mapping[str, Any], now_ns: int) -> None:
    """By server-side apply, the object first where it is not there. Raises `AdapterError`."""
    owner = (await api.get(NODES.path(name=node)))["metadata"]
    reference = {"apiVersion": NODES.api_version, "kind": NODES.kind, "name": node, "uid": owner["uid"]}
    body = GPU_NODES.body(node, metadata={"ownerReferences": [reference]})
    await api.apply(GPU_NODES.path(name=node), body, force=True)
    observed = {**status, "observedAt": _text(now_ns, step_ns=10**9)}
    await api.apply(GPU_NODES.path(name=node, part="status"), GPU_NODES.body(node, status=observed), force=True)


async def labels(api: Api, node: str) -> dict[str, str]:
    """The node's. Raises `AdapterError`."""
    found = (await api.get(NODES.path(name=node)))["metadata"].get("labels") or {}
    return {str(name): str(value) for name, value in found.items()}


def _text(at_ns: int, step_ns: int = _USED_STEP_NS) -> str:
    """What is no time that can be written is the nearest one that can: containers write some of these."""
    whole_s = min(max(0, at_ns), _LAST_NS) // step_ns * step_ns // 10**9
    return datetime.fromtimestamp(whole_s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
