"""A function's replicas as pods: what is sent to the API server, and what is read in what comes back. Pure.

A deployment's record is a ConfigMap (`record_name`), which owns the pods and the Service of its function: whoever deletes
it deletes them. Where a pod runs is not decided here: its annotations say what the spec asks for, and the pod webhook
and the scheduler do the rest.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapter.cluster.intent import split_constraints
from adapter.cluster.inventory import is_gpu
from adapter.errors import ConfigError
from adapter.hosts import Deployment
from adapter.hosts.process import settings_of
from adapter.keys import DOMAIN, NVIDIA_GPU, OPENFAAS_LABEL, PLACEMENT_ANNOTATION, REVISION_LABEL, SECRETS_PATH
from adapter.spec import FIELDS, FunctionSpec

PORT = 8080
MANAGED_BY, MANAGER = "app.kubernetes.io/managed-by", "gpufn"
SELECTOR = f"{OPENFAAS_LABEL},{MANAGED_BY}={MANAGER}"
"""Of our records and pods."""

_NAME_LIMIT = 63
_SUFFIX_BYTES = 4
_DRAIN_SLACK_S = 10.0
"""Kubernetes kills what is left this much later than an entrypoint ends its drain."""

_SAID = frozenset({"function", "namespace", "revision", "replica", "queue", "held", "body_limit_bytes", "in_flight",
                   "start_timeout_s", "exec_timeout_s", "write_timeout_s", "process_snapshot", "weight_snapshot",
                   "snapshot_env"})  # fmt: skip
"""Settings that a pod is told. Where its snapshots lie and whose they are, the pod webhook says."""

_NOT_A_PODS = frozenset({"park_after_s"})
"""Of the spec: no pod parks."""

_CONSTRAINT = re.compile(r"\s*([^\s=!]+?)\s*={1,2}\s*([^\s=!]*)\s*")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_QUALIFIED = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_ANNOTATIONS_LIMIT_BYTES = 256 * 2**10


# What is sent ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Owner:
    """The record of a function: the object that owns all that is made for it."""

    name: str
    uid: str

    def reference(self) -> dict[str, Any]:
        return {
            "apiVersion": "v1", "kind": "ConfigMap", "name": self.name, "uid": self.uid,
            "controller": True, "blockOwnerDeletion": False,
        }  # fmt: skip


def record_name(function: str) -> str:
    return f"function-{function}"


def new_identity(function: str) -> str:
    """A pod's name, which is also its host name: of the function's as much as there is room for."""
    suffix = secrets.token_hex(_SUFFIX_BYTES)
    return f"{function[: _NAME_LIMIT - len(suffix) - 1].rstrip('-')}-{suffix}"


def check_terms(deployment: Deployment) -> None:
    """Raises `ConfigError` for what the API server would refuse later, with words of its own."""
    terms = deployment.terms
    for name, value in terms.labels:
        if not _QUALIFIED.fullmatch(name) or not _LABEL_VALUE.fullmatch(value):
            raise ConfigError(
                f"The label {name}={value!r} of {deployment.key} cannot be used.",
                why="On Kubernetes it becomes a label of pods.",
                hint="Use letters, digits, - _ and ., at most 63; for other texts use an annotation.",
                code="bad-label",
            )
    for name, _ in terms.annotations:
        if not _QUALIFIED.fullmatch(name):
            raise ConfigError(
                f"The annotation {name!r} of {deployment.key} cannot be used.",
                why="On Kubernetes it becomes an annotation of pods.",
                hint="Name it like example.com/name: letters, digits, - _ and . after the slash.",
                code="bad-annotation",
            )
    if sum(len(name) + len(value) for name, value in terms.annotations) > _ANNOTATIONS_LIMIT_BYTES:
        raise ConfigError(f"The annotations of {deployment.key} are larger than 256 KiB.", code="bad-annotation")
    node_selector(deployment)


def node_selector(deployment: Deployment) -> dict[str, str]:
    """Of the deployment's constraints that are no key of the spec's. Raises `ConfigError`."""
    selector = {}
    for text in deployment.terms.constraints:
        if split_constraints([text])[0]:
            continue
        match = _CONSTRAINT.fullmatch(text)
        label = match[1].removeprefix("node.labels.") if match else ""
        if match is None or not _QUALIFIED.fullmatch(label) or not _LABEL_VALUE.fullmatch(match[2]):
            raise ConfigError(
                f"The constraint {text!r} of {deployment.key} cannot be used.",
                why="On Kubernetes it says which label a node has.",
                hint="Write it as LABEL=VALUE, for example kubernetes.io/arch=arm64",
                code="bad-constraint",
            )
        selector[label] = match[2]
    return selector


def annotations_of(spec: FunctionSpec) -> dict[str, str]:
    """Those from which `adapter.spec.parse_spec` makes the same spec, but for what is the image's and `_NOT_A_PODS`."""
    annotations = {}
    for item in FIELDS:
        value = getattr(spec, item.name)
        depends = item.name == "in_flight" or (item.name == "gpus" and bool(spec.mig_profile))  # on other keys
        if not item.is_built_in and item.name not in _NOT_A_PODS and (depends or value != item.default):
            annotations[f"{DOMAIN}/{item.annotation}"] = _as_text(value, item.form.none)
    return annotations


def _as_text(value: object, none: str) -> str:
    if value is None:
        return none
    if isinstance(value, tuple):
        is_version = bool(value) and isinstance(value[0], int)
        return ("." if is_version else ",").join(str(part) for part in value)
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")  # never in scientific notation
    return str(value)


