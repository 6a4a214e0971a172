"""A pod of this node as the meter needs it: whose it is, and when its containers ran.

Pure: Kubernetes JSON and a namespace's labels in, frozen values out. Kubernetes' own times are whole seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from adapter.cluster.intent import PRICE_CLASS_ANNOTATION, SCALE_LABELS, Intent, read_intent
from adapter.cluster.inventory import takes_snapshot
from adapter.errors import ConfigError
from adapter.keys import (
    ADMITTED_ANNOTATION,
    DOMAIN,
    FUNCTION_LABEL,
    REVISION_LABEL,
    SNAPSHOT_OF_ANNOTATION,
    SNAPSHOT_REVISION_ANNOTATION,
    TENANT_LABEL,
)


@dataclass(frozen=True, slots=True)
class Container:
    """`started_at_ns` is 0 where it has not run yet, `finished_at_ns` where it runs: of its latest run, `restarts`."""

    name: str
    started_at_ns: int = 0
    finished_at_ns: int = 0
    restarts: int = 0
    ready: bool = False

    @property
    def runs(self) -> bool:
        return bool(self.started_at_ns) and not self.finished_at_ns


@dataclass(frozen=True, slots=True)
class Pod:
    """`deleted_at_ns`: when somebody asked for its end, 0: nobody has. `is_over`: none of its containers runs again."""

    uid: str
    name: str
    namespace: str
    ip: str
    created_at_ns: int
    admitted_at_ns: int
    scheduled_at_ns: int
    deleted_at_ns: int
    is_over: bool
    containers: tuple[Container, ...]
    body: Mapping[str, Any] = field(repr=False)
    """Its metadata and spec, for `intent_of`."""

    @property
    def replica(self) -> str:
        """Its name in the ledger: pods of a StatefulSet come again under one name."""
        return f"{self.name}-{self.uid[:8]}"

    @property
    def began_at_ns(self) -> int:
        """When the API server had it, as exactly as anybody knows."""
        return self.admitted_at_ns or self.created_at_ns

    def container(self, name: str) -> Container | None:
        return next((each for each in self.containers if each.name == name), None)


def read_pod(value: Mapping[str, Any]) -> Pod:
    """Raises `KeyError`, `TypeError`, `ValueError` on what is no pod."""
    metadata, spec, status = value["metadata"], value["spec"], value.get("status") or {}
    annotations = metadata.get("annotations") or {}
    created_at_ns = _instant(metadata.get("creationTimestamp"))
    admitted = str(annotations.get(ADMITTED_ANNOTATION) or "")
    admitted_at_ns = int(admitted) if admitted.isascii() and admitted.isdecimal() and len(admitted) < 20 else 0
    if abs(admitted_at_ns - created_at_ns) > 60 * 10**9:  # an annotation that a user wrote, or copied
        admitted_at_ns = 0
    deleted_at_ns = _instant(metadata.get("deletionTimestamp"))
    if deleted_at_ns:
        deleted_at_ns -= int(metadata.get("deletionGracePeriodSeconds") or 0) * 10**9
    return Pod(
        uid=str(metadata["uid"]),
        name=str(metadata["name"]),
        namespace=str(metadata["namespace"]),
        ip=str(status.get("podIP") or ""),
        created_at_ns=created_at_ns,
        admitted_at_ns=admitted_at_ns,
        scheduled_at_ns=_scheduled(status),
        deleted_at_ns=deleted_at_ns,
        is_over=status.get("phase") in ("Succeeded", "Failed"),
        containers=tuple(_container(item) for item in status.get("containerStatuses") or ()),
        body={"metadata": {name: metadata.get(name) for name in ("name", "labels", "annotations")}, "spec": spec},
    )


def intent_of(pod: Pod, namespace_labels: Mapping[str, str]) -> Intent | None:
    """What its user asked for; None where it is no function. One whose annotations or OpenFaaS's labels cannot be used
    is read without them: it runs, and holds what it holds."""
    try:
        return read_intent(pod.body, namespace=pod.namespace, namespace_labels=namespace_labels)
    except ConfigError:
        metadata = pod.body["metadata"]
        annotations = _without(metadata.get("annotations"), f"{DOMAIN}/")
        labels = _without(metadata.get("labels"), SCALE_LABELS)
        body = {**pod.body, "metadata": {**metadata, "annotations": annotations, "labels": labels}}
    try:
        return read_intent(body, namespace=pod.namespace, namespace_labels=namespace_labels)
    except ConfigError:
        return None


def snapshot_intent_of(pod: Pod, namespace_labels: Mapping[str, str]) -> Intent | None:
    """Of a pod that takes a function's snapshots on a GPU, what the function would ask for: that time is the function's.
    None of any other pod.

    It is of its own namespace and tenant, as replicas are: whoever may write pods there may write its annotations.
    """
    said = pod.body["metadata"].get("annotations") or {}
    of = str(said.get(SNAPSHOT_OF_ANNOTATION) or "")
    start, end = f"{namespace_labels.get(TENANT_LABEL) or pod.namespace}/", f".{pod.namespace}"
    if not (takes_snapshot(pod.body) and of.startswith(start) and of.endswith(end)):
        return None
    labels = {
        FUNCTION_LABEL: of.removeprefix(start).removesuffix(end),
        REVISION_LABEL: str(said.get(SNAPSHOT_REVISION_ANNOTATION) or ""),
    }
    annotations = {name: text for name, text in said.items() if name == PRICE_CLASS_ANNOTATION}
    replica = replace(pod, body={**pod.body, "metadata": {"labels": labels, "annotations": annotations}})
    intent = intent_of(replica, namespace_labels)
    return intent if intent is not None and intent.need.units else None


def _without(texts: Mapping[str, Any] | None, start: str) -> dict[str, Any]:
    """Those whose names do not begin so."""
    return {name: text for name, text in (texts or {}).items() if not name.startswith(start)}


def _container(status: Mapping[str, Any]) -> Container:
    state = status.get("state") or {}
    ended = state.get("terminated")
    if not ended and not state.get("running"):  # it waits to be started again
        ended = (status.get("lastState") or {}).get("terminated")
    run = ended or state.get("running") or {}
    return Container(
        name=str(status["name"]),
        started_at_ns=_instant(run.get("startedAt")),
        finished_at_ns=_instant(run.get("finishedAt")) if ended else 0,
        restarts=int(status.get("restartCount") or 0),
        ready=bool(status.get("ready")),
    )


def _scheduled(status: Mapping[str, Any]) -> int:
    conditions = status.get("conditions") or ()
    times = [_instant(c.get("lastTransitionTime")) for c in conditions if c.get("type") == "PodScheduled"]
    return times[0] if times else 0


def _instant(text: object) -> int:
    """Nanoseconds since the epoch of an RFC 3339 text; 0 of none."""
    if not text:
        return 0
    return max(0, int(datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()) * 10**9)
