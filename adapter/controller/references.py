"""Objects that people look at to learn about a pod, as Events refer to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapter.cluster.events import reference_to
from adapter.cluster.json_parts import object_in, objects_in
from adapter.cluster.resources import KNATIVE_SERVICES
from adapter.keys import KNATIVE_SERVICE_LABEL

_SERVICE_UID_LABEL = "serving.knative.dev/serviceUID"


def pod_and_service(pod: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    """The pod, and its Knative Service."""
    return reference_to(pod), *_service(pod)


def owner_and_service(pod: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    """What made the pod and outlives it (the pod itself, where nothing did), and its Knative Service."""
    metadata = pod["metadata"]
    owner: Mapping[str, Any] = next((o for o in objects_in(metadata, "ownerReferences") if o.get("controller")), {})
    named = {name: str(owner[name]) for name in ("apiVersion", "kind", "name", "uid") if name in owner}
    about = {**named, "namespace": str(metadata.get("namespace", ""))} if "name" in named else reference_to(pod)
    return about, *_service(pod)


def _service(pod: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    labels = object_in(pod["metadata"], "labels")
    if labels.get(KNATIVE_SERVICE_LABEL) and labels.get(_SERVICE_UID_LABEL):
        yield {
            "apiVersion": KNATIVE_SERVICES.api_version,
            "kind": KNATIVE_SERVICES.kind,
            "namespace": pod["metadata"]["namespace"],
            "name": labels[KNATIVE_SERVICE_LABEL],
            "uid": labels[_SERVICE_UID_LABEL],
        }
