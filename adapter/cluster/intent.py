"""What a pod or a pod template asks of gpufn, read from its labels, annotations and limits.

Pure. What the values mean and which are allowed is `adapter.spec`'s; here is where users of each framework write them,
and which of two that say the same wins:

- GPUs in a container's limits win over annotations, because Kubernetes allocates by them;
- annotations win over ``com.openfaas.scale.*`` labels and over constraints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapter.cluster.inventory import is_gpu, pod_requests, selects_spot
from adapter.cluster.json_parts import object_in as _object, objects_in as _objects
from adapter.cluster.quantity import parse_quantity
from adapter.errors import ConfigError
from adapter.keys import (
    DOMAIN,
    FUNCTION_LABEL,
    KNATIVE_REVISION_LABEL,
    KNATIVE_SERVICE_LABEL,
    OPENFAAS_LABEL,
    OWN_ANNOTATIONS,
    REVISION_LABEL,
    SNAPSHOTS_LABEL,
    TENANT_LABEL,
)
from adapter.policy.needs import Need
from adapter.policy.node_terms import NodeTerms, Requirement, Toleration
from adapter.spec import MAX_GPUS, FunctionSpec, asked_in, parse_spec

_GPU, _MIG = f"{DOMAIN}/gpu", f"{DOMAIN}/mig"
_MIG_RESOURCE = "nvidia.com/mig-"
TENANT_ANNOTATION, PRICE_CLASS_ANNOTATION = f"{DOMAIN}/tenant", f"{DOMAIN}/price-class"

SCALE_LABELS = "com.openfaas.scale."
"""Their names begin so."""
_OURS_OF_SCALE = {"min": "min", "max": "max", "zero-duration": "idle"}
"""Labels of OpenFaaS Pro, and the annotations of ours that mean the same."""

_SIDECARS = frozenset(
    {"queue-proxy", "istio-proxy", "linkerd-proxy", "envoy", "daprd", "vault-agent", "cloud-sql-proxy"}
)
"""Containers that meshes and frameworks put beside a user's."""
_DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
_KNATIVE_CONTAINER = "user-container"

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_SPEC_READ = ("schedulerName", "nodeSelector", "tolerations", "overhead", "resources")
_CONTAINER_READ = ("name", "resources", "restartPolicy")

_OTHERS_SCHEDULER = ("hami.io/", "kai.scheduler/", "volcano.sh/", "scheduling.k8s.io/group-name", "kueue.x-k8s.io/")
"""Starts of annotations and labels by which another scheduler takes a pod as its own."""
_OTHERS_FRACTION = frozenset({"gpu-fraction", "gpu-memory"})
"""Annotations of KAI and Run:ai for a part of a GPU."""
_OTHERS_RESOURCE = ("nvidia.com/gpumem", "nvidia.com/gpucores", "volcano.sh/vgpu")
"""Starts of resources that HAMi and Volcano allocate."""

_ON_MIG = "NVIDIA's driver cannot checkpoint what runs on a MIG slice"
_ON_SHARE = "a share of a GPU may be MPS's, and NVIDIA's driver cannot checkpoint what runs under MPS"


@dataclass(frozen=True, slots=True)
class Intent:
    """A function's pod as its user meant it. `framework`: ``knative``, ``openfaas`` or ``plain``.

    `container` is the index of the user's container in the pod's spec. `asked`: the `FunctionSpec` attributes that
    the user set, by annotation, label or limit; the others are defaults. `notes` are for people: which of two things
    that say the same wins, what has no effect here.
    """

    function: str
    namespace: str
    revision: str
    framework: str
    tenant: str
    container: int
    spec: FunctionSpec
    need: Need
    asked: frozenset[str] = frozenset()
    snapshots: bool = False
    """They are taken of it and used: its namespace lets it keep some, its spec does not switch them off, and what it
    holds of a GPU, if anything, is something that a driver can checkpoint."""
    hints_only: bool = False
    """Another scheduler places it, or shares its GPU: nothing may be required of its nodes, and no resource added."""
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.function}.{self.namespace}"

    def measured(self, load_s: float | None) -> Intent:
        """With how long its start without a snapshot takes, if that was ever measured."""
        return self if load_s is None else replace(self, need=replace(self.need, load_s=load_s))


