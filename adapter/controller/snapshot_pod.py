"""The pod that takes a function's snapshots on one node: the function's image, and nothing that serves or knows secrets.

A process can only be dumped where no system-call filter is (docs/explanation/container-rights.md), so it is not done
in a pod that answers requests. This one has the function's image, variables and files, but no secret, no token, no
network (`network_policy`) and no label by which a Service would find it. It ends by itself; what came of it stands in
its termination message.

Pure: a function's pod in, the other pod out.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

from adapter.cluster.intent import Intent
from adapter.controller.pod_patch import CRIU_VOLUME, SNAPSHOTS_VOLUME
from adapter.hosts.seccomp import RESTORE_RIGHT
from adapter.keys import DOMAIN, NODE_CRIU_PATH, SNAPSHOT_PATH
from adapter.replica import RESULT_VARIABLE, TASK_SNAPSHOT, TASK_VARIABLE

TASK_LABEL = f"{DOMAIN}/task"
"""On pods of ours that are no function's replicas; its value is `TASK_SNAPSHOT`."""
OF_ANNOTATION = f"{DOMAIN}/snapshot-of"
"""The snapshot's name, ``tenant/name.namespace``."""
FOR_ANNOTATION = f"{DOMAIN}/for-pod"
"""The replica that had to start without it."""
NODE_ANNOTATION = f"{DOMAIN}/for-node"
POLICY_NAME = "gpufn-snapshot-pods"

_KEPT_VOLUMES = frozenset({"emptyDir", "configMap", "persistentVolumeClaim", "image"})
"""What `load` may need to read; secrets, tokens and what drivers bring are left out."""
_KEPT_RIGHTS = frozenset({"runAsUser", "runAsGroup", "runAsNonRoot"})
_MARGIN_S = 120
"""Beside the start itself: pulling, and writing the dump."""


def snapshot_pod(pod: Mapping[str, Any], intent: Intent, node: str) -> dict[str, Any]:
    """The pod that takes the snapshots of `pod`'s function on `node`. Its name is the same for the same work."""
    spec = pod["spec"]
    container = spec["containers"][intent.container]
    volumes = _volumes(spec.get("volumes") or (), intent.need.snapshot)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name_of(intent, node, container["image"]),
            "namespace": intent.namespace,
            "labels": {TASK_LABEL: TASK_SNAPSHOT},
            "annotations": {
                OF_ANNOTATION: intent.need.snapshot,
                FOR_ANNOTATION: pod["metadata"]["name"],
                NODE_ANNOTATION: node,
            },
        },
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": int(intent.spec.start_timeout_s) + _MARGIN_S,
            "terminationGracePeriodSeconds": 5,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": _only(node)}},
            "tolerations": list(spec.get("tolerations") or ()),
            "imagePullSecrets": list(spec.get("imagePullSecrets") or ()),
            "securityContext": _kept(spec.get("securityContext"), {"fsGroup", "supplementalGroups"}),
            "volumes": volumes,
            "containers": [_container(container, {volume["name"] for volume in volumes})],
        },
    }


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
    """CPU and memory, and no GPU: processes that hold one are not dumped beside a replica."""
    return {name: amount for name, amount in amounts.items() if name in ("cpu", "memory", "ephemeral-storage")}


def _kept(rights: Mapping[str, Any] | None, more: set[str]) -> dict[str, Any]:
    return {name: value for name, value in (rights or {}).items() if name in _KEPT_RIGHTS | more}


def _only(node: str) -> dict[str, Any]:
    term = {"key": "metadata.name", "operator": "In", "values": [node]}
    return {"nodeSelectorTerms": [{"matchFields": [term]}]}
