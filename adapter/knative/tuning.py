"""How a Knative Revision is kept warm: which autoscaling annotations it should have, from its function's habits.

Pure. A keep-alive is the autoscaler's window and retention period, which Knative can say up to an hour or so. What goes
beyond is `MIN_SCALE` for as long as it lasts; so is a replica that is woken before a caller comes. What the user set,
on the Revision or in the template that it came from, is never ours to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from adapter.cluster.intent import TENANT_ANNOTATION, read_intent
from adapter.cluster.json_parts import object_in, objects_in
from adapter.errors import ConfigError
from adapter.keys import FIELD_MANAGER, KNATIVE_SERVICE_LABEL
from adapter.knative.autoscaling import (
    CLASS,
    KNATIVES_OWN,
    MIN_SCALE,
    RETENTION,
    WINDOW,
    Defaults,
    keep_alive,
    kept_s,
    reach_s,
    said,
    scale_said,
)
from adapter.policy import keep_alive as policy
from adapter.policy.activity import Activity
from adapter.policy.placement import Need
from adapter.records import Rung
from adapter.spec import FunctionSpec

TUNED = (WINDOW, RETENTION, MIN_SCALE)
"""All that we ever set on a Revision."""
_ROUTING_STATE = "serving.knative.dev/routingState"
_LADDER = (Rung.LOAD, Rung.START, Rung.RESTORE)


@dataclass(frozen=True, slots=True)
class Revision:
    """A Revision of ours. `theirs`: autoscaling and other annotations that are not ours; `ours`: those that we set."""

    name: str
    namespace: str
    uid: str
    function: str
    spec: FunctionSpec
    need: Need
    is_routed: bool
    """Requests can reach it."""
    theirs: Mapping[str, str] = field(default_factory=dict)
    ours: Mapping[str, str] = field(default_factory=dict)


def read_revision(value: Mapping[str, Any]) -> Revision | None:
    """None where it is none of ours, or is being deleted."""
    metadata = object_in(value, "metadata")
    labels, annotations = object_in(metadata, "labels"), object_in(metadata, "annotations")
    function = labels.get(KNATIVE_SERVICE_LABEL, "")
    if not function or metadata.get("deletionTimestamp"):
        return None
    said_of = {key: text for key, text in annotations.items() if key != TENANT_ANNOTATION}  # judged where pods are made
    template = {
        "metadata": {"annotations": said_of},
        "spec": value.get("spec"),
    }
    namespace = str(metadata.get("namespace", ""))
    try:
        intent = read_intent(template, namespace=namespace, namespace_labels={}, function=function, framework="knative")
    except ConfigError:
        return None  # it was refused when it was written, or nobody asked us; its pods say so
    if intent is None:
        return None
    owned = _set_by_us(metadata)
    return Revision(
        name=str(metadata["name"]),
        namespace=namespace,
        uid=str(metadata.get("uid", "")),
        function=function,
        spec=intent.spec,
        need=intent.need,
        is_routed=labels.get(_ROUTING_STATE) == "active",
        theirs={key: text for key, text in annotations.items() if key not in owned},
        ours={key: text for key, text in annotations.items() if key in owned},
    )


@dataclass(frozen=True, slots=True)
class Autoscaler:
    """A Revision's PodAutoscaler, which has its name. `version` grows with each change; `ours` and `theirs` are of
    the annotations in `TUNED`."""

    uid: str
    version: int
    theirs: Mapping[str, str] = field(default_factory=dict)
    ours: Mapping[str, str] = field(default_factory=dict)


def read_autoscaler(value: Mapping[str, Any]) -> Autoscaler | None:
    """None where it is being deleted."""
    metadata = object_in(value, "metadata")
    if metadata.get("deletionTimestamp"):
        return None
    owned, annotations = _set_by_us(metadata), object_in(metadata, "annotations")
    version = str(metadata.get("resourceVersion", ""))
    return Autoscaler(
        uid=str(metadata.get("uid", "")),
        version=int(version) if version.isdecimal() else 0,
        theirs={key: annotations[key] for key in TUNED if key in annotations and key not in owned},
        ours={key: annotations[key] for key in TUNED if key in annotations and key in owned},
    )


def kept_by(autoscaler: Autoscaler, revision: Revision) -> Revision:
    """The Revision, where ours is on its autoscaler: what is on itself is not."""
    return replace(revision, ours=autoscaler.ours, theirs={**revision.theirs, **revision.ours, **autoscaler.theirs})


def _set_by_us(metadata: Mapping[str, Any]) -> frozenset[str]:
    """Whoever else writes one of them takes it from us: then it is theirs."""
    found = set()
    for entry in objects_in(metadata, "managedFields"):
        if entry.get("manager") == FIELD_MANAGER and entry.get("operation") == "Apply":
            fields = object_in(object_in(object_in(entry, "fieldsV1"), "f:metadata"), "f:annotations")
            found |= {name.removeprefix("f:") for name in fields}
    return frozenset(found.intersection(TUNED))


@dataclass(frozen=True, slots=True)
class Traffic:
    """A function's habits, and for how long it has been idle: 0 while it is busy, None where nobody ever called."""

    habits: policy.Habits = field(default_factory=policy.Habits)
    idle_s: float | None = None


