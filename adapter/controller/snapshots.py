"""Process snapshots on nodes: which are due, one pod at a time on each node, and what came of it.

A replica that started slowly says that a snapshot is due; its node's agent says so in the node's `GpuNode`; here the
pod that takes it is made (`snapshot_pod`). Everything is found anew from what the cluster has: a pod that is there is
work that goes on, one that failed is a reason to wait, whoever leads.

A pod that needs a GPU may have to wait until the replica that it was made for has gone. It holds nothing meanwhile, so
those that need none have their turns.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from adapter.controller.snapshot_pod import FOR_ANNOTATION, has_gpu, node_of
from adapter.keys import SNAPSHOT_OF_ANNOTATION
from adapter.units import format_duration, format_size

RETRY_S = 3600.0
"""After a snapshot that failed the same function is left alone on that node: what hindered seldom passes sooner."""
_SEEN_S = 60.0
"""An agent writes what it has seen within ten seconds; until then what was taken may still be called due."""
_UNSCHEDULED_S = 600.0
"""A pod that found no place for so long is given up."""
_GPU_UNSCHEDULED_S = 3600.0
"""The same of one that needs a GPU, for as long as its replica is called: another function's has its turn then."""
_ACTIVE = frozenset({"Pending", "Running", "Unknown"})


@dataclass(frozen=True, slots=True)
class Due:
    """A replica whose next start on its node would be faster with a snapshot."""

    namespace: str
    pod: str


@dataclass(frozen=True, slots=True)
class Taking:
    """A pod that takes a snapshot, or has. `message` is what it said last; instants are seconds since the epoch."""

    namespace: str
    name: str
    wanted_on: str
    """The node that it is for."""
    node: str
    """The node that it runs on: empty until it has a place."""
    snapshot: str
    for_pod: str
    phase: str
    message: str
    began_at_s: float
    ended_at_s: float
    has_gpu: bool = False
    made_room: bool = False
    """It ended because another pod was to have its place."""
    ran: bool = True
    """Its function was ever run: a kubelet may refuse a pod that the scheduler gives it, as it sees GPUs later free."""

    @property
    def waits(self) -> bool:
        """It holds nothing of a node yet."""
        return self.phase == "Pending" and not self.node

    @property
    def patience_s(self) -> float:
        return _GPU_UNSCHEDULED_S if self.has_gpu else _UNSCHEDULED_S

    @property
    def is_over(self) -> bool:
        return self.phase not in _ACTIVE

    @property
    def worked(self) -> bool:
        return self.phase == "Succeeded"

    @property
    def news(self) -> str:
        """What came of it, for people."""
        if self.made_room and not self.worked:
            return f"No snapshot {self.snapshot} on {self.wanted_on} yet: its pod made room for another."
        try:
            said = dict(json.loads(self.message.splitlines()[-1]))
            if self.worked:
                size, seconds = format_size(int(said["bytes"])), format_duration(float(said["seconds"]))
                return f"Took the snapshot {self.snapshot} on {self.wanted_on}: {size} in {seconds}."
            reason = f"{said['reason']} [{said['code']}]"
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            OverflowError,
            RecursionError,
        ):  # a function may have said it
            reason = self.message.strip() or "its pod said nothing"
        if self.worked:
            return f"Took the snapshot {self.snapshot} on {self.wanted_on}."
        return f"No snapshot {self.snapshot} on {self.wanted_on}, replicas there load as before: {reason}"


@dataclass(frozen=True, slots=True)
class Step:
    """What to do on one node now. `take`: candidates in order, of which the first that is new is begun; where a GPU is
    waited for already (`gpu_waits`), the first that needs none."""

    clear: tuple[Taking, ...] = ()
    give_up: tuple[Taking, ...] = ()
    take: tuple[Due, ...] = ()
    gpu_waits: bool = False
    again_s: float | None = None
    """Seconds until time alone may change the answer."""


