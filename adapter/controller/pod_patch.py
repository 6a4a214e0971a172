"""What the pod webhook changes in a function's pod, so that it lands where it wakes soonest and has what a GPU function needs.

Pure: a pod, what it asks for and what placement says of each node in, JSON Patch operations out. Only the user's own
container is touched, never a sidecar; whatever the user, or a framework, has set stays as it is. A pod that has been
through here (its marker says so) is not changed again, so that the API server may ask twice.

Terms for the scheduler are of two kinds. *Hard* ones name labels that node autoscalers know, and nothing else: a label
that comes with a running node would keep them from ever making one. *Soft* ones name nodes: one that has become full
meanwhile is no failure. Where no node fits, a pod gets no soft terms: whatever the autoscaler makes is right.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from adapter.cluster.intent import Intent, why_not_checkpointed
from adapter.cluster.inventory import is_gpu, spot_terms
from adapter.cluster.json_patch import Editor
from adapter.hosts.seccomp import RESTORE_RIGHT
from adapter.keys import (
    ADMITTED_ANNOTATION,
    DOMAIN,
    ENV_CRIU,
    LENT_CRIU_PATH,
    NODE_CRIU_PATH,
    OWN_ANNOTATIONS,
    PATCHED_ANNOTATION,
    PLACEMENT_ANNOTATION,
    SECCOMP_PROFILE,
    SNAPSHOT_PATH,
)
from adapter.policy.node_terms import Requirement
from adapter.policy.placement import MOST_PREFERRED, Verdict, default_resource, explain, preferences, tolerations
from adapter.replica import ReplicaSettings

SNAPSHOTS_VOLUME, CRIU_VOLUME = "gpufn-snapshots", "gpufn-criu"
NVIDIA_RUNTIME = "nvidia"
"""The RuntimeClass that NVIDIA's operator makes."""

_HOSTNAME = "kubernetes.io/hostname"
_NAMED_REFUSALS, _REFUSAL_GROUPS = 5, 20


@dataclass(frozen=True, slots=True)
class Facts:
    """What the patch rests on beside the pod and the verdicts.

    `hard`: alternatives, one of which a node must meet whole; none: any node will do. `hostnames`: the label
    ``kubernetes.io/hostname`` of nodes where it is not the node's name. `restores`: some node's agent says that CRIU
    works there.
    """

    now_ns: int
    hard: tuple[tuple[Requirement, ...], ...] = ()
    runtime_classes: frozenset[str] = frozenset()
    hostnames: Mapping[str, str] = field(default_factory=dict)
    restores: bool = False


@dataclass(frozen=True, slots=True)
class PodPatch:
    """JSON Patch `operations`, none where nothing is to be done, and `warnings` for whoever made the pod."""

    operations: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


def patch_pod(pod: Mapping[str, Any], intent: Intent, verdicts: Sequence[Verdict], facts: Facts) -> PodPatch:
    """What makes of `pod` the pod that `intent` means, on the nodes of which `verdicts` tell, the best first."""
    annotations = (pod.get("metadata") or {}).get("annotations") or {}
    mark = _mark(annotations, intent)
    if annotations.get(PATCHED_ANNOTATION) == mark:
        return PodPatch()
    work = _Work(Editor(pod), intent, facts, [v for v in verdicts if v.fits])
    work.gpu()
    work.nodes()
    if intent.snapshots:
        work.snapshots()
    work.variables()
    work.probe()
    for name, value in (
        (PATCHED_ANNOTATION, mark),
        (PLACEMENT_ANNOTATION, _note(work, verdicts)),
        (ADMITTED_ANNOTATION, str(facts.now_ns)),
    ):
        work.edit.put(("metadata", "annotations", name), value)
    return PodPatch(tuple(work.edit.operations), (*intent.notes, *work.warnings))


def _mark(annotations: Mapping[str, str], intent: Intent) -> str:
    """Of what was asked, not of what came of it: asked again, the answer is that it is done, whatever has changed since."""
    said = {
        name: text
        for name, text in annotations.items()
        if name.startswith(DOMAIN + "/") and name not in OWN_ANNOTATIONS
    }
    keeps = bool(intent.need.snapshot)  # `snapshots` may follow from a resource that was chosen here
    inputs = [intent.framework, intent.key, intent.revision, intent.tenant, keeps, sorted(said.items())]
    return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=8).hexdigest()


