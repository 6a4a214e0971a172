"""A function's replicas as pods: what is sent to the API server. Pure; what comes back is `adapter.hosts.kubernetes_status`'s.

A deployment's record is a ConfigMap (`record_name`), which owns the pods and the Service of its function: whoever deletes
it deletes them. Where a pod runs is not decided here: its annotations say what the spec asks for, and the pod webhook
and the scheduler do the rest.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from adapter.cluster.intent import split_constraints
from adapter.cluster.inventory import is_gpu
from adapter.errors import ConfigError
from adapter.hosts import Deployment
from adapter.hosts.process import settings_of
from adapter.keys import DOMAIN, NVIDIA_GPU, OPENFAAS_LABEL, REVISION_LABEL, SECRETS_PATH
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
    terms = deployment.terms
    mounted = [name for name in deployment.secrets if name not in pull_secrets]
    volumes, mounts = _volumes(mounted, read_only_root=terms.read_only_root)
    container = _container(deployment, identity, snapshots=snapshots)
    policy = {"imagePullPolicy": pull_policy} if pull_policy else {}
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
            "containers": [container | {"volumeMounts": mounts} | policy],
            "volumes": volumes,
        },
    }


def _container(deployment: Deployment, identity: str, *, snapshots: bool) -> dict[str, Any]:
    """Without what depends on the pod around it."""
    terms = deployment.terms
    snapshots = snapshots and deployment.spec.process_snapshot != "off"
    confined = {} if snapshots else {"allowPrivilegeEscalation": False, "seccompProfile": {"type": "RuntimeDefault"}}
    path = "/_/ready" if terms.holds_requests else "/_/health"
    return {
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
