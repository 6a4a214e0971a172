"""Nodes that only seem to be there, by the thousand: KWOK keeps them and their pods as a kubelet would, without running any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.testbed.site import Site, flags

ANNOTATION = "kwok.x-k8s.io/node"
STAGES = ("node/fast", "node/heartbeat-with-lease", "pod/fast")


def command(site: Site) -> list[str]:
    stages = [path for folder in STAGES for path in sorted((site.programs.kwok / "stages" / folder).glob("*.yaml"))]
    return [
        str(site.programs.kwok / "kwok"),
        *flags(
            kubeconfig=site.admin,
            manage_nodes_with_annotation_selector=f"{ANNOTATION}=fake",
            node_lease_duration_seconds=160,  # renewed four times as often; nodes are missed after 50 s
            cidr="10.0.0.1/8",
            node_ip=site.addresses.control_plane,
        ),
        *(f"--config={path}" for path in stages if path.name != "kustomization.yaml"),
    ]


def node(
    name: str, gpus: int, labels: Mapping[str, str], taints: Sequence[Mapping[str, str]], cpus: int, memory: str
) -> dict[str, Any]:
    resources = {"cpu": str(cpus), "memory": memory, "pods": "110", "ephemeral-storage": "1Ti"}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    general = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {**general, **labels}, "annotations": {ANNOTATION: "fake"}},
        "spec": {"taints": [dict(taint) for taint in taints]},
        "status": {"capacity": resources, "allocatable": resources},
    }