@dataclass(slots=True)
class _Work:
    """One pod while it is patched. `fitting` is in order, the best first."""

    edit: Editor
    intent: Intent
    facts: Facts
    fitting: list[Verdict]
    warnings: list[str] = field(default_factory=list)
    resource: str = ""
    units: int = 0

    def _inside(self, *path: str) -> Any:
        return self.edit.get("spec", "containers", self.intent.container, *path)

    def _path(self, *path: str) -> tuple[str | int, ...]:
        return ("spec", "containers", self.intent.container, *path)

    # A GPU --------------------------------------------------------------------------------------

    def gpu(self) -> None:
        """The resource and the runtime class. A pod of another scheduler asks for its GPU in its own way."""
        need = self.intent.need
        if not (need.gpus or need.resource or need.mig_profile):
            return
        self.resource, self.units = self._chosen()
        if not self.intent.hints_only:
            if not need.resource:
                for kind in ("limits", "requests"):  # Kubernetes wants both the same
                    self.edit.put(self._path("resources", kind, self.resource), str(self.units))
            if _vendor(self.resource) == "nvidia.com" and NVIDIA_RUNTIME in self.facts.runtime_classes:
                self._put_new(("spec", "runtimeClassName"), NVIDIA_RUNTIME)
        elif not need.resource:
            self.warnings.append("no GPU resource is added: another scheduler gives GPUs to this pod, in its own way")

    def _chosen(self) -> tuple[str, int]:
        """Resource and units: what the best node has, else what a node autoscaler can look for."""
        if self.fitting and self.fitting[0].resource and not self.intent.need.resource:
            return self.fitting[0].resource, self.fitting[0].units
        return default_resource(self.intent.need)

    def _tolerate(self) -> None:
        there = self.edit.get("spec", "tolerations") or []
        for toleration in tolerations(self.intent.need):
            if is_gpu(toleration.key) and _vendor(toleration.key) != _vendor(self.resource):
                continue
            wanted: dict[str, str] = {"key": toleration.key, "operator": "Exists"}
            if toleration.value is not None:
                wanted |= {"operator": "Equal", "value": toleration.value}
            if toleration.effect:
                wanted["effect"] = toleration.effect
            if wanted not in there and {"operator": "Exists"} not in there:
                self.edit.append(("spec", "tolerations"), wanted)

    # Nodes --------------------------------------------------------------------------------------

    def nodes(self) -> None:
        self._tolerate()
        either = itertools.product(self.facts.hard or ((),), spot_terms(self.intent.need.spot) or ((),))
        alternatives = [(*by_model, *by_price) for by_model, by_price in either]
        if any(alternatives) and not self.intent.hints_only:
            self._require(alternatives)
        if not self.resource and len({verdict.cost_gpu_s for verdict in self.fitting}) == 1:
            return  # without a GPU and a snapshot, the scheduler knows better
        for term in preferences(self.fitting):
            hosts = tuple(self.facts.hostnames.get(name, name) for name in term.nodes)
            preference = {"matchExpressions": [_to_json(Requirement(_HOSTNAME, "In", hosts))]}
            self.edit.append(
                (*_NODE_AFFINITY, "preferredDuringSchedulingIgnoredDuringExecution"),
                {"weight": term.weight, "preference": preference},
            )

    def _require(self, alternatives: Iterable[tuple[Requirement, ...]]) -> None:
        """Terms of a pod are alternatives as well: the user's and ours hold both where each pair of them is one."""
        path = (*_NODE_AFFINITY, "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms")
        first, *others = [[_to_json(item) for item in term] for term in alternatives]
        theirs = list(self.edit.get(*path) or ())
        if not theirs:
            for term in (first, *others):
                self.edit.append(path, {"matchExpressions": term})
            return
        whole = [(at, term) for at, term in enumerate(theirs) if term]  # an empty one matches no node, and never shall
        for (_, term), other in itertools.product(whole, others):
            both = [*(term.get("matchExpressions") or ()), *other]
            self.edit.append(path, {**term, "matchExpressions": both})
        for (at, _), expression in itertools.product(whole, first):
            self.edit.append((*path, at, "matchExpressions"), expression)

    # Snapshots ----------------------------------------------------------------------------------

    def snapshots(self) -> None:
        """The function's own folder of the node, a CRIU, and the one right and the profile with which it restores.

        The right counts for root alone. An ordinary user has it from CRIU's file, as long as nothing says
        ``allowPrivilegeEscalation: false``.
        """
        why_not = self._why_no_snapshots()
        if why_not:
            self.warnings.append(f"process snapshots are not used: {why_not}")
            return
        place = f"{SNAPSHOT_PATH}/{self.intent.need.snapshot}"
        self._mount(SNAPSHOTS_VOLUME, place, {"mountPath": place})
        self._mount(CRIU_VOLUME, NODE_CRIU_PATH, {"mountPath": LENT_CRIU_PATH, "readOnly": True})
        if self._inside("securityContext", "capabilities") is None:
            self.edit.put(self._path("securityContext", "capabilities"), {"add": [RESTORE_RIGHT], "drop": ["ALL"]})
        elif not {RESTORE_RIGHT, "ALL"} & set(self._inside("securityContext", "capabilities", "add") or ()):
            self.edit.append(self._path("securityContext", "capabilities", "add"), RESTORE_RIGHT)
        profile = {"type": "Localhost", "localhostProfile": SECCOMP_PROFILE}
        self._put_new(self._path("securityContext", "seccompProfile"), profile)
        self._say(
            {"GPUFN_SNAPSHOT_DIR": SNAPSHOT_PATH, "GPUFN_SNAPSHOT_BY": "host", ENV_CRIU: f"{LENT_CRIU_PATH}/criu"}
        )

    def _why_no_snapshots(self) -> str:
        rights = self._inside("securityContext") or {}
        profile = rights.get("seccompProfile") or self.edit.get("spec", "securityContext", "seccompProfile")
        if why := why_not_checkpointed(self.resource):
            return why
        if not self.facts.restores:
            return "no node's agent says that CRIU works there"
        if profile and profile.get("localhostProfile") != SECCOMP_PROFILE:
            return f"this pod has a seccomp profile of its own, {profile.get('type')}, under which CRIU cannot restore"
        if rights.get("allowPrivilegeEscalation") is False and not self._is_root():
            return "allowPrivilegeEscalation: false takes away the right that CRIU's file carries"
        if rights.get("privileged"):
            return "this container is privileged"
        containers = [*(self.edit.get("spec", "containers") or ()), *(self.edit.get("spec", "initContainers") or ())]
        named = {volume["name"] for volume in self.edit.get("spec", "volumes") or ()}
        named |= {mount["name"] for each in containers for mount in each.get("volumeMounts") or ()}
        if named & {SNAPSHOTS_VOLUME, CRIU_VOLUME}:  # it would see ours in its own way: a CRIU that it may write to
            return f"this pod has a volume {SNAPSHOTS_VOLUME} or {CRIU_VOLUME} of its own"
        return ""

    def _is_root(self) -> bool:
        """Whether the pod says so; who an image's user is, is not known here."""
        user = self._inside("securityContext", "runAsUser")
        if user is None:
            user = self.edit.get("spec", "securityContext", "runAsUser")
        return bool(user == 0)

    def _mount(self, volume: str, node_path: str, mount: Mapping[str, Any]) -> None:
        """A folder of the node that is made where it is missing: without an agent, a start is slow and does not fail."""
        if all(item["name"] != volume for item in self.edit.get("spec", "volumes") or ()):
            source = {"path": node_path, "type": "DirectoryOrCreate"}
            self.edit.append(("spec", "volumes"), {"name": volume, "hostPath": source})
        if all(item["mountPath"] != mount["mountPath"] for item in self._inside("volumeMounts") or ()):
            self.edit.append(self._path("volumeMounts"), {"name": volume, **mount})

    # What the shim is told ----------------------------------------------------------------------

    def variables(self) -> None:
        """Who it is, and what its user asked for by annotation. Variables that are there already win."""
        intent, spec = self.intent, self.intent.spec
        said: dict[str, Any] = {
            "function": intent.function,
            "namespace": intent.namespace,
            "revision": intent.revision,
            "tenant": intent.tenant,
            **{name: getattr(spec, name) for name in sorted(_SHIM_SETTINGS & intent.asked)},
        }
        if spec.gpus and "in_flight" not in intent.asked:
            said["in_flight"] = _concurrency(self.edit.document) or spec.in_flight
        if said.get("exec_timeout_s"):  # a drain lets a request have its time
            said["write_timeout_s"] = spec.exec_timeout_s
        self._say(ReplicaSettings(**said).to_env(said.keys()))
        if not (self.resource or self.intent.hints_only or self._inside("resources", "claims")):
            self._say({"CUDA_VISIBLE_DEVICES": ""})  # some runtimes show every GPU to whoever was given none

    def _say(self, variables: Mapping[str, str]) -> None:
        """Variables that neither the user set, nor under another name that the shim reads."""
        there = {item["name"] for item in self._inside("env") or ()}
        for name, value in variables.items():
            if not there & {name, *_OTHER_NAMES.get(name, ())}:
                self.edit.append(self._path("env"), {"name": name, "value": value})

    # Whether it is ready ------------------------------------------------------------------------

    def probe(self) -> None:
        """Where no probe is, and outside Knative, whose queue-proxy asks the port itself.

        An entrypoint listens at once and holds what comes, so that the first request of a start from zero is never
        refused; Knative's activator and our provider send it there. Where a Service chooses among replicas, one that
        still loads should not be chosen: an OpenFaaS function answers ``/_/ready`` when its model is there. A bare
        Deployment may carry our label over an image that knows no such path, so its port is enough. No liveness
        probe: an entrypoint ends with its model process, and a long computation is no reason to be killed.
        """
        if self.intent.framework == "knative" or any(self._inside(f"{kind}Probe") for kind in ("readiness", "startup")):
            return
        ports = [item["containerPort"] for item in self._inside("ports") or ()]
        if self.intent.framework == "openfaas":
            check: dict[str, Any] = {"httpGet": {"path": "/_/ready", "port": (ports or [8080])[0]}, "periodSeconds": 2}
        elif ports:
            check = {"tcpSocket": {"port": ports[0]}, "periodSeconds": 2}
        else:
            return
        self.edit.put(self._path("readinessProbe"), check)

    def _put_new(self, path: tuple[str | int, ...], value: Any) -> None:
        if self.edit.get(*path) is None:
            self.edit.put(path, value)


