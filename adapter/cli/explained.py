"""Finds out what `gpufn explain` tells: of a pod as it is, or of a function as its framework has it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adapter.cli.budgeted import budgeted
from adapter.cli.cluster_nodes import FUNCTION_LABELS, NodeFacts, function_of, read_nodes
from adapter.cli.keep_alive import Known, kept, known_of
from adapter.cluster.api import Api
from adapter.cluster.intent import Intent, read_intent
from adapter.cluster.inventory import holder, takes_snapshot
from adapter.cluster.json_parts import object_in, objects_in
from adapter.cluster.resources import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    KNATIVE_REVISIONS,
    KNATIVE_SERVICES,
    NAMESPACES,
    PODS,
    Resource,
)
from adapter.controller.snapshots import Taking, taking_of
from adapter.errors import ConfigError, NotFound
from adapter.keys import (
    ADMITTED_ANNOTATION,
    DERIVED_ANNOTATION,
    DOMAIN,
    OPENFAAS_LABEL,
    PATCHED_ANNOTATION,
    PLACEMENT_ANNOTATION,
    SNAPSHOT_OF_ANNOTATION,
    TASK_LABEL,
)
from adapter.policy.placement import Verdict, place
from adapter.replica import TASK_SNAPSHOT
from adapter.spec import FIELDS, Field

_KINDS = ("pod", "function")
_COUNTING = frozenset({f"{DOMAIN}/gpu", f"{DOMAIN}/mig"})
"""Annotations that ask for GPUs, so that no limit needs to."""


@dataclass(frozen=True, slots=True)
class Explained:
    """`asked`: what the user set, ``key = value``. `decision`: what the webhook wrote when the pod was made. `kept`: how
    long a function stays warm, and why. `budget`: what it held of its budget today, if it has one. `node` is empty where
    it has none. `snapshot_work`: what is being done, or could not be, so that more nodes have its snapshot.
    `load_s`: how long a start without one takes; None where none was measured, and the estimates assume `LOAD_S`."""

    kind: str
    name: str
    namespace: str
    function: str
    framework: str
    revision: str
    tenant: str
    asked: tuple[str, ...]
    notes: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    snapshot: str = ""
    snapshot_nodes: tuple[str, ...] = ()
    snapshot_work: tuple[str, ...] = ()
    load_s: float | None = None
    node: str = ""
    decision: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = ""
    kept: str = ""
    budget: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdicts": [{"fits": verdict.fits, **asdict(verdict)} for verdict in self.verdicts]}


@dataclass(frozen=True, slots=True)
class _Template:
    """What a function's next pod will be made of. `revision` is the object of a Knative Revision, if it is there."""

    pod: Mapping[str, Any]
    framework: str
    revision: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


async def explained(api: Api, what: str, namespace: str | None) -> Explained:
    """Of ``NAME``, ``pod/NAME`` or ``function/NAME``. Raises `NotFound`, and `ConfigError` where what it asks is
    impossible."""
    kind, name = _kind(what)
    bare, _, inside = name.partition(".") if kind != "pod" else (name, "", "")
    place_of = namespace or await api.namespace()
    if kind != "function":
        pod = await _optional(api, PODS, place_of, name)
        if pod is not None:
            return await _of_pod(api, pod)
    if kind != "pod":
        template = await _template(api, bare, inside or place_of)
        if template is not None:
            return await _of_function(api, bare, inside or place_of, template)
    raise NotFound(
        f"No {kind or 'pod or function'} {name} in namespace {place_of}.",
        hint="Name another namespace with -n.",
        code="function-unknown" if kind == "function" else "not-found",
    )


def _kind(what: str) -> tuple[str, str]:
    """As kubectl has it: ``pod/NAME``; no kind where none is said."""
    kind, slash, name = what.partition("/")
    if not slash:
        return "", what
    if kind in ("pods", "po"):
        kind = "pod"
    if kind not in _KINDS or not name:
        raise ConfigError(
            f"{what} is neither a pod nor a function.", hint="Write pod/NAME or function/NAME.", code="bad-value"
        )
    return kind, name