def traffic_of(activity: Activity | None, now_ns: int) -> Traffic:
    """What the ledger says of it. Its parked processes hold their GPUs on a cluster, so it does not park."""
    if activity is None:
        return Traffic()
    busy = activity.busy
    gaps = tuple(
        policy.Gap((begin_ns - end_ns) / 1e9, max(0, now_ns - begin_ns) / 1e9)
        for (_, end_ns), (begin_ns, _) in pairwise(busy)
    )
    wakes = tuple(
        policy.Wake(rung, seconds) for rung in _LADDER for seconds in reversed(activity.wakes_s.get(rung, ()))
    )
    idle_s = max(0, now_ns - busy[-1][1]) / 1e9 if busy else None
    return Traffic(policy.Habits(gaps, wakes), idle_s)


@dataclass(frozen=True, slots=True)
class Tuning:
    """`annotations` are all that are to be ours. `again_s`: seconds until time alone may change that;
    None: it does not. `reason` is for people."""

    annotations: Mapping[str, str]
    reason: str
    again_s: float | None = None


def tune(revision: Revision, traffic: Traffic, defaults: Defaults, *, may_prewarm: bool = False) -> Tuning:
    """`may_prewarm`: a GPU is free for it that is not the last one."""
    why_not = _why_not(revision, defaults)
    if why_not:
        return Tuning({}, why_not)
    if revision.spec.idle_s is None and traffic == Traffic():
        return Tuning({}, "nothing is known of its traffic yet")
    current_s = kept_s(defaults, {**revision.theirs, **revision.ours}) if revision.ours.keys() - {MIN_SCALE} else None
    found = policy.keep_alive(revision.spec, traffic.habits, current_s=current_s, may_prewarm=may_prewarm)
    terms: dict[str, str] = {}
    if found.seconds and said(revision.theirs, RETENTION) is None:
        terms = keep_alive(found.seconds, defaults, revision.theirs)
    if said(revision.theirs, MIN_SCALE) is not None:
        return Tuning(terms, found.reason)
    if not found.seconds:  # never let go
        return Tuning({MIN_SCALE: "1"}, found.reason)
    hold, again_s = _held(found, traffic.idle_s, reach_s(defaults, revision.theirs))
    return Tuning({**terms, MIN_SCALE: "1"} if hold else terms, found.reason, again_s)


def release(revision: Revision, traffic: Traffic, defaults: Defaults) -> Tuning:
    """While nothing new is known of its traffic: what is set stays, but nothing is held for longer than was decided."""
    why_not = _why_not(revision, defaults)
    if why_not:
        return Tuning({}, why_not)
    kept = {key: text for key, text in revision.ours.items() if key != MIN_SCALE}
    still = tune(revision, traffic, defaults)
    held = MIN_SCALE in revision.ours and MIN_SCALE in still.annotations
    reason = "the ledger says nothing new: what is set stays"
    return Tuning({**kept, MIN_SCALE: "1"} if held else kept, reason, still.again_s)


def _why_not(revision: Revision, defaults: Defaults) -> str:
    """Why nothing of it is ours to set."""
    theirs, spec = revision.theirs, revision.spec
    scaled_by = theirs.get(CLASS, KNATIVES_OWN)
    least = scale_said(theirs, MIN_SCALE)
    if not revision.is_routed:
        return "no request reaches it"
    if scaled_by != KNATIVES_OWN:
        return f"{scaled_by} scales it"
    if (defaults.min_scale if least is None else least) > 0:
        return "it never goes to zero"
    if said(theirs, RETENTION) is not None and not (
        spec.idle_s and kept_s(defaults, theirs) == reach_s(defaults, theirs)
    ):
        return "how long it is kept is set"
    return ""


def _held(found: policy.KeepAlive, idle_s: float | None, reach: float) -> tuple[bool, float | None]:
    """Whether a replica is to be there, beyond what a keep-alive says, and when that changes next."""
    if idle_s is None:
        return False, None
    spans = [(0.0, found.seconds)] if found.seconds > reach else []
    if found.prewarm is not None:
        spans.append((found.prewarm.after_s, found.prewarm.until_s))
    later = [edge - idle_s for span in spans for edge in span if edge > idle_s]
    return any(begin <= idle_s < end for begin, end in spans), min(later, default=None)
