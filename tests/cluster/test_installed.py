"""Everything as it is installed: the image, `kubectl apply -k`, pods that are ready and may do what they do, and back."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from adapter.keys import ADMITTED_ANNOTATION, FUNCTION_LABEL
from tests.testbed.cluster import Cluster
from tests.testbed.installation import Installation, kustomize
from tests.testbed.machines import TestbedFailed, wait_until

SYSTEM = "--namespace=gpufn-system"
AGENTS = "--namespace=gpufn-agents"


@pytest.fixture
def installed(gpufn: Installation) -> Cluster:
    return gpufn.cluster


def said(cluster: Cluster) -> str:
    """What all components logged, and what is said of their pods."""
    words = ("logs", "--selector=app.kubernetes.io/part-of=gpufn", "--all-containers", "--prefix", "--tail=-1")
    logs = [cluster.kubectl(space, *words, "--max-log-requests=20", "--ignore-errors") for space in (SYSTEM, AGENTS)]
    return "\n".join([*logs, cluster.kubectl("get", "events", SYSTEM), cluster.kubectl("get", "events", AGENTS)])


def test_every_component_may_do_what_it_does(installed):
    """They have run for a while: what their rights leave out they have met."""
    refused = [line for line in said(installed).splitlines() if "forbidden" in line.lower()]
    assert refused == []


def test_the_authority_that_the_controller_made_is_the_one_that_the_api_server_knows(installed):
    held = installed.get("configmap", "gpufn-ca", SYSTEM)["data"]["ca.crt"]
    hooks = installed.get("mutatingwebhookconfiguration", "gpufn")["webhooks"]
    assert {hook["clientConfig"]["caBundle"] for hook in hooks} == {base64.b64encode(held.encode()).decode()}
    assert installed.get("configmap", "gpufn-ca", AGENTS)["data"]["ca.crt"] == held


def test_agents_say_what_their_nodes_have(installed):
    def seen() -> bool:
        return {
            item["metadata"]["name"]: len(item["status"]["gpus"]) for item in installed.get("gpunodes")["items"]
        } == {node.name: node.node.gpus for node in installed.nodes.values()}

    wait_until("GpuNodes", seen, 60)


def function(name: str, image: str) -> dict[str, Any]:
    labels = {"app": name, FUNCTION_LABEL: name}
    container = {"name": "f", "image": image, "imagePullPolicy": "IfNotPresent", "ports": [{"containerPort": 8080}]}
    template = {
        "metadata": {"labels": labels, "annotations": {"gpufn.dev/in-flight": "3"}},
        "spec": {"containers": [container]},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"selector": {"matchLabels": {"app": name}}, "template": template},
    }


def pod_of(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    [pod] = cluster.get("pods", f"--namespace={namespace}", f"--selector=app={name}")["items"]
    return dict(pod)


def deploy(cluster: Cluster, namespace: str, name: str, image: str) -> dict[str, Any]:
    """The pod of a Deployment of ones own, when it is ready."""
    cluster.kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=json.dumps(function(name, image)))
    cluster.kubectl("rollout", "status", f"deployment/{name}", f"--namespace={namespace}", "--timeout=90s")
    return pod_of(cluster, namespace, name)


def test_the_api_server_asks_the_webhook(installed, namespace, echo_image):
    assert ADMITTED_ANNOTATION in deploy(installed, namespace, "asked", echo_image)["metadata"]["annotations"]


def test_a_pod_that_is_nobodys_function_is_not_looked_at(installed, namespace):
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "annotations": {"gpufn.dev/gpu": "many"}},
    }
    pod["spec"] = {"containers": [{"name": "p", "image": "gpufn.test/pause:1"}]}
    installed.kubectl("create", "--dry-run=server", f"--namespace={namespace}", "--filename=-", stdin=json.dumps(pod))
    pod["metadata"]["labels"] = {FUNCTION_LABEL: "p"}
    with pytest.raises(TestbedFailed) as caught:
        installed.kubectl(
            "create", "--dry-run=server", f"--namespace={namespace}", "--filename=-", stdin=json.dumps(pod)
        )
    assert "gpufn.dev/gpu" in str(caught.value)


def test_people_read_the_ledger_with_a_token_of_its_reader_and_not_without(installed):
    path = "/api/v1/namespaces/gpufn-system/services/https:gpufn-ledger:8443/proxy/v1/starts"
    token = installed.kubectl(SYSTEM, "create", "token", "gpufn-reader", "--audience=gpufn-ledger").strip()
    with installed.session() as session:
        url = f"{installed.site.server}{path}"
        assert session.get(url, headers={"X-Gpufn-Token": token}).json().keys() == {"starts"}
        assert session.get(url).status_code == 401


@pytest.mark.removes_gpufn
def test_removal_leaves_functions_running_and_nodes_free(gpufn, namespace, echo_image):
    cluster = gpufn.cluster
    uid = deploy(cluster, namespace, "stays", echo_image)["metadata"]["uid"]
    cluster.kubectl("delete", kustomize("both"), timeout_s=300)
    kinds = "namespaces,crds,clusterroles,mutatingwebhookconfigurations,validatingadmissionpolicies"
    assert "gpufn" not in cluster.kubectl("get", kinds, "--output=name")
    pod = pod_of(cluster, namespace, "stays")
    assert (pod["metadata"]["uid"], pod["status"]["phase"]) == (uid, "Running")