def read_intent(
    pod: Mapping[str, Any],
    *,
    namespace: str,
    namespace_labels: Mapping[str, str],
    function: str = "",
    framework: str = "",
) -> Intent | None:
    """What a pod asks, or the template of one; None where it is none of ours.

    `namespace` and its labels, because a pod that is being made may not say where. `function` and `framework` name
    a template that has not got its framework's labels yet.

    Raises `ConfigError`: a key that is unknown, a value that cannot be used, contradictions, another's tenant.
    """
    labels, annotations = _texts(pod, "labels"), _texts(pod, "annotations")
    function, framework, revision = _identity(labels, function, framework)
    containers = _containers(pod)
    if not function or not containers:
        return None
    index = _user_container(containers, annotations)
    limits = _limits(containers[index])
    ours = {name: text for name, text in annotations.items() if _is_users(name)}
    if not ours and not any(map(is_gpu, limits)):
        return None
    policy, notes = policy_of(labels=labels, annotations=ours, limits=limits)
    tenant = _tenant(policy, namespace, namespace_labels)
    spec = replace(parse_spec({}, policy), tenant=tenant)
    keeps = namespace_labels.get(SNAPSHOTS_LABEL) == "enabled" and spec.process_snapshot != "off"
    need = _need(pod, spec, limits)
    hints_only = _is_others(pod, labels, annotations, limits)
    by_others = (hints_only and bool(need.gpus)) or _is_others_share(annotations, limits)
    beside = _beside(need, limits)
    why_no_snapshots = _why_no_snapshots(need, containers[index], ours, beside, by_others=by_others) if keeps else ""
    return Intent(
        function=function,
        namespace=namespace,
        revision=revision,
        framework=framework,
        tenant=tenant,
        container=index,
        spec=spec,
        need=replace(
            need,
            function=f"{function}.{namespace}",
            snapshot=f"{tenant}/{function}.{namespace}" if keeps else "",
        ),
        asked=asked_in(policy),
        snapshots=keeps and not why_no_snapshots,
        hints_only=hints_only,
        notes=(
            *notes,
            *_without_effect(spec, ours, labels),
            *(f"{name} is not looked at where a node is chosen: {need.resource} alone is" for name in beside),
            *([f"process snapshots are not used: {why_no_snapshots}"] if why_no_snapshots else ()),
        ),
    )


