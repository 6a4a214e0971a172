"""What `gpufn doctor --cluster` looks at. Each check asks the cluster itself, and changes nothing there.

A check fails (✗) where functions do not get what they ask for, and warns (!) where they get less: a slower start, no
choice of a GPU's model, no account of what they cost. What the caller may not see is a warning: it may well work.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, TypeAlias

from adapter.cli.checks import Check, Finding, failed, ok, warning
from adapter.cli.cluster import Connection
from adapter.cli.cluster_ledger import ALLOW, INSTALL, READER, SERVICE, ClusterLedger
from adapter.cli.cluster_nodes import AGENTS_NAMESPACE, NodeFacts, read_nodes
from adapter.cli.keep_alive import KNATIVE_NAMESPACE
from adapter.cluster.api import Api
from adapter.cluster.json_parts import object_in, objects_in
from adapter.cluster.resources import (
    ACCESS_REVIEWS,
    CONFIG_MAPS,
    DAEMON_SETS,
    DEPLOYMENTS,
    LEASES,
    MUTATING_WEBHOOKS,
    NAMESPACES,
    PODS,
    RUNTIME_CLASSES,
)
from adapter.errors import AdapterError, NotFound, Unavailable
from adapter.keys import DOMAIN, SNAPSHOTS_LABEL, SYSTEM_NAMESPACE, TENANT_LABEL
from adapter.units import format_duration

LEAST_MINOR = 30
"""Kubernetes 1.30: policies of admission, and conditions under which a webhook is asked."""
_ENFORCE = "pod-security.kubernetes.io/enforce"
_REFUSING = ("baseline", "restricted")
"""Levels of Pod Security that refuse folders of the node, and with them snapshots."""
_COMPONENTS = {
    "webhook": "pods are made as if gpufn were not there",
    "controller": "certificates are not renewed, no snapshots taken, keep-alives stay as they are",
    "ledger": "agents keep what they saw, and nobody can read it",
}
"""Deployments, and what it means that one is down."""
_SERVICES_WEBHOOK = f"services.knative.{DOMAIN}"
_OURS = "app.kubernetes.io/name=gpufn"
_CERTIFICATE_DAYS = 14
_LATE_S = 60.0


class Asked:
    """A cluster, and what several checks ask of it, once."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.is_installed = True
        self._nodes: list[NodeFacts] | None = None

    async def nodes(self) -> list[NodeFacts]:
        if self._nodes is None:
            self._nodes = await read_nodes(self.api)
        return self._nodes


_Question: TypeAlias = Callable[[Asked], Coroutine[Any, Any, "Finding | list[Finding]"]]


def cluster_checks(connection: Connection) -> Iterator[Check]:
    """The checks in the order in which they are shown. Where gpufn is not installed, those of it are left out."""
    asked = Asked(connection.api)

    def check(question: _Question) -> Check:
        def run() -> Finding | list[Finding]:
            return connection.wait(_guarded(question, asked))

        return run

    first: list[_Question] = [check_api, check_rights, check_installed]
    ours: list[_Question] = [check_components, check_leader, check_admission, check_usage, check_agents]
    ours += [check_snapshots, check_namespaces]
    others: list[_Question] = [check_gpus, check_runtime, check_knative]
    yield from (check(question) for question in first)
    if asked.is_installed:
        yield from (check(question) for question in ours)
    yield from (check(question) for question in others)


async def _guarded(question: _Question, asked: Asked) -> Finding | list[Finding]:
    """What cannot be looked at is a finding too; but without an API there is nothing to find."""
    name = question.__name__.removeprefix("check_")
    try:
        return await question(asked)
    except Unavailable as exc:
        if question is check_api:
            raise
        if exc.code == "forbidden":
            return warning(name, f"you may not look: {_lower(exc.message)}")
        return failed(name, _words(exc), exc.hint)
    except AdapterError as exc:
        return failed(name, _words(exc), exc.hint)


def _words(error: AdapterError) -> str:
    return f"{_lower(error.message)}: {_lower(error.why)}" if error.why else _lower(error.message)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")


# The cluster and the caller -------------------------------------------------------------------------------------------