def next_step(due: Iterable[Due] | None, takings: Iterable[Taking], now_s: float) -> Step:
    """For one node; `due` is None where it is gone, and what waits for it waits in vain.

    What is over is kept as long as it keeps others from trying the same again: what failed for `RETRY_S`, what was never
    run as long as any pod may wait for its place, what worked until the node's agent has seen it and says that nothing is
    due there any more.
    """
    is_gone = due is None
    due, takings = set(due or ()), sorted(takings, key=lambda taking: taking.name)
    stuck = [t for t in takings if t.waits and (is_gone or now_s - t.began_at_s >= t.patience_s)]
    active = [taking for taking in takings if not taking.is_over and taking not in stuck]
    waiting = [taking for taking in active if taking.waits]
    for_gpu = [taking for taking in waiting if taking.has_gpu]
    waited_for = {item.namespace for item in due}
    until_s = {taking: taking.ended_at_s + _kept_s(taking, waited_for) for taking in takings if taking.is_over}
    old = [taking for taking, end_s in until_s.items() if now_s >= end_s]
    deadlines = [end_s for taking, end_s in until_s.items() if taking not in old]
    deadlines += [taking.began_at_s + taking.patience_s for taking in waiting]
    return Step(
        clear=tuple(old),
        give_up=tuple(stuck),
        take=() if len(active) > len(for_gpu) else tuple(sorted(due, key=lambda item: (item.namespace, item.pod))),
        gpu_waits=bool(for_gpu),
        again_s=max(1.0, min(deadlines) - now_s) if deadlines else None,
    )


def outdated(takings: Iterable[Taking], snapshot: str, due: Collection[Due]) -> list[Taking]:
    """Where another revision or image of a function is due: those that wait for a GPU and whose replica is due no more.
    What they would take nobody may start from again, and the GPU-seconds are the function's."""
    return [
        taking
        for taking in takings
        if taking.waits and taking.has_gpu and taking.snapshot == snapshot
        if Due(taking.namespace, taking.for_pod) not in due
    ]


def _kept_s(taking: Taking, waited_for: Collection[str]) -> float:
    """How long what is over keeps others from trying the same. `waited_for`: namespaces in which something is due."""
    if taking.worked:
        return RETRY_S if taking.namespace in waited_for else _SEEN_S
    if taking.made_room:
        return 0.0
    return RETRY_S if taking.ran else _UNSCHEDULED_S


def due_of(gpu_node: Mapping[str, Any]) -> tuple[Due, ...]:
    """What a node's agent says. Anything else than names is left out: an agent could be of another version."""
    items = (gpu_node.get("status") or {}).get("snapshotsDue") or ()
    return tuple(
        Due(item["namespace"], item["pod"])
        for item in items
        if isinstance(item, Mapping) and isinstance(item.get("namespace"), str) and isinstance(item.get("pod"), str)
    )


def taking_of(pod: Mapping[str, Any]) -> Taking:
    """A pod that `snapshot_pod` made."""
    metadata, spec, status = pod["metadata"], pod["spec"], pod.get("status") or {}
    annotations = metadata.get("annotations") or {}
    states = [each.get("state") or {} for each in status.get("containerStatuses") or ()]
    ended: Mapping[str, Any] = next((state["terminated"] for state in states if "terminated" in state), {})
    began_at_s = _seconds(metadata["creationTimestamp"])
    return Taking(
        namespace=metadata["namespace"],
        name=metadata["name"],
        wanted_on=node_of(pod),
        node=spec.get("nodeName", ""),
        snapshot=annotations.get(SNAPSHOT_OF_ANNOTATION, ""),
        for_pod=annotations.get(FOR_ANNOTATION, ""),
        phase=status.get("phase", "Pending"),
        message=ended.get("message") or status.get("message") or ended.get("reason", ""),
        ran=any("running" in state or "terminated" in state for state in states),
        began_at_s=began_at_s,
        ended_at_s=_seconds(ended["finishedAt"]) if ended.get("finishedAt") else began_at_s,
        has_gpu=has_gpu(pod),
        made_room=_made_room(status),
    )


def _made_room(status: Mapping[str, Any]) -> bool:
    """The scheduler says so before it deletes a pod; a kubelet, where a pod that its node cannot do without comes."""
    conditions = status.get("conditions") or ()
    said = [c.get("reason") for c in conditions if c.get("type") == "DisruptionTarget" and c.get("status") == "True"]
    return "PreemptionByScheduler" in said or status.get("reason") == "Preempting"


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
