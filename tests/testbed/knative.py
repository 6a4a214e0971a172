"""Knative Serving from its own manifests, with settings for one small computer; its feature flags are not touched."""

from __future__ import annotations

from typing import Any

import yaml

from tests.testbed.control_plane import outside_service
from tests.testbed.images import Image, program_image
from tests.testbed.site import DOMAIN, Site

NAMESPACE = "knative-serving"
INGRESS_CLASS = "testbed.ingress.networking.knative.dev"
INGRESS_SERVICE = "testbed-ingress"
FUNCTIONS_DOMAIN = "functions.test"
"""A function's host is NAME.NAMESPACE.functions.test."""

COMMANDS = ("activator", "autoscaler", "controller", "queue", "webhook")
DEPLOYMENTS = ("activator", "autoscaler", "controller", "webhook")
SOURCE = "ko://knative.dev/serving/cmd/"

SETTINGS = {
    "config-network": {"ingress-class": INGRESS_CLASS},
    "config-domain": {FUNCTIONS_DOMAIN: ""},
    "config-deployment": {"registries-skipping-tag-resolving": "dev.local,gpufn.test"},
    "config-autoscaler": {"scale-to-zero-grace-period": "6s"},
}
"""What this testbed says otherwise than a fresh Knative does."""


def images(site: Site) -> list[Image]:
    return [program_image(_image(name), site.programs.knative / name, site.folder) for name in COMMANDS]


def objects(site: Site) -> list[dict[str, Any]]:
    """All of Knative Serving's, and the Service by which pods reach the ingress, in an order to apply them."""
    manifests = site.programs.knative / "manifests"
    core = manifests / "serving" / "core"
    files = [core / "100-namespace.yaml", core / "200-serviceaccount.yaml"]
    for folder in ("200-roles", "300-resources", "configmaps", "webhooks"):
        files += sorted((core / folder).glob("*.yaml"))
    files += [*sorted((manifests / "networking").glob("*.yaml")), manifests / "caching" / "image.yaml"]
    files += [core / "deployments" / f"{name}.yaml" for name in DEPLOYMENTS]
    made = [_adapted(item) for path in files for item in yaml.safe_load_all(path.read_text()) if item]
    ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
    return [*made, *outside_service(NAMESPACE, INGRESS_SERVICE, site.addresses.control_plane, ports)]


def ingress_host() -> str:
    """The ingress's name for pods."""
    return f"{INGRESS_SERVICE}.{NAMESPACE}.svc.{DOMAIN}"


def _image(command: str) -> str:
    return f"gpufn.test/knative-{command}:1"


def _adapted(item: dict[str, Any]) -> dict[str, Any]:
    if item["kind"] == "ConfigMap":
        data = item.setdefault("data", {})
        data |= SETTINGS.get(item["metadata"]["name"], {})
        if (queue := data.get("queue-sidecar-image", "")).startswith(SOURCE):
            data["queue-sidecar-image"] = _image(queue.removeprefix(SOURCE))
    if item["kind"] == "Deployment":
        for container in item["spec"]["template"]["spec"]["containers"]:
            container["image"] = _image(container["image"].removeprefix(SOURCE))
            container["resources"]["requests"]["cpu"] = "20m"
    return item
