"""The pod that takes a function's snapshots on one node: the function's image, and nothing that serves or knows secrets.

A process can only be dumped where no system-call filter is (docs/explanation/container-rights.md), so it is not done
in a pod that answers requests. This one has the function's image, variables and files, but no secret, no token, no
network (`network_policy`) and no label by which a Service would find it. It ends by itself; what came of it stands in
its termination message. Of a function with GPUs it asks for as many, and waits until they are free; any function's pod
that wants them takes its place.

Pure: a function's pod in, the other pod out.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

from adapter.cluster.intent import PRICE_CLASS_ANNOTATION, Intent
from adapter.cluster.inventory import is_gpu
from adapter.controller.pod_patch import CRIU_VOLUME, SNAPSHOTS_VOLUME
from adapter.hosts.seccomp import RESTORE_RIGHT
from adapter.keys import (
    DOMAIN,
    NODE_CRIU_PATH,
    SNAPSHOT_OF_ANNOTATION,
    SNAPSHOT_PATH,
    SNAPSHOT_REVISION_ANNOTATION,
    TASK_LABEL,
)
from adapter.replica import RESULT_VARIABLE, TASK_SNAPSHOT, TASK_VARIABLE

FOR_ANNOTATION = f"{DOMAIN}/for-pod"
"""The replica that had to start without it."""
_REQUIRED, _NAME_FIELD = "requiredDuringSchedulingIgnoredDuringExecution", "metadata.name"
POLICY_NAME = "gpufn-snapshot-pods"
PRIORITY_CLASS = "gpufn-snapshots"
"""Below every function's, so that none waits for a snapshot, and below what an autoscaler makes a node for."""

_KEPT_VOLUMES = frozenset({"emptyDir", "configMap", "persistentVolumeClaim", "image"})
"""What `load` may need to read; secrets, tokens and what drivers bring are left out."""
_KEPT_RIGHTS = frozenset({"runAsUser", "runAsGroup", "runAsNonRoot"})
_MARGIN_S = 120
"""Beside the start itself: pulling, and writing the dump."""
_LONGEST_START_S = 3600
"""One that hangs keeps others of its node from being taken for so long, whatever its function allows for a start."""
_NO_ISTIO = {"sidecar.istio.io/inject": "false"}
_NO_SIDECARS = {**_NO_ISTIO, "linkerd.io/inject": "disabled"}
"""It has no network for a mesh, and would not end as long as a mesh's container runs. Istio reads both, a label first."""


def snapshot_pod(pod: Mapping[str, Any], intent: Intent, node: str) -> dict[str, Any]:
    """The pod that takes the snapshots of `pod`'s function on `node`. Its name is the same for the same work."""
    spec = pod["spec"]
    container = spec["containers"][intent.container]
    volumes = _volumes(spec.get("volumes") or (), intent.need.snapshot)
    runtime = {key: spec[key] for key in ("runtimeClassName",) if key in spec and _gpus(container)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name_of(intent, node, container["image"]),
            "namespace": intent.namespace,
            "labels": {TASK_LABEL: TASK_SNAPSHOT, **_NO_ISTIO},
            "annotations": {
                SNAPSHOT_OF_ANNOTATION: intent.need.snapshot,
                SNAPSHOT_REVISION_ANNOTATION: intent.revision,
                PRICE_CLASS_ANNOTATION: intent.spec.price_class,
                FOR_ANNOTATION: pod["metadata"]["name"],
                **_NO_SIDECARS,
            },
            "ownerReferences": [_without_control(owner) for owner in pod["metadata"].get("ownerReferences") or ()],
        },
        "spec": {
            "priorityClassName": PRIORITY_CLASS,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": int(min(intent.spec.start_timeout_s, _LONGEST_START_S)) + _MARGIN_S,
            "terminationGracePeriodSeconds": 5,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "affinity": {"nodeAffinity": {_REQUIRED: _only(node)}},
            "tolerations": list(spec.get("tolerations") or ()),
            "imagePullSecrets": list(spec.get("imagePullSecrets") or ()),
            "securityContext": _kept(spec.get("securityContext"), {"fsGroup", "supplementalGroups"}),
            "volumes": volumes,
            "containers": [_container(container, {volume["name"] for volume in volumes})],
            **runtime,
        },
    }


def has_gpu(pod: Mapping[str, Any]) -> bool:
    """Whether such a pod is given GPUs."""
    return any(_gpus(container) for container in pod["spec"].get("containers") or ())