async def check_api(asked: Asked) -> Finding:
    version = await asked.api.get("/version")
    words = f"Kubernetes {version.get('gitVersion', 'of unknown version')}"
    minor = "".join(filter(str.isdigit, str(version.get("minor", ""))))
    if version.get("major") == "1" and minor and int(minor) < LEAST_MINOR:
        return failed(
            "api", f"{words}: its admission lacks what gpufn uses", f"Upgrade it to 1.{LEAST_MINOR} or newer."
        )
    return ok("api", words)


_RIGHTS: Sequence[tuple[str, str, Mapping[str, str]]] = (
    ("list nodes", "nodes, explain", {"verb": "list", "resource": "nodes"}),
    ("list pods of all namespaces", "nodes, explain", {"verb": "list", "resource": "pods"}),
    ("list gpunodes", "nodes, explain", {"verb": "list", "group": DOMAIN, "resource": "gpunodes"}),
    (
        f"make tokens of {READER}",
        "usage, starts",
        {"verb": "create", "resource": "serviceaccounts", "subresource": "token", "namespace": SYSTEM_NAMESPACE, "name": READER},
    ),
    (
        "reach the ledger",
        "usage, starts",
        {"verb": "get", "resource": "services", "subresource": "proxy", "namespace": SYSTEM_NAMESPACE, "name": SERVICE},
    ),
)  # fmt: skip
"""What commands of gpufn's need: in words, which commands, and as Kubernetes asks for it."""


async def check_rights(asked: Asked) -> Finding:
    allowed = await asyncio.gather(*(_may(asked.api, attributes) for _, _, attributes in _RIGHTS))
    missing = [(words, use) for (words, use, _), may in zip(_RIGHTS, allowed, strict=True) if not may]
    if not missing:
        return ok("rights", "you may use every command")
    said = ", ".join(f"{words} (for {use})" for words, use in missing)
    reads_nodes = any("nodes" in use for _, use in missing)
    return warning(
        "rights",
        f"you may not {said}",
        f"kubectl create clusterrole NAME --verb=get,list --resource=nodes,pods,namespaces,gpunodes.{DOMAIN}, bound to you"
        if reads_nodes
        else ALLOW,
    )


async def _may(api: Api, attributes: Mapping[str, str]) -> bool:
    kind = {"apiVersion": ACCESS_REVIEWS.api_version, "kind": ACCESS_REVIEWS.kind}
    answer = await api.create(ACCESS_REVIEWS.path(), {**kind, "spec": {"resourceAttributes": attributes}})
    return bool(object_in(answer, "status").get("allowed"))


# Our components -------------------------------------------------------------------------------------------------------


async def check_installed(asked: Asked) -> Finding:
    try:
        await asked.api.get(NAMESPACES.path(name=SYSTEM_NAMESPACE))
    except NotFound:
        asked.is_installed = False
        return failed("installed", f"there is no namespace {SYSTEM_NAMESPACE}: gpufn is not in this cluster", INSTALL)
    return ok("installed", f"in the namespace {SYSTEM_NAMESPACE}")


async def check_components(asked: Asked) -> list[Finding]:
    found = await asked.api.list(DEPLOYMENTS.path(SYSTEM_NAMESPACE), dict, label_selector=_OURS)
    by_component = {_component_of(deployment): deployment for deployment in found.items}
    pods = await _pods(asked.api)

    def finding(name: str, without: str) -> Finding:
        return _component(name, by_component.get(name), [pod for pod in pods if _component_of(pod) == name], without)

    findings = [finding(name, without) for name, without in _COMPONENTS.items()]
    if "provider" in by_component:
        findings.append(finding("provider", "OpenFaaS functions cannot be called"))
    return findings


async def _pods(api: Api) -> Sequence[dict[str, Any]]:
    """Of our Deployments. Empty where they may not be seen: they only say why something is down."""
    try:
        return (await api.list(PODS.path(SYSTEM_NAMESPACE), dict, label_selector=_OURS)).items
    except Unavailable:
        return ()


def _component_of(made: Mapping[str, Any]) -> str:
    return str(object_in(made["metadata"], "labels").get("app.kubernetes.io/component", ""))