def drain_s(deployment: Deployment) -> int:
    """How long a replica may take to end once it is asked to."""
    settings = settings_of(deployment)
    return math.ceil(settings.healthcheck_interval_s + settings.write_timeout_s + _DRAIN_SLACK_S)


def pod_of(
    deployment: Deployment,
    identity: str,
    owner: Owner,
    *,
    snapshots: bool = False,
    pull_secrets: Collection[str] = (),
    pull_policy: str = "",
) -> dict[str, Any]:
    """One replica. `pull_secrets`: those of the deployment's secrets that are for pulling its image.

    `snapshots`: its namespace lets it keep some, so that the pod webhook gives it a system-call profile of ours, and
    the file of a CRIU its right.
    """
    snapshots = snapshots and deployment.spec.process_snapshot != "off"
    confined = {} if snapshots else {"allowPrivilegeEscalation": False, "seccompProfile": {"type": "RuntimeDefault"}}
    terms = deployment.terms
    mounted = [name for name in deployment.secrets if name not in pull_secrets]
    volumes, mounts = _volumes(mounted, read_only_root=terms.read_only_root)
    path = "/_/ready" if terms.holds_requests else "/_/health"
    container: dict[str, Any] = {
        "name": deployment.name,
        "image": deployment.image,
        "env": [{"name": name, "value": value} for name, value in sorted(_environment(deployment, identity).items())],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": _resources(deployment),
        "securityContext": {
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": terms.read_only_root,
            **({"runAsNonRoot": True} if _is_plainly_nobody(terms.user) else {}),
            **confined,
        },
        "readinessProbe": {"httpGet": {"path": path, "port": PORT}, "periodSeconds": 1, "timeoutSeconds": 1},
        "volumeMounts": mounts,
    }
    if pull_policy:
        container["imagePullPolicy"] = pull_policy
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": identity,
            "namespace": deployment.namespace,
            "labels": {**dict(terms.labels), **_own_labels(deployment), REVISION_LABEL: deployment.revision},
            "annotations": {
                "prometheus.io.scrape": "false",
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "true",  # another is started for the next request
                **_passed_on(terms.annotations),
                **annotations_of(deployment.spec),
            },
            "ownerReferences": [owner.reference()],
        },
        "spec": {
            "restartPolicy": "Always",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": drain_s(deployment),
            "nodeSelector": node_selector(deployment),
            "imagePullSecrets": [{"name": name} for name in deployment.secrets if name in pull_secrets],
            "containers": [container],
            "volumes": volumes,
        },
    }


def service_of(deployment: Deployment, owner: Owner) -> dict[str, Any]:
    """By which other pods reach the replicas there are, past the gateway: it wakes none."""
    labels = _own_labels(deployment)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": deployment.name,
            "namespace": deployment.namespace,
            "labels": labels,
            "ownerReferences": [owner.reference()],
        },
        "spec": {
            "type": "ClusterIP",
            "selector": labels,
            "ports": [{"name": "http", "port": PORT, "targetPort": PORT, "protocol": "TCP"}],
        },
    }


def _own_labels(deployment: Deployment) -> dict[str, str]:
    return {OPENFAAS_LABEL: deployment.name, MANAGED_BY: MANAGER}


def _passed_on(annotations: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The user's own; of ours only what the spec is made from, in its words."""
    return {name: value for name, value in annotations if not name.startswith(f"{DOMAIN}/")}


def _environment(deployment: Deployment, identity: str) -> dict[str, str]:
    """The deployment's variables, and ours over them."""
    settings = settings_of(deployment)
    own = dict(deployment.env)
    said = settings.to_env(_SAID - {"replica"}) | {"GPUFN_REPLICA": identity, "PORT": str(PORT)}
    if deployment.terms.command:
        said["fprocess"] = deployment.terms.command
    if own.get("PYTHONPATH") and deployment.terms.python_path:
        said["PYTHONPATH"] = f"{own['PYTHONPATH']}:{deployment.terms.python_path}"
    if not deployment.spec.gpus:  # images ask NVIDIA's runtime for all GPUs of a node
        said |= {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void", **settings.to_env({"device"})}
    return own | said


def _resources(deployment: Deployment) -> dict[str, Any]:
    limits, requests = dict(deployment.terms.limits), dict(deployment.terms.requests)
    gpus = {name: amount for name, amount in (requests | limits).items() if is_gpu(name)}
    spec = deployment.spec
    if not gpus and spec.gpus >= 1 and not spec.mig_profile:  # shares and slices have names that the pod webhook knows
        gpus = {NVIDIA_GPU: f"{spec.gpus:g}"}
    limits |= gpus
    requests = {name: amount for name, amount in requests.items() if name not in gpus}  # they are their limits
    return {name: value for name, value in (("limits", limits), ("requests", requests)) if value}


def _volumes(mounted: Sequence[str], *, read_only_root: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes of a pod, and where its container sees them."""
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    if mounted:
        sources = [{"secret": {"name": name}} for name in mounted]
        volumes.append({"name": "secrets", "projected": {"sources": sources}})
        mounts.append({"name": "secrets", "mountPath": SECRETS_PATH, "readOnly": True})
    if read_only_root:
        volumes.append({"name": "tmp", "emptyDir": {}})
        mounts.append({"name": "tmp", "mountPath": "/tmp"})  # noqa: S108  # of its container
    return volumes, mounts


def _is_plainly_nobody(user: str) -> bool:
    """A user by number: by a name, a kubelet cannot know whether it is root."""
    number = user.partition(":")[0]
    return number.isdecimal() and int(number) != 0


# What is read ------------------------------------------------------------------------------------


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
