"""All of gpufn on a real Kubernetes under a real Knative, as a platform engineer puts it there and an ML engineer uses it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import requests

from adapter.records import StartRecord
from tests.testbed import functions
from tests.testbed.machines import TestbedFailed, wait_until

WAIT_S = 120
SERVICE = "serving.knative.dev/service"


@pytest.fixture(scope="module")
def slow_image(cluster, repository, tmp_path_factory):
    """A function whose `load` takes a moment."""
    folder = tmp_path_factory.mktemp("slow-image")
    layout = functions.base_layout(folder / "base")
    image = functions.function_image("dev.local/slow:1", repository / "tests/functions/load-slow", layout, folder)
    cluster.load(image)
    return image.name


@pytest.fixture(scope="module")
def gpu_image(cluster, repository, tmp_path_factory):
    """A function that keeps a pattern in device memory, by the driver's own bindings."""
    folder = tmp_path_factory.mktemp("gpu-image")
    layout, source = functions.base_layout(folder / "base"), repository / "tests/functions/gpu-memory"
    asked = (source / "requirements.txt").read_text()
    image = functions.function_image("dev.local/gpu-memory:1", source, layout, folder, asked)
    cluster.load(image)
    return image.name


def ksvc(name: str, namespace: str, image: str, *, limits: Any = None, **annotations: str) -> dict[str, Any]:
    """`annotations` of ours, with _ for -."""
    own = {f"gpufn.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}
    own = {"gpufn.dev/idle": "6s", **own}
    container = {"image": image, "imagePullPolicy": "IfNotPresent", "resources": {"limits": limits or {}}}
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"template": {"metadata": {"annotations": own}, "spec": {"containers": [container]}}},
    }


def deploy(cluster, service) -> None:
    cluster.apply([service])
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    cluster.kubectl("wait", f"ksvc/{name}", "-n", namespace, "--for=condition=Ready", f"--timeout={WAIT_S}s")


def call(cluster, name: str, namespace: str, limit_s: float = WAIT_S) -> str:
    with requests.Session() as session:
        session.trust_env = False
        answer = session.get(
            cluster.ingress_url, headers={"Host": f"{name}.{namespace}.functions.test"}, timeout=limit_s
        )
    assert answer.status_code == 200, answer.text
    return answer.text


def pods(cluster, name: str, namespace: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.get("pods", "-n", namespace, "-l", f"{SERVICE}={name}")["items"]
    return found


def reasons(cluster, namespace: str) -> dict[str, str]:
    found = cluster.get("events.events.k8s.io", "-n", namespace)["items"]
    return {item["reason"]: item.get("note", "") for item in found}


def starts(gpufn, name: str, namespace: str) -> list[StartRecord]:
    """The newest first."""
    found = gpufn.ledger(f"starts?function={name}&namespace={namespace}")
    return [StartRecord.from_json(item) for item in found["starts"]]


def test_a_function_wakes_from_its_snapshot_and_every_second_is_in_the_ledger(gpufn, namespace, slow_image):
    cluster = gpufn.cluster
    cluster.kubectl("label", "namespace", namespace, "gpufn.dev/snapshots=enabled")
    deploy(cluster, ksvc("slow", namespace, slow_image, snapshot="on"))
    assert call(cluster, "slow", namespace) == "ready"
    wait_until("snapshot", lambda: "SnapshotTaken" in reasons(cluster, namespace), WAIT_S)
    node = pods(cluster, "slow", namespace)[0]["spec"]["nodeName"]
    wait_until("end of the last pod", lambda: not pods(cluster, "slow", namespace), WAIT_S)
    wait_until(
        "snapshot in the node's own list",
        lambda: (
            f"{namespace}/slow.{namespace}"
            in [item["name"] for item in cluster.get("gpunode", node)["status"]["snapshots"]]
        ),
        WAIT_S,
    )
    assert call(cluster, "slow", namespace) == "ready"
    assert pods(cluster, "slow", namespace)[0]["spec"]["nodeName"] == node
    wait_until("second start in the ledger", lambda: len(starts(gpufn, "slow", namespace)) >= 2, WAIT_S)
    latest, first = starts(gpufn, "slow", namespace)[:2]
    assert (first.rung.value, latest.rung.value) == ("load", "restore")
    assert {phase.name.value for phase in latest.phases} >= {"schedule", "pull", "boot", "restore"}
    held = gpufn.ledger(f"leases?start_ns=0&end_ns={time.time_ns()}&function=slow&namespace={namespace}")
    assert {item["tenant"] for item in held["leases"]} == {namespace}
    assert {item["replica"] for item in held["leases"]} == {first.replica, latest.replica}


def test_a_gpu_function_lands_on_the_model_it_asks_for_and_its_device_is_metered(gpufn, namespace, echo_image):
    cluster = gpufn.cluster
    deploy(cluster, ksvc("big", namespace, echo_image, limits={"nvidia.com/gpu": "1"}, models="A100"))
    (pod,) = pods(cluster, "big", namespace)
    assert pod["spec"]["nodeName"] == "node2"
    assert "gpufn.dev/placement" in pod["metadata"]["annotations"]

    def devices() -> set[str]:
        found = gpufn.ledger(f"leases?start_ns=0&end_ns={time.time_ns()}&function=big&namespace={namespace}")
        return {item["device"] for item in found["leases"]}

    wait_until("lease", devices, WAIT_S)
    assert all(device.startswith("GPU-") for device in devices())


def test_a_gpu_function_wakes_from_its_snapshot_where_its_node_has_one_gpu(gpufn, namespace, gpu_image):
    """The pod that takes it waits until the replica has given the GPU back, and what it holds then is the function's."""
    cluster = gpufn.cluster
    cluster.kubectl("label", "namespace", namespace, "gpufn.dev/snapshots=enabled")
    deploy(cluster, ksvc("memory", namespace, gpu_image, limits={"nvidia.com/gpu": "1"}, models="A100"))
    before = json.loads(call(cluster, "memory", namespace))
    assert before["whole"]
    wait_until("snapshot", lambda: "SnapshotTaken" in reasons(cluster, namespace), WAIT_S)
    wait_until(
        "snapshot in the node's own list",
        lambda: (
            f"{namespace}/memory.{namespace}"
            in [item["name"] for item in cluster.get("gpunode", "node2")["status"]["snapshots"]]
        ),
        WAIT_S,
    )
    assert json.loads(call(cluster, "memory", namespace))["whole"]
    wait_until("second start in the ledger", lambda: len(starts(gpufn, "memory", namespace)) >= 2, WAIT_S)
    latest, first = starts(gpufn, "memory", namespace)[:2]
    assert (first.rung.value, latest.rung.value) == ("load", "restore")
    assert {phase.name.value for phase in latest.phases} >= {"restore", "cuda_restore"}
    found = gpufn.ledger(f"leases?start_ns=0&end_ns={time.time_ns()}&function=memory&namespace={namespace}")["leases"]
    taking = [lease for lease in found if lease["replica"] not in {first.replica, latest.replica}]
    assert taking
    assert {lease["tenant"] for lease in found} == {namespace}
    assert all(lease["device"].startswith("GPU-") for lease in taking)


def test_a_pod_that_takes_a_snapshot_gives_its_gpu_to_any_function(gpufn, namespace, echo_image, tmp_path):
    cluster = gpufn.cluster
    cluster.kubectl("label", "namespace", namespace, "gpufn.dev/snapshots=enabled")
    container = {
        "name": "snapshot",
        "image": echo_image,
        "command": ["sleep", "3600"],
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
        "securityContext": {"capabilities": {"drop": ["ALL"]}},
    }
    metadata = {
        "name": "taking",
        "namespace": namespace,
        "labels": {"gpufn.dev/task": "snapshot"},
    }
    spec = {
        "priorityClassName": "gpufn-snapshots",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node2"]}]}
                    ]
                }
            }
        },
        "containers": [container],
    }
    taking = tmp_path / "taking.json"
    taking.write_text(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}))
    cluster.kubectl("create", "-f", str(taking), "--as=system:serviceaccount:gpufn-system:gpufn-controller")
    cluster.kubectl("wait", "pod/taking", "-n", namespace, "--for=condition=Ready", f"--timeout={WAIT_S}s")
    deploy(cluster, ksvc("wants", namespace, echo_image, limits={"nvidia.com/gpu": "1"}, models="A100"))
    (pod,) = pods(cluster, "wants", namespace)
    assert pod["spec"]["nodeName"] == "node2"
    cluster.kubectl("wait", "pod/taking", "-n", namespace, "--for=delete", f"--timeout={WAIT_S}s")