async def _optional(api: Api, resource: Resource, namespace: str, name: str) -> dict[str, Any] | None:
    """The object, if it is there, and its kind is known to the cluster."""
    try:
        return await api.get(resource.path(namespace, name))
    except NotFound:
        return None


# Of a pod -------------------------------------------------------------------------------------------------------------


async def _of_pod(api: Api, pod: Mapping[str, Any]) -> Explained:
    metadata = pod["metadata"]
    namespace, name = metadata["namespace"], metadata["name"]
    nodes, labels = await asyncio.gather(read_nodes(api, without=metadata["uid"]), _labels(api, namespace))
    intent = read_intent(_as_made(pod), namespace=namespace, namespace_labels=labels)
    if intent is None:
        raise _no_replica(pod)
    unseen = PATCHED_ANNOTATION not in object_in(metadata, "annotations")
    notes = ("the webhook of gpufn's did not see this pod: it is as its framework made it",) if unseen else ()
    known, work = await asyncio.gather(known_of(api, intent), _snapshot_work(api, intent))
    facts = {"node": holder(pod), "decision": _decision(pod), "scheduler": _scheduler(pod), "snapshot_work": work}
    return _explained("pod", name, intent, nodes, known, notes=notes, **facts)


def _as_made(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The pod as its user meant it: a GPU resource that the webhook chose for an annotation is not the user's."""
    metadata = pod["metadata"]
    theirs = object_in(metadata, "annotations")
    resource = _decision(pod).get("resource")
    containers = objects_in(pod["spec"], "containers")
    if resource and not theirs.keys().isdisjoint(_COUNTING):
        containers = [{**container, "resources": _without(container, resource)} for container in containers]
    return {"metadata": metadata, "spec": {**pod["spec"], "containers": containers}}


def _without(container: Mapping[str, Any], resource: str) -> dict[str, Any]:
    resources = object_in(container, "resources")
    return {kind: {k: v for k, v in object_in(resources, kind).items() if k != resource} for kind in resources}


def _decision(pod: Mapping[str, Any]) -> dict[str, Any]:
    """Empty where no webhook saw it, or its words cannot be read."""
    annotations = object_in(pod["metadata"], "annotations")
    try:
        said = dict(json.loads(annotations[PLACEMENT_ANNOTATION]))
        prefer = [(str(name), float(score), float(wake_s)) for name, score, wake_s in said.get("prefer", ())]
        return {**said, "prefer": prefer, "at_ns": int(annotations.get(ADMITTED_ANNOTATION, 0))}
    except (KeyError, ValueError, TypeError):
        return {}


def _scheduler(pod: Mapping[str, Any]) -> str:
    """Why it has no node yet, as the scheduler says; empty where it has one."""
    for condition in objects_in(object_in(pod, "status"), "conditions"):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return str(condition.get("message") or condition.get("reason") or "")
    return ""


# Of a function --------------------------------------------------------------------------------------------------------


def _no_replica(pod: Mapping[str, Any]) -> NotFound:
    metadata = pod["metadata"]
    name, of = metadata["name"], object_in(metadata, "annotations").get(SNAPSHOT_OF_ANNOTATION)
    if takes_snapshot(pod):
        waits = not object_in(pod, "spec").get("nodeName")
        return NotFound(
            f"The pod {name} is no replica of a function.",
            why=f"It takes the snapshot {of}, and {'waits for room on its node' if waits else 'has its place'}.",
            hint="Look at its Events, and at those of the function's pods: kubectl get events",
            code="not-a-replica",
        )
    why = "It has no label of a function, or asks for no GPU and has no annotation of ours."
    return _not_ours(f"pod {name}", why, f"Ours have one of the labels {', '.join(FUNCTION_LABELS)}.")


async def _of_function(api: Api, name: str, namespace: str, template: _Template) -> Explained:
    nodes, labels = await asyncio.gather(read_nodes(api), _labels(api, namespace))
    intent = read_intent(
        template.pod, namespace=namespace, namespace_labels=labels, function=name, framework=template.framework
    )
    if intent is None:
        why = "It asks for no GPU, and has no annotation of ours."
        raise _not_ours(f"function {name}", why, f"Write {DOMAIN}/… on its template, or a GPU limit.")
    known, budget, work = await asyncio.gather(
        known_of(api, intent), budgeted(api, intent), _snapshot_work(api, intent)
    )
    facts = {"kept": await _kept(api, intent, known, template), "budget": budget, "snapshot_work": work}
    return _explained("function", name, intent, nodes, known, notes=template.notes, **facts)


async def _kept(api: Api, intent: Intent, known: Known, template: _Template) -> str:
    return "" if intent.framework == "plain" else await kept(api, intent, known, template.revision)


async def _template(api: Api, name: str, namespace: str) -> _Template | None:
    """What the framework that has it makes its pods of; None where none has it."""
    service = await _optional(api, KNATIVE_SERVICES, namespace, name)
    if service is not None:
        return await _of_service(api, service)
    record = await _optional(api, CONFIG_MAPS, namespace, f"function-{name}")
    if record is None and (template := await _of_deployment(api, name, namespace)) is not None:
        return template
    pods = await _pods(api, name, namespace)
    if pods:
        return _Template(_as_made(pods[-1]), "openfaas" if record is not None else "plain")
    return None if record is None else _of_record(record)


async def _of_service(api: Api, service: Mapping[str, Any]) -> _Template:
    """Annotations of a Service that did not reach its template do nothing: say so."""
    metadata, template = service["metadata"], object_in(object_in(service, "spec"), "template")
    theirs = object_in(object_in(template, "metadata"), "annotations")
    stray = [
        key
        for key in object_in(metadata, "annotations")
        if key.startswith(f"{DOMAIN}/") and key not in theirs and key != DERIVED_ANNOTATION
    ]
    notes = tuple(f"{key} is on the Service only, where it does nothing: the webhook did not see it" for key in stray)
    latest = str(object_in(service, "status").get("latestReadyRevisionName") or "")
    revision = await _optional(api, KNATIVE_REVISIONS, metadata["namespace"], latest) if latest else None
    return _Template(template, "knative", revision, notes)


async def _pods(api: Api, name: str, namespace: str) -> list[dict[str, Any]]:
    """Of a function that no Knative Service makes, the oldest first."""
    found = []
    for label in FUNCTION_LABELS[1:]:
        listed = await api.list(PODS.path(namespace), dict, label_selector=f"{label}={name}")
        found += [pod for pod in listed.items if not object_in(pod, "metadata").get("deletionTimestamp")]
    return sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))


