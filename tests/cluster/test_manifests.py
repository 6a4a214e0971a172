"""What an API server makes of the manifests: it takes them whole, holds our own components to their bounds, and is as
before when they are removed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter.cluster.intent import read_intent
from adapter.controller.snapshot_pod import snapshot_pod
from adapter.keys import FUNCTION_LABEL, SNAPSHOTS_LABEL, SYSTEM_NAMESPACE
from tests.testbed.cluster import Cluster
from tests.testbed.installation import FUNCTIONS, applied, kustomize
from tests.testbed.machines import TestbedFailed

MANIFESTS = Path(__file__).parents[2] / "manifests"
OVERLAYS = sorted(path.parent.name for path in (MANIFESTS / "overlays").glob("*/kustomization.yaml"))
AGENTS = "gpufn-agents"
NODE = "has-an-agent"
CLUSTER_KINDS = (
    "namespaces",
    "clusterroles",
    "clusterrolebindings",
    "mutatingwebhookconfigurations",
    "validatingadmissionpolicies",
    "validatingadmissionpolicybindings",
    "priorityclasses",
)
AGENT, CONTROLLER = (
    f"system:serviceaccount:{name}" for name in ("gpufn-agents:gpufn-agent", "gpufn-system:gpufn-controller")
)


@pytest.fixture(scope="module")
def installed(control_plane: Cluster) -> Iterator[Cluster]:
    """A control plane with everything applied, the frameworks' namespaces, and a node that is only an object."""
    with applied(control_plane, "both", FUNCTIONS, "knative-serving"):
        control_plane.apply([{"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}])
        yield control_plane
        control_plane.kubectl("delete", "node", NODE)


def refused(cluster: Cluster, *words: str, stdin: str = "") -> str:
    """Why kubectl could not."""
    with pytest.raises(TestbedFailed) as caught:
        cluster.kubectl(*words, stdin=stdin)
    return str(caught.value)


def make(cluster: Cluster, item: Any, *words: str) -> str:
    """Whether the API server would take it; nothing is kept."""
    return cluster.kubectl(
        "create", "--dry-run=server", "--output=json", "--filename=-", *words, stdin=json.dumps(item)
    )


def remove_pod(cluster: Cluster, namespace: str, name: str, *words: str) -> None:
    """At once: no kubelet will say that it has ended."""
    cluster.kubectl("--namespace", namespace, "delete", "pod", name, "--force", "--grace-period=0", *words)


# Applied --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_api_server_takes_every_object(installed, name):
    said = installed.kubectl("apply", "--dry-run=server", kustomize(name))
    assert said.count("(server dry run)") == installed.kubectl("kustomize", str(MANIFESTS / "overlays" / name)).count(
        "\nkind: "
    )


@pytest.mark.parametrize("name", ["postgresql", "nvidia-runtime", "alerts"])
def test_it_takes_components_too(installed, name, tmp_path):
    content = {"resources": [_relative(tmp_path, "base")], "components": [_relative(tmp_path, f"components/{name}")]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    installed.kubectl("apply", "--dry-run=server", f"--kustomize={tmp_path}")


def _relative(folder: Path, name: str) -> str:
    """Kustomize takes no absolute paths."""
    return f"{'../' * (len(folder.resolve().parts) - 1)}{str(MANIFESTS / name).lstrip('/')}"


def test_what_is_applied_again_changes_nothing(installed):
    assert installed.kubectl("diff", kustomize("both")) == ""


def test_expressions_of_policies_have_the_right_types(installed):
    for policy in installed.get("validatingadmissionpolicies")["items"]:
        assert policy["status"]["typeChecking"] == {}, policy["metadata"]["name"]


def test_pod_security_lets_our_pods_in(installed):
    """The control plane has no nodes: pods are made, and wait."""
    for deployment in ("gpufn-webhook", "gpufn-controller", "gpufn-ledger", "gpufn-provider"):
        condition = "jsonpath={.status.conditions[?(@.type=='ReplicaFailure')].message}"
        wait = ("wait", f"deployment/{deployment}", "--for=jsonpath={.status.unavailableReplicas}", "--timeout=30s")
        installed.kubectl("--namespace", SYSTEM_NAMESPACE, *wait)
        assert (
            installed.kubectl("--namespace", SYSTEM_NAMESPACE, "get", "deployment", deployment, f"--output={condition}")
            == ""
        )


# Nodes ----------------------------------------------------------------------------------------------------------


def gpu_node(name: str) -> dict[str, Any]:
    return {"apiVersion": "gpufn.dev/v1alpha1", "kind": "GpuNode", "metadata": {"name": name}}


STATUS = {
    "observedAt": "2026-01-02T03:04:05Z",
    "agent": {"version": "0.1.0"},
    "driver": "580.95.05",
    "whyNot": "",
    "gpus": [
        {"uuid": "GPU-1", "model": "NVIDIA L4", "memoryBytes": 24152899584, "slice": ""},
        {"uuid": "MIG-2", "model": "NVIDIA A100", "memoryBytes": 5100273664, "slice": "1g.5gb"},
    ],
    "snapshots": [{"name": "team/embed.fn", "key": "k", "image": "i", "bytes": 9, "usedAt": "2026-01-02T03:04:05Z"}],
    "diskBytesPerSecond": 1.5e9,
    "restore": {"works": True, "whyNot": ""},
}


@pytest.fixture
def agent_token(installed) -> Iterator[str]:
    """As the kubelet of `NODE` asks for the agent's there."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "agent-of-that-node", "namespace": AGENTS},
        "spec": {"serviceAccountName": "gpufn-agent", "nodeName": NODE, "containers": [{"name": "a", "image": "a"}]},
    }
    installed.apply([pod])
    bound = ("--bound-object-kind=Pod", "--bound-object-name=agent-of-that-node")
    yield installed.kubectl("--namespace", AGENTS, "create", "token", "gpufn-agent", *bound).strip()
    remove_pod(installed, AGENTS, "agent-of-that-node")


def as_agent(cluster: Cluster, token: str, method: str, path: str, body: Any) -> Any:
    """An agent's own request: kubectl would show the administrator's certificate beside its token."""
    with cluster.session() as session:
        session.cert = None
        session.headers["Authorization"] = f"Bearer {token}"
        session.headers["Content-Type"] = "application/apply-patch+yaml"
        return session.request(
            method, f"{cluster.site.server}/apis/gpufn.dev/v1alpha1/gpunodes/{path}", data=json.dumps(body)
        )


APPLY = "?fieldManager=gpufn-agent&force=true"


def test_an_agent_writes_what_its_node_has(installed, agent_token):
    assert as_agent(installed, agent_token, "PATCH", NODE + APPLY, gpu_node(NODE)).ok
    answer = as_agent(installed, agent_token, "PATCH", f"{NODE}/status{APPLY}", {**gpu_node(NODE), "status": STATUS})
    assert answer.json()["status"] == STATUS
    installed.kubectl("delete", "gpunode", NODE)


@pytest.mark.parametrize("part", ["", "/status"])
def test_an_agent_cannot_write_what_another_node_has(installed, agent_token, part):
    installed.apply([gpu_node("another")])
    answer = as_agent(
        installed, agent_token, "PATCH", f"another{part}{APPLY}", {**gpu_node("another"), "status": STATUS}
    )
    assert answer.status_code == 403
    assert f"writes the GpuNode of its own node only; this one is on {NODE}." in answer.json()["message"]
    installed.kubectl("delete", "gpunode", "another")


def test_a_token_that_names_no_node_writes_nothing(installed):
    token = installed.kubectl("--namespace", AGENTS, "create", "token", "gpufn-agent").strip()
    answer = as_agent(installed, token, "PATCH", NODE + APPLY, gpu_node(NODE))
    assert (answer.status_code, "a node that its token does not name" in answer.json()["message"]) == (403, True)


def test_an_agent_deletes_nothing(installed, agent_token):
    assert as_agent(installed, agent_token, "DELETE", NODE, None).status_code == 403


def test_what_a_node_has_is_read_at_a_glance(installed):
    installed.apply([gpu_node("seen")])
    installed.kubectl(
        "patch", "gpunode", "seen", "--subresource=status", "--type=merge", "--patch", json.dumps({"status": STATUS})
    )
    heading, row = installed.kubectl("get", "gpunodes", "seen").splitlines()
    assert heading.split() == ["NAME", "GPU", "DRIVER", "RESTORES", "OBSERVED"]
    assert "NVIDIA L4" in row
    installed.kubectl("delete", "gpunode", "seen")


# The controller -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opted_in(installed) -> Iterator[str]:
    """A namespace whose functions may keep snapshots."""
    installed.make_namespace("with-snapshots", {SNAPSHOTS_LABEL: "enabled"})
    yield "with-snapshots"
    installed.kubectl("delete", "namespace", "with-snapshots")


def wanted(namespace: str) -> dict[str, Any]:
    """The pod that the controller makes for a function with everything that must not come along."""
    pod = {
        "metadata": {"name": "f-1", "labels": {FUNCTION_LABEL: "f"}, "annotations": {"gpufn.dev/gpu": "1"}},
        "spec": {
            "containers": [
                {
                    "name": "f",
                    "image": "f",
                    "env": [{"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
                    "envFrom": [{"secretRef": {"name": "s"}}],
                    "volumeMounts": [{"name": "s", "mountPath": "/s"}],
                    "resources": {"limits": {"nvidia.com/gpu": "1", "memory": "1Gi"}},
                }
            ],
            "volumes": [{"name": "s", "secret": {"secretName": "s"}}],
        },
    }
    intent = read_intent(pod, namespace=namespace, namespace_labels={SNAPSHOTS_LABEL: "enabled"})
    assert intent
    return snapshot_pod(pod, intent, NODE)


def test_the_controller_makes_pods_that_take_snapshots(installed, opted_in):
    made = json.loads(make(installed, wanted(opted_in), f"--as={CONTROLLER}"))
    assert made["metadata"]["name"].startswith("gpufn-snapshot-")
    assert made["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "1Gi"}
    assert (made["spec"]["priority"], made["spec"]["preemptionPolicy"]) == (-100, "Never")


HOST_FOLDER = {"name": "n", "hostPath": {"path": "/var/lib/kubelet"}}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"metadata": {"labels": {}}}, "no label gpufn.dev/task=snapshot"),
        ({"spec": {"automountServiceAccountToken": True}}, "has a token"),
        ({"spec": {"priorityClassName": "gpufn"}}, "has another priority"),
        ({"spec": {"priorityClassName": "system-node-critical"}}, "has another priority"),
        ({"spec": {"priorityClassName": ""}}, "has another priority"),
        ({"spec": {"hostNetwork": True}}, "in a namespace of the node"),
        ({"spec": {"hostPID": True}}, "in a namespace of the node"),
        ({"spec": {"volumes": [{"name": "s", "secret": {"secretName": "s"}}]}}, "a secret, a token, or a folder"),
        ({"spec": {"volumes": [HOST_FOLDER]}}, "a folder of the node that is neither"),
        (
            {"container": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}},
            "is a secret",
        ),
        (
            {"spec": {"volumes": [{"name": "x", "hostPath": {"path": "/var/lib/gpufn/criu"}}]}},
            "CRIU could be written to",
        ),
        (
            {"spec": {"volumes": [{"name": "x", "hostPath": {"path": "/var/lib/gpufn/snapshots/a/f.another"}}]}},
            "folder",
        ),
        ({"container": {"envFrom": [{"secretRef": {"name": "s"}}]}}, "is a secret"),
        ({"container": {"securityContext": {"privileged": True}}}, "more rights than CHECKPOINT_RESTORE"),
        ({"container": {"securityContext": {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}}}, "more rights"),
    ],
)
def test_the_controller_makes_no_pod_that_could_do_more(installed, opted_in, change, why):
    pod = wanted(opted_in)
    pod["metadata"] |= change.get("metadata", {})
    pod["spec"] |= change.get("spec", {})
    pod["spec"]["containers"][0] |= change.get("container", {})
    assert why in refused(
        installed, "create", "--dry-run=server", "--filename=-", f"--as={CONTROLLER}", stdin=json.dumps(pod)
    )


def somebodys(namespace: str, **container: Any) -> dict[str, Any]:
    """A pod as the webhook leaves it, made by a user."""
    metadata = {"name": "somebodys", "namespace": namespace, "labels": {FUNCTION_LABEL: "f"}}
    place = f"/var/lib/gpufn/snapshots/t/f.{namespace}"
    rights = {
        "capabilities": {"add": ["CHECKPOINT_RESTORE"], "drop": ["ALL"]},
        "seccompProfile": {"type": "Localhost", "localhostProfile": "gpufn.json"},
    }
    mounts = [
        {"name": "gpufn-snapshots", "mountPath": place},
        {"name": "gpufn-criu", "mountPath": "/c", "readOnly": True},
    ]
    spec = {
        "containers": [{"name": "f", "image": "f", "securityContext": rights, "volumeMounts": mounts, **container}],
        "volumes": [
            {"name": "gpufn-snapshots", "hostPath": {"path": place}},
            {"name": "gpufn-criu", "hostPath": {"path": "/var/lib/gpufn/criu"}},
        ],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def test_where_snapshots_are_kept_pods_may_have_what_that_needs(installed, opted_in):
    make(installed, somebodys(opted_in))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"metadata": {"labels": {"gpufn.dev/task": "snapshot"}}}, "is for the pods that gpufn's controller makes"),
        ({"spec": {"priorityClassName": "gpufn-snapshots"}}, "is for the pods that gpufn's controller makes"),
        ({"spec": {"hostPID": True}}, "in a namespace of the node"),
        ({"spec": {"volumes": [HOST_FOLDER]}, "container": {"volumeMounts": []}}, "a folder of the node"),
        ({"volume": {"hostPath": {"path": "/var/lib/gpufn/snapshots/t/f.another"}}}, "a folder of the node"),
        ({"container": {"volumeMounts": [{"name": "gpufn-criu", "mountPath": "/c"}]}}, "a folder of the node"),
        ({"container": {"securityContext": {"privileged": True}}}, "is privileged"),
        ({"container": {"securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}}}, "beyond those"),
        ({"container": {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}}, "no system-call profile"),
    ],
)
def test_and_nothing_that_would_be_more(installed, opted_in, change, why):
    pod = somebodys(opted_in)
    pod["metadata"] |= change.get("metadata", {})
    pod["spec"] |= change.get("spec", {})
    pod["spec"]["containers"][0] |= change.get("container", {})
    pod["spec"]["volumes"][0] |= change.get("volume", {})
    assert why in refused(installed, "create", "--dry-run=server", "--filename=-", stdin=json.dumps(pod))


def test_the_controller_makes_no_pod_where_nobody_opted_in(installed):
    said = refused(
        installed,
        "create",
        "--dry-run=server",
        "--filename=-",
        f"--as={CONTROLLER}",
        stdin=json.dumps(wanted(FUNCTIONS)),
    )
    assert "has no label gpufn.dev/snapshots=enabled" in said


def test_the_controller_deletes_no_pod_but_its_own(installed, opted_in):
    own = wanted(opted_in)
    own["metadata"]["name"] = "its-own"
    installed.kubectl("create", "--filename=-", f"--as={CONTROLLER}", stdin=json.dumps(own))
    installed.apply([somebodys(opted_in)])
    assert "has no label gpufn.dev/task=snapshot" in refused(
        installed, "--namespace", opted_in, "delete", "pod", "somebodys", f"--as={CONTROLLER}"
    )
    for name, words in (("its-own", [f"--as={CONTROLLER}"]), ("somebodys", [])):
        remove_pod(installed, opted_in, name, *words)


def test_nobody_else_changes_the_label_by_which_it_knows_them(installed, opted_in):
    own = wanted(opted_in)
    own["metadata"]["name"] = "with-the-label"
    installed.kubectl("create", "--filename=-", f"--as={CONTROLLER}", stdin=json.dumps(own))
    installed.apply([somebodys(opted_in)])
    for name, change in (("with-the-label", "gpufn.dev/task-"), ("somebodys", "gpufn.dev/task=snapshot")):
        said = refused(installed, "--namespace", opted_in, "label", "pod", name, change)
        assert "is for the pods that gpufn's controller makes" in said
        installed.kubectl("--namespace", opted_in, "label", "pod", name, "another=label")
        remove_pod(installed, opted_in, name)


# Rights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("account", "may", "may_not"),
    [
        (
            "gpufn-system:gpufn-webhook",
            ["list pods -A", "watch gpunodes.gpufn.dev"],
            ["get secrets -A", "create pods -A"],
        ),
        (
            "gpufn-system:gpufn-controller",
            [
                "get secrets/gpufn-webhook-tls -n gpufn-system",
                "patch mutatingwebhookconfigurations/gpufn",
                "watch mutatingwebhookconfigurations/gpufn",
                "create networkpolicies.networking.k8s.io/gpufn-snapshot-pods -n openfaas-fn",
            ],
            [
                "get secrets/gpufn-ledger -n gpufn-system",
                "patch mutatingwebhookconfigurations/another",
                "watch mutatingwebhookconfigurations",
                "create networkpolicies.networking.k8s.io/another -n openfaas-fn",
                "create configmaps/another -n gpufn-system",
                "list secrets -A",
            ],
        ),
        (
            "gpufn-system:gpufn-ledger",
            ["create tokenreviews.authentication.k8s.io"],
            ["list pods -A", "get secrets -A"],
        ),
        (
            "gpufn-agents:gpufn-agent",
            ["patch gpunodes.gpufn.dev --subresource=status"],
            ["patch nodes", "get secrets -A", "get pods -A", "delete gpunodes.gpufn.dev"],
        ),
        (
            "gpufn-system:gpufn-provider",
            ["create pods -n openfaas-fn", "list namespaces"],
            [
                "create pods -n default",
                "get secrets -n gpufn-system",
                "update pods -n openfaas-fn",
                "get services -n openfaas-fn",
            ],
        ),
        ("gpufn-system:gpufn-reader", [], ["list pods -A", "get gpunodes.gpufn.dev"]),
    ],
)
def test_accounts_may_do_this_and_not_that(installed, account, may, may_not):
    def can(question: str) -> str:
        words = ("auth", "can-i", f"--as=system:serviceaccount:{account}", *question.split())
        try:
            return installed.kubectl(*words).strip()
        except TestbedFailed as error:
            assert "resource type" not in str(error)  # a word that is misspelt may nothing, too
            return "no"

    assert {question: can(question) for question in may} == dict.fromkeys(may, "yes")
    assert {question: can(question) for question in may_not} == dict.fromkeys(may_not, "no")


# Removed --------------------------------------------------------------------------------------------------------


def test_what_is_applied_anew_keeps_the_authority_that_the_controller_wrote(installed):
    authority = base64.b64encode(installed.site.authority.certificate.read_bytes()).decode()
    patch = [{"op": "add", "path": f"/webhooks/{n}/clientConfig/caBundle", "value": authority} for n in range(4)]
    installed.kubectl("patch", "mutatingwebhookconfiguration", "gpufn", "--type=json", "--patch", json.dumps(patch))
    installed.kubectl("apply", kustomize("both"))
    hooks = installed.get("mutatingwebhookconfiguration", "gpufn")["webhooks"]
    assert [hook["clientConfig"]["caBundle"] for hook in hooks] == [authority] * 4


def test_removal_takes_everything_but_functions(installed):
    template = {"metadata": {"labels": {"faas_function": "f"}}, "spec": {"containers": [{"name": "f", "image": "f"}]}}
    function = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "f", "namespace": FUNCTIONS},
        "spec": {"selector": {"matchLabels": {"faas_function": "f"}}, "template": template},
    }
    installed.apply([function, gpu_node(NODE)])
    uid = installed.get("deployment", "f", "--namespace", FUNCTIONS)["metadata"]["uid"]
    installed.kubectl("delete", kustomize("both"), timeout_s=180)
    for kind in CLUSTER_KINDS:
        assert installed.kubectl("get", kind, "--selector=app.kubernetes.io/part-of=gpufn", "--output=name") == "", kind
    assert "gpufn" not in installed.kubectl("get", "crds", "--output=name")
    assert installed.get("deployment", "f", "--namespace", FUNCTIONS)["metadata"]["uid"] == uid
