"""A function's replicas as the API server tells of them: what is read in a pod, and what it means. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapter.hosts.kubernetes_pods import PORT
from adapter.keys import OPENFAAS_LABEL, PLACEMENT_ANNOTATION, REVISION_LABEL


@dataclass(frozen=True, slots=True)
class Ending:
    """How a container ended. `signal` 0: by itself."""

    exit_code: int
    reason: str = ""
    signal: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Pod:
    """A replica's pod as its status says it. `reason` and `message` are the pod's own; `waiting` is what its container
    waits for, `disrupted` who ends the pod, `unscheduled` what the scheduler says, `placement` why the webhook found no node."""

    name: str
    namespace: str
    uid: str
    function: str
    revision: str
    owner: str
    phase: str = ""
    ip: str = ""
    port: int = PORT
    node: str = ""
    is_ready: bool = False
    is_running: bool = False
    is_ending: bool = False
    restarts: int = 0
    waiting: str = ""
    waiting_message: str = ""
    ended: Ending | None = None
    """The container's last end, if it has had one."""
    reason: str = ""
    message: str = ""
    disrupted: str = ""
    unscheduled: str = ""
    placement: str = ""
    memory_limit: str = ""

    @property
    def key(self) -> str:
        """Of its function."""
        return f"{self.function}.{self.namespace}"

    @property
    def no_room(self) -> str:
        """Why no node takes it: as the webhook says it of GPUs, else in the scheduler's words. Empty where one may."""
        return (self.placement or self.unscheduled) if self.unscheduled else ""


def read_pod(data: Mapping[str, Any]) -> Pod:
    """Of the API server's JSON. Raises `KeyError` where it is no pod of ours."""
    metadata, status = data["metadata"], data.get("status") or {}
    labels = metadata["labels"]
    conditions = {one.get("type"): one for one in status.get("conditions") or ()}
    container: Mapping[str, Any] = next(iter((data.get("spec") or {}).get("containers") or ()), {})
    state: Mapping[str, Any] = next(
        (one for one in status.get("containerStatuses") or () if one["name"] == container.get("name")), {}
    )
    now, before = state.get("state") or {}, state.get("lastState") or {}
    waiting = now.get("waiting") or {}
    owners = [one["uid"] for one in metadata.get("ownerReferences") or () if one.get("controller")]
    return Pod(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        function=labels[OPENFAAS_LABEL],
        revision=labels.get(REVISION_LABEL, ""),
        owner=next(iter(owners), ""),
        phase=status.get("phase", ""),
        ip=status.get("podIP") or "",
        port=next((one["containerPort"] for one in container.get("ports") or ()), PORT),
        node=(data.get("spec") or {}).get("nodeName") or "",
        is_ready=_is(conditions, "Ready", "True"),
        is_running="running" in now,
        is_ending="deletionTimestamp" in metadata,
        restarts=int(state.get("restartCount") or 0),
        waiting=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        ended=_ending(now.get("terminated") or before.get("terminated")),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        disrupted=conditions["DisruptionTarget"].get("message", "")
        if _is(conditions, "DisruptionTarget", "True")
        else "",
        unscheduled=conditions["PodScheduled"].get("message", "") if _is(conditions, "PodScheduled", "False") else "",
        placement=_why_no_node((metadata.get("annotations") or {}).get(PLACEMENT_ANNOTATION, "")),
        memory_limit=((container.get("resources") or {}).get("limits") or {}).get("memory", ""),
    )


def _why_no_node(note: str) -> str:
    """Of what the pod webhook noted of its decision; empty where it found a node, or noted nothing that can be read."""
    try:
        why = json.loads(note).get("why", "")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return why if isinstance(why, str) else ""


def _is(conditions: Mapping[Any, Mapping[str, Any]], name: str, status: str) -> bool:
    return name in conditions and conditions[name].get("status") == status


def _ending(terminated: Mapping[str, Any] | None) -> Ending | None:
    if terminated is None:
        return None
    return Ending(
        int(terminated.get("exitCode") or 0),
        str(terminated.get("reason") or ""),
        int(terminated.get("signal") or 0),
        str(terminated.get("message") or ""),
    )


# What it means -----------------------------------------------------------------------------------

_HOPELESS = {
    "ImagePullBackOff": "image-pull-failed",
    "InvalidImageName": "image-pull-failed",
    "ErrImageNeverPull": "image-pull-failed",
    "CreateContainerConfigError": "container-refused",
    "CreateContainerError": "container-refused",
    "RunContainerError": "container-refused",
}
"""What a kubelet says of a container that it would try to bring up again and again, and our code for it. A first pull
that fails (ErrImagePull) may be a registry's bad moment."""

OUT_OF_MEMORY, EVICTED, DISRUPTED = "out-of-memory", "evicted", "disrupted"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a replica does not come up, or how it ended: `reason` goes on after "its replica"."""

    code: str
    reason: str
    exit_code: int = -1


def problem_of(pod: Pod, restarts: int = 0) -> Problem | None:
    """Why this pod serves no more, or never will; None while it may. `restarts`: how many of its container's are known.

    A container that ended is the end of its replica, though its kubelet starts it again: what it was sent is lost, and
    the next one may be better off elsewhere.
    """
    if pod.phase in ("Failed", "Succeeded") or (pod.disrupted and pod.is_ending):
        return _pod_ended(pod)
    if pod.ended is not None and (pod.restarts > restarts or not (pod.is_running or pod.waiting)):
        return container_ended(pod)
    if pod.waiting in _HOPELESS:
        return Problem(_HOPELESS[pod.waiting], f"cannot be started: {pod.waiting_message or pod.waiting}")
    return None


def _pod_ended(pod: Pod) -> Problem:
    if pod.reason == "Evicted":
        return Problem(EVICTED, f"was evicted: {pod.message}".rstrip(": "))
    if pod.disrupted:
        return Problem(DISRUPTED, f"was ended by the cluster: {pod.disrupted}")
    if pod.ended is not None:
        return container_ended(pod)
    return Problem("pod-ended", f"ended: {pod.reason or pod.phase} {pod.message}".strip())


def container_ended(pod: Pod) -> Problem:
    """Of a pod whose container has ended."""
    assert pod.ended is not None
    ended = pod.ended
    if ended.reason == "OOMKilled":
        limit = f" (its limit is {pod.memory_limit})" if pod.memory_limit else ""
        return Problem(OUT_OF_MEMORY, f"was killed: out of memory{limit}", ended.exit_code)
    if ended.signal or ended.exit_code > 128:
        return Problem("replica-died", f"was killed by signal {ended.signal or ended.exit_code - 128}", ended.exit_code)
    if ended.exit_code == 0:
        return Problem("replica-died", "drained", 0)
    said = f": {ended.message}" if ended.message else ""
    return Problem("replica-died", f"ended with code {ended.exit_code}{said}", ended.exit_code)


def hindrance_of(pod: Pod) -> str:
    """What a pod that does not run waits for, for people; empty where it runs, or is on its way as it should."""
    if pod.is_running:
        return ""
    if pod.no_room:
        return f"no node takes it: {pod.no_room}"
    if pod.waiting in ("ErrImagePull", *_HOPELESS):
        return f"{pod.waiting}: {pod.waiting_message}".rstrip(": ")
    return ""


def answers_requests(pod: Pod, *, holds_requests: bool) -> bool:
    """Whether a request may be sent there: at once where an entrypoint of ours holds it, else once it says it is ready."""
    return bool(pod.ip) and pod.is_running and not pod.is_ending and (holds_requests or pod.is_ready)