async def _of_deployment(api: Api, name: str, namespace: str) -> _Template | None:
    """A Deployment whose pods would be the function's."""

    def template(deployment: dict[str, Any]) -> dict[str, Any] | None:
        found: dict[str, Any] = deployment["spec"]["template"]
        return found if function_of(found) == name else None

    found = await api.list(DEPLOYMENTS.path(namespace), template)
    return _Template(found.items[0], "plain") if found.items else None


def _of_record(record: Mapping[str, Any]) -> _Template | None:
    """A function of our OpenFaaS provider that is at zero: what was deployed, as a pod would say it."""
    try:
        wanted = json.loads(object_in(record, "data")["deployment"])
        resources = {kind: _resources(wanted.get(kind)) for kind in ("limits", "requests")}
        labels = {**(wanted.get("labels") or {}), OPENFAAS_LABEL: wanted["service"]}
        metadata = {"labels": labels, "annotations": wanted.get("annotations") or {}}
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    return _Template(
        {"metadata": metadata, "spec": {"containers": [{"name": "fn", "resources": resources}]}}, "openfaas"
    )


def _resources(said: Any) -> dict[str, Any]:
    return {str(name): amount for name, amount in (said or {}).items() if amount}


# Both -----------------------------------------------------------------------------------------------------------------