def node_of(pod: Mapping[str, Any]) -> str:
    """The node that such a pod is for; empty where it says none. What it requires of nodes nobody can change."""
    affinity = ((pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}).get(_REQUIRED) or {}
    fields = [item for term in affinity.get("nodeSelectorTerms") or () for item in term.get("matchFields") or ()]
    return next((str(item["values"][0]) for item in fields if item["key"] == _NAME_FIELD and item.get("values")), "")


def _gpus(container: Mapping[str, Any]) -> set[str]:
    """The GPU resources in a container's limits, which its requests repeat."""
    limits = (container.get("resources") or {}).get("limits") or {}
    return {name for name, amount in limits.items() if is_gpu(name) and str(amount) != "0"}


def name_of(intent: Intent, node: str, image: str) -> str:
    """Made of what it is for: whoever else wants the same finds it there."""
    what = f"{intent.need.snapshot}\n{intent.revision}\n{image}\n{node}"
    return f"gpufn-snapshot-{hashlib.blake2b(what.encode(), digest_size=8).hexdigest()}"


def network_policy(namespace: str) -> dict[str, Any]:
    """No traffic to or from pods that take snapshots."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": POLICY_NAME, "namespace": namespace},
        "spec": {"podSelector": {"matchLabels": {TASK_LABEL: TASK_SNAPSHOT}}, "policyTypes": ["Ingress", "Egress"]},
    }


def _container(container: Mapping[str, Any], volumes: set[str]) -> dict[str, Any]:
    kept = {name: copy.deepcopy(container[name]) for name in ("command", "args", "workingDir") if name in container}
    resources = container.get("resources") or {}
    return {
        "name": "snapshot",
        "image": container["image"],
        "imagePullPolicy": "IfNotPresent",  # it runs beside a replica, which has pulled it
        **kept,
        "env": [*_variables(container.get("env") or ()), *_task()],
        "envFrom": [source for source in container.get("envFrom") or () if "configMapRef" in source],
        "resources": {kind: _machine(amounts) for kind, amounts in resources.items() if kind != "claims"},
        "volumeMounts": [
            {**mount, **({"readOnly": True} if mount["name"] == CRIU_VOLUME else {})}
            for mount in container.get("volumeMounts") or ()
            if mount["name"] in volumes
        ],
        "securityContext": {
            **_kept(container.get("securityContext"), {"readOnlyRootFilesystem"}),
            "capabilities": {"drop": ["ALL"], "add": [RESTORE_RIGHT]},
            "seccompProfile": {"type": "Unconfined"},
        },
    }


def _task() -> list[dict[str, str]]:
    own = {
        TASK_VARIABLE: TASK_SNAPSHOT,
        RESULT_VARIABLE: "/dev/termination-log",
        "GPUFN_RUNTIME_DIR": "/tmp",  # noqa: S108  # of its container
    }
    return [{"name": name, "value": value} for name, value in own.items()]


def _variables(env: Any) -> list[dict[str, Any]]:
    """Those whose values are no secret, in their order; ours are set anew."""
    own = {item["name"] for item in _task()}
    return [
        dict(item) for item in env if item["name"] not in own and "secretKeyRef" not in (item.get("valueFrom") or {})
    ]


def _volumes(volumes: Any, snapshot: str) -> list[dict[str, Any]]:
    """Folders of the node only as the pod webhook adds them: a function's pod may have come by others."""
    ours = {SNAPSHOTS_VOLUME: f"{SNAPSHOT_PATH}/{snapshot}", CRIU_VOLUME: NODE_CRIU_PATH}

    def is_kept(volume: Mapping[str, Any]) -> bool:
        if "hostPath" in volume:
            return bool(ours.get(volume["name"]) == volume["hostPath"].get("path"))
        return bool(_KEPT_VOLUMES & volume.keys())

    return [dict(volume) for volume in volumes if is_kept(volume)]


def _machine(amounts: Mapping[str, str]) -> dict[str, str]:
    """CPU, memory and GPUs; of other devices nothing is known."""
    return {
        name: amount
        for name, amount in amounts.items()
        if name in ("cpu", "memory", "ephemeral-storage") or is_gpu(name)
    }


def _without_control(owner: Mapping[str, Any]) -> dict[str, Any]:
    """What the replica goes with this pod goes with, which may wait for long. Nothing counts it as a replica."""
    return {key: owner[key] for key in ("apiVersion", "kind", "name", "uid")}


def _kept(rights: Mapping[str, Any] | None, more: set[str]) -> dict[str, Any]:
    return {name: value for name, value in (rights or {}).items() if name in _KEPT_RIGHTS | more}


def _only(node: str) -> dict[str, Any]:
    term = {"key": _NAME_FIELD, "operator": "In", "values": [node]}
    return {"nodeSelectorTerms": [{"matchFields": [term]}]}