def test_a_spent_budget_lets_no_replica_be_made_and_says_so_where_people_look(gpufn, namespace, echo_image):
    cluster = gpufn.cluster
    deploy(cluster, ksvc("frugal", namespace, echo_image, limits={"nvidia.com/gpu": "1"}, budget="2s", idle="30s"))
    wait_until("event", lambda: "BudgetSpent" in reasons(cluster, namespace), WAIT_S)
    assert pods(cluster, "frugal", namespace)  # what runs goes on
    wait_until("end of the last pod", lambda: not pods(cluster, "frugal", namespace), WAIT_S)
    with pytest.raises(requests.Timeout):  # Knative keeps it waiting
        call(cluster, "frugal", namespace, limit_s=20)
    wait_until("refusal", lambda: "FailedCreate" in reasons(cluster, namespace), WAIT_S)
    said = reasons(cluster, namespace)["FailedCreate"]
    assert f"The budget of frugal.{namespace} is spent." in said
    assert "00:00 UTC" in said
    assert not pods(cluster, "frugal", namespace)


def test_a_limit_alone_says_that_a_function_wants_a_gpu(gpufn, namespace, echo_image):
    """``kn service create --limit nvidia.com/gpu=1`` alone."""
    deploy(gpufn.cluster, ksvc("plain", namespace, echo_image, limits={"nvidia.com/gpu": "1"}))
    (pod,) = pods(gpufn.cluster, "plain", namespace)
    tolerations = [item.get("key") for item in pod["spec"]["tolerations"]]
    assert "nvidia.com/gpu" in tolerations


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ({"modles": "A100"}, "Did you mean gpufn.dev/models?"),
        ({"gpu": "0.5", "mig": "1g.5gb"}, "mig"),
        ({"idle": "-3s"}, "gpufn.dev/idle"),
        ({"tenant": "somebody-else"}, "tenant"),
    ],
)
def test_what_contradicts_itself_is_refused_where_it_was_written(gpufn, namespace, echo_image, annotations, said):
    with pytest.raises(TestbedFailed, match="denied the request") as refused:
        gpufn.cluster.apply([ksvc("wrong", namespace, echo_image, **annotations)])
    assert said in str(refused.value)


def test_a_gpu_that_nobody_has_is_told_on_the_pod_with_every_nodes_reason(gpufn, namespace, echo_image):
    gpufn.cluster.apply([ksvc("none", namespace, echo_image, gpu="1", models="B300")])
    wait_until("event", lambda: "GpuFunctionNeverFits" in reasons(gpufn.cluster, namespace), WAIT_S)
    assert "another GPU model" in reasons(gpufn.cluster, namespace)["GpuFunctionNeverFits"]