def _not_ours(what: str, why: str, hint: str) -> NotFound:
    return NotFound(f"The {what} is none of gpufn's.", why=why, hint=hint, code="not-ours")


async def _labels(api: Api, namespace: str) -> dict[str, str]:
    return dict(object_in((await api.get(NAMESPACES.path(name=namespace)))["metadata"], "labels"))


async def _snapshot_work(api: Api, intent: Intent) -> tuple[str, ...]:
    """Of the pods that take its snapshot on nodes that have none yet."""
    if not intent.need.snapshot:
        return ()
    listed = await api.list(PODS.path(intent.namespace), taking_of, label_selector=f"{TASK_LABEL}={TASK_SNAPSHOT}")
    own = [each for each in listed.items if each.snapshot == intent.need.snapshot and not each.worked]
    return tuple(_work(taking) for taking in sorted(own, key=lambda taking: taking.wanted_on))


def _work(taking: Taking) -> str:
    if taking.is_over:
        return taking.news
    if taking.waits:
        return f"pod {taking.name} waits for room on {taking.wanted_on}, to take it there"
    return f"pod {taking.name} takes it on {taking.wanted_on}"


def _explained(
    kind: str, name: str, intent: Intent, nodes: list[NodeFacts], known: Known, notes: tuple[str, ...], **more: Any
) -> Explained:
    intent = intent.measured(known.load_s)
    notes = (*intent.notes, *notes)
    if intent.hints_only:
        notes += ("another scheduler places it: nothing is required of its nodes",)
    snapshot = intent.need.snapshot
    verdicts = place(intent.need, [facts.node for facts in nodes])
    return Explained(
        kind=kind,
        name=name,
        namespace=intent.namespace,
        function=intent.key,
        framework=intent.framework,
        revision=intent.revision,
        tenant=intent.tenant,
        asked=tuple(_asked(intent)),
        notes=(*notes, *_rounded_up(intent, verdicts)),
        verdicts=tuple(verdicts),
        snapshot=snapshot,
        snapshot_nodes=tuple(facts.node.name for facts in nodes if snapshot and snapshot in facts.node.snapshots),
        load_s=known.load_s,
        **more,
    )


def _rounded_up(intent: Intent, verdicts: list[Verdict]) -> Iterable[str]:
    """Of the best node: a share is rounded up to what its GPUs are divided into."""
    if verdicts and (best := verdicts[0]).fits and 0 < intent.need.gpus < best.units / best.shares:
        of = (
            "a whole GPU, as none is shared there"
            if best.shares == 1
            else f"{best.units} of {best.shares} shares of one"
        )
        yield f"gpu = {intent.need.gpus:g} takes {of}"


def _asked(intent: Intent) -> list[str]:
    """What the user set, in the words that they would write."""
    spec = intent.spec
    return [
        f"{item.annotation} = {_text(item, getattr(spec, item.name))}" for item in FIELDS if item.name in intent.asked
    ]


def _text(item: Field, value: Any) -> str:
    """Exactly the value, in the largest units that have it."""
    if value is None:
        return item.form.none
    if item.name == "compute_capability":
        return ".".join(map(str, value))
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if item.name.endswith("_bytes"):
        return _size(value)
    if item.name.endswith("_s"):
        return _duration(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _size(size_bytes: int) -> str:
    units = ((1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki"))
    return next((f"{size_bytes // n}{unit}" for n, unit in units if size_bytes and not size_bytes % n), str(size_bytes))


def _duration(seconds: float) -> str:
    if seconds != int(seconds) or seconds < 60:
        return f"{seconds:.15g}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return "".join(f"{number}{unit}" for number, unit in ((hours, "h"), (minutes, "m"), (rest, "s")) if number)