def _component(
    name: str, deployment: Mapping[str, Any] | None, pods: Iterable[Mapping[str, Any]], without: str
) -> Finding:
    if deployment is None:
        return failed(name, f"it is not there: {without}", INSTALL)
    wanted, ready = (
        object_in(deployment, "spec").get("replicas", 1),
        object_in(deployment, "status").get("readyReplicas", 0),
    )
    why, look = _why_not_ready(name, pods)
    if not ready:
        return failed(name, f"none of {wanted} replicas is ready{why}: {without}", look)
    if ready < wanted:
        return warning(name, f"{ready} of {wanted} replicas are ready{why}", look)
    return ok(name, f"{ready} of {wanted} replicas are ready, {_image(deployment)}")


def _why_not_ready(name: str, pods: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """What the kubelet says that a container waits for, in brackets; and the command that tells more: what a pod that does
    not run waits for is in its Events, why one that runs is not ready is in its log."""
    describe, logs = (
        f"kubectl -n {SYSTEM_NAMESPACE} {verb} -l app.kubernetes.io/component={name}"
        for verb in ("describe pods", "logs")
    )
    found = [status for pod in pods for status in objects_in(object_in(pod, "status"), "containerStatuses")]
    for waiting in (object_in(object_in(status, "state"), "waiting") for status in found if not status.get("ready")):
        if said := waiting.get("message") or waiting.get("reason"):
            crashed = waiting.get("reason") == "CrashLoopBackOff"
            return f" ({said})", f"{logs} --previous" if crashed else describe
    return "", logs if found else describe


def _image(workload: Mapping[str, Any]) -> str:
    containers = objects_in(object_in(object_in(workload["spec"], "template"), "spec"), "containers")
    return str(containers[0].get("image")) if containers else ""


async def check_leader(asked: Asked) -> Finding:
    """Whether a controller leads, and renews that."""
    try:
        lease = await asked.api.get(LEASES.path(SYSTEM_NAMESPACE, "gpufn-controller"))
    except NotFound:
        return warning(
            "leader", "no controller has led yet", f"kubectl -n {SYSTEM_NAMESPACE} logs deployment/gpufn-controller"
        )
    spec = object_in(lease, "spec")
    renewed = _instant(spec.get("renewTime"))
    if not spec.get("holderIdentity") or renewed is None:
        return warning("leader", "no controller leads at the moment")
    late_s = (datetime.now(timezone.utc) - renewed).total_seconds()
    if late_s > _LATE_S:
        look = f"kubectl -n {SYSTEM_NAMESPACE} logs deployment/gpufn-controller"
        return failed(
            "leader", f"{spec['holderIdentity']} led, and was last heard of {format_duration(late_s)} ago", look
        )
    return ok("leader", f"{spec['holderIdentity']}")


async def check_admission(asked: Asked) -> list[Finding]:
    """Whether the API server asks our webhook, and can trust who answers."""
    try:
        configuration = await asked.api.get(MUTATING_WEBHOOKS.path(name="gpufn"))
    except NotFound:
        return [
            failed("admission", "the API server has no webhook gpufn: pods are made as if it were not there", INSTALL)
        ]
    return [_trust(configuration)]


def _trust(configuration: Mapping[str, Any]) -> Finding:
    webhooks = objects_in(configuration, "webhooks")
    bundles = {str(object_in(webhook, "clientConfig").get("caBundle") or "") for webhook in webhooks}
    alone = [str(each.get("name")) for each in webhooks if not object_in(each, "clientConfig").get("caBundle")]
    if 0 < len(alone) < len(webhooks):  # those that an upgrade, or another overlay, has added
        said = f"{_some(alone)} has no authority to be trusted by: what it looks at is made as if it were not there"
        hint = "The leading controller writes it as soon as it sees that. Where it stays so, see why:"
        return failed("admission", said, f"{hint} kubectl -n {SYSTEM_NAMESPACE} logs deployment/gpufn-controller")
    if not webhooks or "" in bundles:
        return failed(
            "admission",
            "the API server has no authority to trust our webhook by: pods are made as if it were not there",
            f"The leading controller writes it: kubectl -n {SYSTEM_NAMESPACE} logs deployment/gpufn-controller",
        )
    try:
        end = min(last_day(base64.b64decode(bundle)) for bundle in bundles)
    except ValueError as exc:
        return failed("admission", f"the authority in its caBundle cannot be read: {exc}")
    days = (end - datetime.now(timezone.utc)).days
    words = f"{len(webhooks)} webhooks, their authority ends in {days} days"
    if days < 0:
        return failed("admission", f"their authority ended {-days} days ago: pods are made as if gpufn were not there")
    return (
        warning("admission", words, "Is a controller leading?") if days < _CERTIFICATE_DAYS else ok("admission", words)
    )


def last_day(bundle: bytes) -> datetime:
    """When the last authority of a bundle ends: older ones are in it for what they signed. Raises `ValueError`."""
    from cryptography import x509

    return max(certificate.not_valid_after_utc for certificate in x509.load_pem_x509_certificates(bundle))


def _instant(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None


# Nodes ----------------------------------------------------------------------------------------------------------------


async def check_agents(asked: Asked) -> Finding:
    daemon, nodes = await asyncio.gather(_agent_set(asked.api), asked.nodes())
    if daemon is None:
        return failed("agents", "there is no DaemonSet gpufn-agent: nothing is metered, no snapshot is found", INSTALL)
    status = object_in(daemon, "status")
    wanted, ready = status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
    look = f"kubectl -n {AGENTS_NAMESPACE} get pods -o wide"
    alone = [facts.node.name for facts in nodes if facts.node.offers and not (facts.agent and facts.agent.is_ready)]
    if alone:
        return failed("agents", f"none is ready on {_some(alone)}: GPUs there are not metered", look)
    if ready < wanted:
        return warning("agents", f"{ready} of {wanted} are ready", look)
    return ok("agents", f"{ready} of {wanted} are ready")


async def _agent_set(api: Api) -> dict[str, Any] | None:
    try:
        return await api.get(DAEMON_SETS.path(AGENTS_NAMESPACE, "gpufn-agent"))
    except NotFound:
        return None


async def check_gpus(asked: Asked) -> list[Finding]:
    nodes = await asked.nodes()
    with_gpus = [facts for facts in nodes if facts.node.offers]
    if not with_gpus:
        fix = "Nodes offer GPUs through their vendor's device plugin: kubectl get nodes -o yaml, under allocatable."
        return [warning("gpus", f"none of {len(nodes)} nodes offers a GPU", fix)]
    total = sum(offer.allocatable for facts in with_gpus for offer in facts.node.offers)
    free = sum(offer.free for facts in with_gpus for offer in facts.node.offers)
    findings = [ok("gpus", f"{total} on {len(with_gpus)} of {len(nodes)} nodes, {free} free")]
    unlabelled = [facts.node.name for facts in with_gpus if not all(offer.model for offer in facts.node.offers)]
    if unlabelled:
        said = f"nobody says which GPU model {_some(unlabelled)} has: functions that name one do not go there"
        findings.append(warning("gpu labels", said, "Install NVIDIA's GPU Feature Discovery, which labels nodes."))
    return findings


async def check_snapshots(asked: Asked) -> Finding:
    """Whether process snapshots work on the nodes, as their agents found by trying."""
    nodes = [facts for facts in await asked.nodes() if facts.said]
    if not nodes:
        return warning("snapshots", "no agent has said yet what its node can do")
    broken = [facts for facts in nodes if object_in(facts.said, "restore").get("works") is not True]
    kept = sum(len(facts.node.snapshots) for facts in nodes)
    if broken:
        why = object_in(broken[0].said, "restore").get("whyNot") or "it has not been tried yet"
        names = _some([facts.node.name for facts in broken])
        return warning("snapshots", f"CRIU does not work on {names}, functions load there: {_lower(str(why))}")
    return ok("snapshots", f"CRIU works on {len(nodes)} of {len(nodes)} nodes; they keep {kept}")


def _some(names: Sequence[str]) -> str:
    """``a, b, c and 12 more``."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


async def check_namespaces(asked: Asked) -> list[Finding]:
    """Those whose functions may keep snapshots."""
    found = await asked.api.list(NAMESPACES.path(), dict, label_selector=SNAPSHOTS_LABEL)
    if not found.items:
        fix = f"kubectl label namespace NAME {SNAPSHOTS_LABEL}=enabled"
        return [ok("namespaces", f"none lets its functions keep snapshots; to let one: {fix}")]
    return [_namespace(each["metadata"]["name"], object_in(each["metadata"], "labels")) for each in found.items]


def _namespace(name: str, labels: Mapping[str, str]) -> Finding:
    title = f"namespace {name}"
    if labels[SNAPSHOTS_LABEL] != "enabled":
        said = f"its label {SNAPSHOTS_LABEL} is {labels[SNAPSHOTS_LABEL]!r}, which says nothing"
        return warning(title, said, f"kubectl label --overwrite namespace {name} {SNAPSHOTS_LABEL}=enabled")
    level = labels.get(_ENFORCE, "privileged")
    if level in _REFUSING:
        said = f"it lets functions keep snapshots, and its Pod Security level {level} refuses their pods"
        return failed(
            title,
            said,
            f"kubectl label --overwrite namespace {name} {_ENFORCE}=privileged, or take the label {SNAPSHOTS_LABEL} away",
        )
    return ok(title, f"keeps snapshots; tenant {labels.get(TENANT_LABEL) or name}")


async def check_runtime(asked: Asked) -> Finding:
    classes = {each["metadata"]["name"] for each in (await asked.api.list(RUNTIME_CLASSES.path(), dict)).items}
    if "nvidia" in classes:
        return ok("runtime", "pods with NVIDIA GPUs get the RuntimeClass nvidia")
    return ok("runtime", "no RuntimeClass nvidia: pods get the nodes' default, which then has to show GPUs")


# Knative --------------------------------------------------------------------------------------------------------------


async def check_knative(asked: Asked) -> list[Finding]:
    """Its version, and the settings of it that decide how functions scale."""
    try:
        namespace = await asked.api.get(NAMESPACES.path(name=KNATIVE_NAMESPACE))
    except NotFound:
        return []
    version = object_in(namespace["metadata"], "labels").get("app.kubernetes.io/version", "of unknown version")
    autoscaler, defaults = await asyncio.gather(
        _config(asked.api, "config-autoscaler"), _config(asked.api, "config-defaults")
    )
    longest = defaults.get("max-revision-timeout-seconds", "600")
    said = f"Serving {version}, with the flags that it has; requests may take {longest} s"
    if autoscaler.get("allow-zero-initial-scale", "false").lower() != "true":
        said += "; each new Revision starts once (allow-zero-initial-scale is off)"
    return [ok("knative", said), *await _services(asked), *_zero(autoscaler)]


async def _services(asked: Asked) -> list[Finding]:
    """Whether Services are looked at: an overlay without Knative's part that was applied over one with it took that away."""
    try:
        configuration = await asked.api.get(MUTATING_WEBHOOKS.path(name="gpufn"))
    except NotFound:
        return []
    if any(webhook.get("name") == _SERVICES_WEBHOOK for webhook in objects_in(configuration, "webhooks")):
        return []
    said = (
        "no webhook of gpufn's looks at Services: mistakes in annotations are found only when a pod is made, what they say "
        "of scale and time does nothing, and keep-alive is not learned"
    )
    return [warning("knative services", said, f"{INSTALL}, or, beside OpenFaaS, manifests/overlays/both")]


def _zero(autoscaler: Mapping[str, str]) -> Iterable[Finding]:
    """What keeps functions from going to zero."""
    fix = f"kubectl -n {KNATIVE_NAMESPACE} edit configmap config-autoscaler"
    if autoscaler.get("enable-scale-to-zero", "true").lower() == "false":
        yield failed("zero", "no function goes to zero: enable-scale-to-zero is false", fix)
    elif autoscaler.get("min-scale", "0") not in ("", "0"):
        said = f"functions that do not say 0 never go to zero: min-scale is {autoscaler['min-scale']}"
        yield warning("zero", said, fix)


async def _config(api: Api, name: str) -> Mapping[str, str]:
    try:
        return object_in(await api.get(CONFIG_MAPS.path(KNATIVE_NAMESPACE, name)), "data")
    except NotFound:
        return {}


# The ledger -----------------------------------------------------------------------------------------------------------


async def check_usage(asked: Asked) -> Finding:
    try:
        found = await ClusterLedger(asked.api).get("/v1/starts", {"limit": "1"})
    except Unavailable as exc:
        if exc.code == "forbidden":
            return warning("usage", "you may not read the ledger", ALLOW)
        if exc.code == "ledger-down":  # its hint is to look here
            return failed("usage", _words(exc), f"kubectl -n {SYSTEM_NAMESPACE} logs deployment/gpufn-ledger")
        raise
    latest = next(iter(found.get("starts", ())), None)
    return ok("usage", "the ledger answers" if latest else "the ledger answers, and knows of no start yet")