_NODE_AFFINITY = ("spec", "affinity", "nodeAffinity")

_SHIM_SETTINGS = frozenset(
    {"in_flight", "queue", "body_limit_bytes", "start_timeout_s", "exec_timeout_s", "process_snapshot",
     "weight_snapshot", "snapshot_env"}
)  # fmt: skip
"""Attributes of a spec that are the shim's to keep; they have the same names there."""

_OTHER_NAMES = {item.metadata["names"][0]: item.metadata["names"][1:] for item in fields(ReplicaSettings)}


def _vendor(resource: str) -> str:
    return resource.partition("/")[0]


def _to_json(requirement: Requirement) -> dict[str, Any]:
    values = {"values": list(requirement.values)} if requirement.values else {}
    return {"key": requirement.key, "operator": requirement.operator, **values}


def _concurrency(pod: Mapping[str, Any]) -> int:
    """How many requests Knative sends to a replica at once, as it tells its own container; 0: it has no bound."""
    for container in pod["spec"]["containers"]:
        if container["name"] == "queue-proxy":
            said = {item["name"]: item.get("value", "") for item in container.get("env") or ()}
            text = said.get("CONTAINER_CONCURRENCY", "")
            return int(text) if text.isdecimal() else 0
    return 0


def _note(work: _Work, verdicts: Sequence[Verdict]) -> str:
    """The decision for ``gpufn explain``: what was asked for, the nodes preferred, and why the others were not.

    ``{"resource", "units", "prefer": [[node, score, wake_s]], "refused": [{"code", "reason", "count", "nodes"}],
    "why"}``; of a thousand nodes with one reason, a few are named.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        if not verdict.fits:
            groups.setdefault((verdict.code, verdict.reason), []).append(verdict.node)
    largest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:_REFUSAL_GROUPS]
    note = {
        "resource": work.resource,
        "units": work.units,
        "prefer": [[v.node, round(v.score, 1), round(v.wake_s, 2)] for v in work.fitting[:MOST_PREFERRED]],
        "refused": [
            {"code": code, "reason": reason, "count": len(nodes), "nodes": nodes[:_NAMED_REFUSALS]}
            for (code, reason), nodes in largest
        ],
        "why": "" if work.fitting else explain(verdicts),
    }
    return json.dumps({name: value for name, value in note.items() if value}, separators=(",", ":"))