def trimmed(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The pod with its names, and with no more than what `read_intent` looks at: of all the rest users may write a lot."""
    metadata, spec = _object(pod, "metadata"), _object(pod, "spec")
    kept = {key: metadata[key] for key in ("namespace", "name", "uid", "labels", "annotations") if key in metadata}
    if isinstance(annotations := kept.get("annotations"), Mapping):
        kept["annotations"] = {name: _trimmed_text(name, text) for name, text in annotations.items()}
    asked = {key: spec[key] for key in _SPEC_READ if key in spec}
    for key in ("containers", "initContainers"):
        if isinstance(found := spec.get(key), list):
            asked[key] = [_only(each, _CONTAINER_READ) for each in found]
    required = _only(_object(_object(spec, "affinity"), "nodeAffinity"), (_REQUIRED,))
    return {"metadata": kept, "spec": {**asked, "affinity": {"nodeAffinity": required}}}


def _trimmed_text(annotation: str, text: object) -> object:
    """Of others' annotations only their names say something."""
    is_read = _is_users(annotation) or annotation == _DEFAULT_CONTAINER or not isinstance(text, str)
    return text if is_read else ""


def _only(value: Any, keys: Iterable[str]) -> dict[str, Any]:
    return {key: value[key] for key in keys if key in value} if isinstance(value, Mapping) else {}


def policy_of(
    *,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    limits: Mapping[str, str],
    constraints: Iterable[str] = (),
) -> tuple[dict[str, str], list[str]]:
    """Annotations for `adapter.spec` of all that a user wrote, and notes on what won.

    `limits` are a container's, `constraints` a deploy's of OpenFaaS: of these, those that name a key of ours.
    """
    policy = {
        f"{DOMAIN}/{ours}": labels[SCALE_LABELS + theirs]
        for theirs, ours in _OURS_OF_SCALE.items()
        if SCALE_LABELS + theirs in labels
    }
    if labels.get(SCALE_LABELS + "zero") == "false":
        policy[f"{DOMAIN}/idle"] = "0"
    policy |= split_constraints(constraints)[0]
    policy |= {name: text for name, text in annotations.items() if _is_users(name)}
    counted, at_most = _counted(limits)
    notes = [_won(name, text, policy[name]) for name, text in counted.items() if _differs(policy.get(name), text)]
    return {**at_most, **policy, **counted}, notes


def split_constraints(constraints: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """OpenFaaS's constraints ``key=value``: those that are annotations of ours, and those that select nodes.

    They are node selectors in OpenFaaS and stay that. No node has a label with a key of ours, so such a constraint
    could only keep a function off every node: it is read as what it says. Others than ``key=value`` are dropped, as
    OpenFaaS does.
    """
    pairs = [(key.strip(), value.strip()) for key, is_pair, value in (c.partition("=") for c in constraints) if is_pair]
    pairs = [(key, value.removeprefix("=").strip()) for key, value in pairs if key]  # ``==`` was Docker Swarm's
    ours = {key: value for key, value in pairs if key.startswith(DOMAIN + "/")}
    return ours, {key: value for key, value in pairs if key not in ours}


def _counted(limits: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What a container's limits say of GPUs, as annotations; and what they leave open, at most."""
    for resource in sorted(filter(is_gpu, limits)):
        count = parse_quantity(limits[resource])
        if count > MAX_GPUS:
            raise ConfigError(
                f"The limit {resource} = {limits[resource]} cannot be used.",
                why="It is more than a replica can have.",
                hint=f"Ask for at most {MAX_GPUS}.",
                code="bad-value",
            )
        if count <= 0:
            continue
        if resource.startswith(_MIG_RESOURCE):
            profile = resource.removeprefix(_MIG_RESOURCE).removesuffix(".shared")
            return {_GPU: str(count), _MIG: profile}, {}
        if resource.endswith(".shared"):  # how much of a GPU that is, only its node knows
            return {}, {_GPU: str(count)}
        return {_GPU: str(count)}, {}
    return {}, {}


def _differs(said: str | None, counted: str) -> bool:
    if said is None:
        return False
    try:
        return float(said) != float(counted)
    except ValueError:
        return said.replace("+", ".") != counted


def _won(name: str, text: str, said: str) -> str:
    return f"{name} = {said} has no effect: the container's limits ask for {text}, and Kubernetes allocates by them."


# Parts of a pod -------------------------------------------------------------------------------------


def _texts(pod: Mapping[str, Any], key: str) -> dict[str, str]:
    """Labels or annotations. Raises `ConfigError`."""
    metadata = pod.get("metadata")
    found = metadata.get(key) if isinstance(metadata, Mapping) else None
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for text in (*found, *found.values())):
        raise ConfigError(f"metadata.{key} is no object of texts.", code="bad-json")
    return dict(found)


def _identity(labels: Mapping[str, str], function: str, framework: str) -> tuple[str, str, str]:
    """Name, framework and revision; no name where the pod is no function's."""
    hash_of_template = labels.get(REVISION_LABEL) or labels.get("pod-template-hash", "")
    if function:
        return function, framework, labels.get(KNATIVE_REVISION_LABEL, hash_of_template)
    if revision := labels.get(KNATIVE_REVISION_LABEL):
        return labels.get(KNATIVE_SERVICE_LABEL) or revision, "knative", revision
    if name := labels.get(OPENFAAS_LABEL):
        return name, "openfaas", hash_of_template
    return labels.get(FUNCTION_LABEL, ""), "plain", hash_of_template


def _is_users(annotation: str) -> bool:
    return annotation.startswith(DOMAIN + "/") and annotation not in OWN_ANNOTATIONS


def _containers(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    spec = pod.get("spec")
    found = spec.get("containers") if isinstance(spec, Mapping) else None
    return [c if isinstance(c, Mapping) else {} for c in found] if isinstance(found, list) else []


def _user_container(containers: list[Mapping[str, Any]], annotations: Mapping[str, str]) -> int:
    """The one that kubectl would show, that Knative calls the user's, that has a GPU, or the first that is no sidecar."""
    names = enumerate(str(container.get("name", "")) for container in containers)
    users = {index: name for index, name in names if name not in _SIDECARS}
    for name in (annotations.get(_DEFAULT_CONTAINER), _KNATIVE_CONTAINER):
        if name in users.values():
            return next(index for index, own in users.items() if own == name)
    with_gpu = [index for index in users if any(map(is_gpu, _limits(containers[index])))]
    return next(iter([*with_gpu, *users]), 0)


def _limits(container: Mapping[str, Any]) -> dict[str, str]:
    """Requests count where there is no limit: of devices both are the same."""
    resources = container.get("resources")
    if not isinstance(resources, Mapping):
        return {}
    found: dict[str, str] = {}
    for kind in ("requests", "limits"):
        amounts = resources.get(kind)
        if isinstance(amounts, Mapping):
            found |= {str(name): str(amount) for name, amount in amounts.items()}
    return found


def _tenant(policy: Mapping[str, str], namespace: str, namespace_labels: Mapping[str, str]) -> str:
    tenant = namespace_labels.get(TENANT_LABEL) or namespace
    said = policy.get(TENANT_ANNOTATION, tenant)
    if said != tenant:
        raise ConfigError(
            f"{TENANT_ANNOTATION} = {said!r} cannot be used in namespace {namespace}.",
            why=f"This namespace belongs to {tenant}: bills and snapshots of tenants are kept apart.",
            hint=f"Leave it out, or have an administrator label the namespace {TENANT_LABEL}.",
            code="tenant",
        )
    return tenant


def _is_others(
    pod: Mapping[str, Any], labels: Mapping[str, str], annotations: Mapping[str, str], limits: Mapping[str, str]
) -> bool:
    """Whether another scheduler, or one that shares GPUs, decides about this pod."""
    spec = pod.get("spec")
    scheduler = spec.get("schedulerName") if isinstance(spec, Mapping) else None
    return (
        scheduler not in (None, "", "default-scheduler")
        or any(key.startswith(_OTHERS_SCHEDULER) for key in (*labels, *annotations))
        or _is_others_share(annotations, limits)
    )


def _is_others_share(annotations: Mapping[str, str], limits: Mapping[str, str]) -> bool:
    """Whether it is given a part of a GPU that no resource of ours need count."""
    return not _OTHERS_FRACTION.isdisjoint(annotations) or any(name.startswith(_OTHERS_RESOURCE) for name in limits)


def _beside(need: Need, limits: Mapping[str, str]) -> tuple[str, ...]:
    """GPU resources of a container beside the one that counts."""
    return tuple(
        name for name in sorted(filter(is_gpu, limits)) if name != need.resource and parse_quantity(limits[name]) > 0
    )


def _why_no_snapshots(
    need: Need, container: Mapping[str, Any], ours: Mapping[str, str], beside: Iterable[str], *, by_others: bool
) -> str:
    """Why no process can be dumped that holds such a part of a GPU; empty where one can, or it holds none.

    The same before the webhook has chosen a resource and after: a share is one by what its user wrote.
    """
    if _object(container, "resources").get("claims"):
        return "what its resource claims give it, no other pod gets"
    if by_others:
        return "another scheduler gives GPUs to this pod, and the one that takes snapshots would go past it"
    if not need.gpus:
        return ""
    if need.mig_profile:
        return _ON_MIG
    if _asks_for_share(ours):
        return _ON_SHARE
    return next(filter(None, map(why_not_checkpointed, (need.resource, *beside))), "")


def why_not_checkpointed(resource: str) -> str:
    """Why a driver cannot checkpoint what runs on that resource, as far as its name says; empty where it can."""
    if resource.startswith(_MIG_RESOURCE):
        return _ON_MIG
    if resource.endswith(".shared"):
        return _ON_SHARE
    if resource and not resource.startswith("nvidia.com/"):
        return f"of what runs on {resource} none can be taken: only NVIDIA's driver gives a process's GPU back"
    return ""


def _asks_for_share(ours: Mapping[str, str]) -> bool:
    try:
        return 0 < float(ours.get(_GPU, "0")) < 1
    except ValueError:  # whoever parses it says so
        return False


def _without_effect(spec: FunctionSpec, ours: Mapping[str, str], labels: Mapping[str, str]) -> Iterable[str]:
    if not spec.gpus:
        for name in ("models", "memory", "compute", "mig"):
            if f"{DOMAIN}/{name}" in ours:
                yield f"{DOMAIN}/{name} has no effect: no GPU is asked for ({_GPU})."
    for name in labels:
        if name.startswith(DOMAIN + "/") and name not in (FUNCTION_LABEL, TENANT_LABEL, REVISION_LABEL):
            yield f"Label {name} has no effect: write it as an annotation."


# What it needs of a node ----------------------------------------------------------------------------


def _need(pod: Mapping[str, Any], spec: FunctionSpec, limits: Mapping[str, str]) -> Need:
    requests = pod_requests(pod)
    resource = next((name for name in sorted(limits) if is_gpu(name) and requests.get(name)), "")
    terms = _terms(pod)
    _check_spot(spec, terms)
    return Need(
        function="",
        gpus=spec.gpus or (1.0 if resource else 0.0),
        models=spec.gpu_models,
        memory_bytes=spec.gpu_memory_bytes,
        compute_capability=spec.compute_capability,
        mig_profile=spec.mig_profile,
        spot=spec.spot,
        cpu_milli=requests.get("cpu", 0),
        host_memory_bytes=requests.get("memory", 0),
        resource=resource,
        units=requests.get(resource, 0),
        terms=terms,
        cold_price=spec.cold_price,
    )


def _terms(pod: Mapping[str, Any]) -> NodeTerms:
    """What the pod itself asks of nodes: its selector, its required affinity, its tolerations."""
    spec = _object(pod, "spec")
    required = _object(_object(_object(spec, "affinity"), "nodeAffinity"), _REQUIRED)
    return NodeTerms(
        all_of=tuple(
            Requirement(key, "In", (str(value),)) for key, value in sorted(_object(spec, "nodeSelector").items())
        ),
        any_of=tuple(
            tuple(_requirement(item) for item in (*_objects(term, "matchExpressions"), *_objects(term, "matchFields")))
            for term in _objects(required, "nodeSelectorTerms")
        ),
        tolerations=tuple(
            Toleration(
                key=str(item.get("key") or ""),
                value=None if item.get("operator") == "Exists" else str(item.get("value") or ""),
                effect=str(item.get("effect") or ""),
            )
            for item in _objects(spec, "tolerations")
        ),
    )


def _requirement(item: Mapping[str, Any]) -> Requirement:
    """Nodes are known by their labels: the one field that can be asked for, ``metadata.name``, is one of them."""
    key = str(item.get("key", ""))
    values = item.get("values")
    return Requirement(
        key="kubernetes.io/hostname" if key == "metadata.name" else key,
        operator=str(item.get("operator", "")),
        values=tuple(map(str, values)) if isinstance(values, list) else (),
    )


def _check_spot(spec: FunctionSpec, terms: NodeTerms) -> None:
    """Raises `ConfigError` where the pod's own selector asks for what its `spot` refuses."""
    for requirement in terms.all_of:
        selects = selects_spot(requirement)
        if selects is not None and spec.spot == ("never" if selects else "require"):
            raise ConfigError(
                f"{DOMAIN}/spot = {spec.spot} and the node selector {requirement} contradict each other.",
                why="No node can be both.",
                hint="Leave one of them out.",
                code="contradiction",
            )
