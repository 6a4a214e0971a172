"""What tests of OpenFaaS on a real cluster share: images of small functions, and a provider in a pod."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.contract.hosts.kubernetes import HANDLERS as HOST_HANDLERS
from tests.contract.openfaas.provider import HANDLERS
from tests.testbed.cluster import Cluster
from tests.testbed.functions import function_image

MANIFESTS = Path(__file__).parents[2] / "manifests" / "components" / "openfaas"
FUNCTIONS = "openfaas-fn"


def function_images(cluster: Cluster, base: Path, folder: Path) -> dict[str, str]:
    """Names of images that every node has, by what they do."""
    images = {}
    for name, handler in {**HANDLERS, **HOST_HANDLERS}.items():
        source = folder / name
        source.mkdir()
        (source / "handler.py").write_text(handler)
        image = function_image(f"dev.local/openfaas-{name}:1", source, base, folder)
        cluster.load(image)
        images[name] = image.name
    return images


def manifests(namespace: str, image: str) -> list[dict[str, Any]]:
    """Those of the provider, in a namespace of a test's own, so that nothing meets what others have installed."""
    text = "\n---\n".join((MANIFESTS / name).read_text() for name in ("provider.yaml", "functions.yaml"))
    items = [item for item in yaml.safe_load_all(text.replace("gpufn-system", namespace)) if item]
    for item in items:
        if item["kind"] in ("ClusterRole", "ClusterRoleBinding", "RoleBinding"):
            item["metadata"]["name"] = _own(item["metadata"]["name"], namespace)
        if "roleRef" in item:
            item["roleRef"]["name"] = _own(item["roleRef"]["name"], namespace)
        if item["kind"] == "Deployment":
            pod = item["spec"]["template"]["spec"]
            del pod["priorityClassName"]
            pod["containers"][0] |= {"image": image, "imagePullPolicy": "IfNotPresent"}
    return items


def _own(name: str, namespace: str) -> str:
    return f"{name}-{namespace}"
