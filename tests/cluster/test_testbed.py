"""The testbed is a real Kubernetes: pods get GPUs, names and tokens; Knative sleeps and wakes; nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.stubs.build import why_not as why_no_stubs
from tests.testbed.cluster import Cluster
from tests.testbed.machines import wait_until
from tests.testbed.nodes import gpu_ids
from tests.testbed.programs import PYTHON
from tests.testbed.slots import CGROUP, CGROUPS, SLOTS, Slot

WAIT_S = 90


def pod(name: str, namespace: str, image: str, *command: str, **spec: Any) -> dict[str, Any]:
    container: dict[str, Any] = {"name": "main", "image": image, "resources": spec.pop("resources", {})}
    if command:
        container["command"] = list(command)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": 1, **spec},
    }


def said(cluster: Cluster, namespace: str, name: str) -> str:
    """What a pod printed that ran to its end, which must be a good one."""

    def phase() -> str:
        return cluster.get("pod", name, "-n", namespace)["status"]["phase"]

    wait_until(f"end of {name}", lambda: phase() in {"Succeeded", "Failed"}, WAIT_S)
    printed = cluster.kubectl("logs", name, "-n", namespace)
    assert phase() == "Succeeded", printed
    return printed


def ksvc(name: str, namespace: str, image: str, **annotations: str) -> dict[str, Any]:
    settings = {f"autoscaling.knative.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "template": {
                "metadata": {"annotations": settings},
                "spec": {"containers": [{"image": image, "ports": [{"containerPort": 8080}]}]},
            }
        },
    }


def call(cluster: Cluster, host: str, body: bytes) -> requests.Response:
    return requests.post(cluster.ingress_url, data=body, headers={"Host": host}, timeout=WAIT_S)


def test_a_pod_gets_the_gpus_that_the_kubelet_gave_it(cluster, namespace, echo_image):
    show = ("python3", "-c", "import os; print(os.environ['NVIDIA_VISIBLE_DEVICES'])")
    cluster.apply([pod("gpu", namespace, echo_image, *show, resources={"limits": {"nvidia.com/gpu": "1"}})])
    given = said(cluster, namespace, "gpu").strip()
    node = cluster.get("pod", "gpu", "-n", namespace)["spec"]["nodeName"]
    assert given in gpu_ids(node, cluster.nodes[node].node.gpus)


@pytest.mark.gpu
def test_a_container_sees_the_driver_and_the_gpus_that_its_node_has(cluster, namespace, echo_image):
    assert cluster.nodes["node1"].driver, why_no_stubs()
    look = """
import ctypes
nvml, count, name = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_uint(), ctypes.create_string_buffer(96)
assert nvml.nvmlInitWithFlags(0) == 0 and nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
device = ctypes.c_void_p()
assert nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 0
assert nvml.nvmlDeviceGetUUID(device, name, 96) == 0
print(count.value, name.value.decode())
"""
    looking = pod("looking", namespace, echo_image, "python3", "-c", look, nodeName="node1")
    looking["spec"]["containers"][0]["env"] = [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]
    cluster.apply([looking])
    assert said(cluster, namespace, "looking").split() == ["2", gpu_ids("node1", 2)[0]]


def test_a_gpu_out_of_order_is_no_longer_offered(cluster):
    node = cluster.nodes["node2"]
    node.break_gpus(*gpu_ids("node2", 1))
    try:
        offered = "--for=jsonpath={.status.allocatable.nvidia\\.com/gpu}=0"
        cluster.kubectl("wait", "node/node2", offered, f"--timeout={WAIT_S}s")
    finally:
        node.break_gpus()
        cluster.kubectl("wait", "node/node2", offered[:-1] + "1", f"--timeout={WAIT_S}s")


def test_more_gpus_than_a_node_has_stay_pending(cluster, namespace, echo_image):
    cluster.apply([pod("huge", namespace, echo_image, resources={"limits": {"nvidia.com/gpu": "3"}})])
    unscheduled = '--for=jsonpath={.status.conditions[?(@.type=="PodScheduled")].reason}=Unschedulable'
    cluster.kubectl("wait", "pod/huge", "-n", namespace, unscheduled, f"--timeout={WAIT_S}s")


def test_a_service_has_a_name_and_answers_across_nodes(cluster, namespace, echo_image):
    server = pod("server", namespace, echo_image, nodeName="node1")
    server["metadata"]["labels"] = {"app": "server"}
    server["spec"]["containers"][0]["env"] = [{"name": "PORT", "value": "8080"}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "server", "namespace": namespace},
        "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    ask = f"""
import time, urllib.request
for _ in range(300):
    try:
        print(urllib.request.urlopen("http://server.{namespace}.svc.cluster.local", b"hello").read().decode())
        break
    except OSError:
        time.sleep(0.2)
"""
    cluster.apply([server, service, pod("client", namespace, echo_image, "python3", "-c", ask, nodeName="node2")])
    assert said(cluster, namespace, "client").strip() == "hello"


def test_a_pods_token_is_good_for_the_audience_it_was_made_for(cluster, namespace, echo_image):
    ask = """
import json, ssl, urllib.request
folder = "/var/run/secrets/kubernetes.io/serviceaccount"
context = ssl.create_default_context(cafile=f"{folder}/ca.crt")
headers = {"Authorization": "Bearer " + open(f"{folder}/token").read()}
who = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
request = urllib.request.Request(
    "https://kubernetes.default.svc/apis/authentication.k8s.io/v1/selfsubjectreviews",
    json.dumps(who).encode(), {**headers, "Content-Type": "application/json"},
)
print(json.load(urllib.request.urlopen(request, context=context))["status"]["userInfo"]["username"])
print(open("/var/run/ours/token").read())
"""
    ours = {"sources": [{"serviceAccountToken": {"audience": "gpufn-ledger", "path": "token"}}]}
    asking = pod("asking", namespace, echo_image, "python3", "-c", ask, volumes=[{"name": "ours", "projected": ours}])
    asking["spec"]["containers"][0]["volumeMounts"] = [{"name": "ours", "mountPath": "/var/run/ours"}]
    cluster.apply([asking])
    user, token = said(cluster, namespace, "asking").split()
    assert user == f"system:serviceaccount:{namespace}:default"

    def review(audience: str) -> dict[str, Any]:
        question = {"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1"}
        question["spec"] = {"token": token, "audiences": [audience]}
        with cluster.session() as session:
            answer = session.post(f"{cluster.site.server}/apis/authentication.k8s.io/v1/tokenreviews", json=question)
            return answer.json()["status"]

    assert review("gpufn-ledger")["user"]["username"] == user
    assert not review("somebody-else").get("authenticated")


def test_a_function_goes_to_zero_and_the_next_request_wakes_it(cluster, namespace, echo_image):
    cluster.apply([ksvc("echo", namespace, echo_image, window="6s")])
    cluster.kubectl("wait", "ksvc/echo", "-n", namespace, "--for=condition=Ready", f"--timeout={WAIT_S}s")
    host = f"echo.{namespace}.functions.test"
    assert call(cluster, host, b"first").content == b"first"

    def pods() -> list[Any]:
        return cluster.get("pods", "-n", namespace, "-l", "serving.knative.dev/service=echo")["items"]

    wait_until("end of the last pod", lambda: not pods(), WAIT_S)
    assert call(cluster, host, b"again").content == b"again"
    assert len(pods()) == 1


def test_a_host_that_is_nobodys_is_not_found(cluster):
    assert call(cluster, "nobody.nowhere.functions.test", b"").status_code == 404


def test_hundreds_of_nodes_can_be_pretended(control_plane):
    labels = {"testbed": "pretended", "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    control_plane.add_kwok_nodes(300, gpus=8, labels=labels)
    wants = pod("wants", "default", "whatever", resources={"limits": {"nvidia.com/gpu": "8"}})
    wants["spec"]["nodeSelector"] = {"testbed": "pretended"}
    control_plane.apply([wants])
    control_plane.kubectl("wait", "pod/wants", "--for=condition=Ready", f"--timeout={WAIT_S}s")


def test_an_api_server_that_was_killed_comes_back(control_plane):
    server = control_plane.components["kube-apiserver"]
    control_plane.kubectl("create", "configmap", "kept")
    server.kill()
    assert not control_plane.is_ready()
    server.start()
    wait_until("API server", control_plane.is_ready, WAIT_S, [server])
    control_plane.kubectl("get", "configmap", "kept")


def test_an_api_server_that_hangs_goes_on(control_plane):
    server = control_plane.components["kube-apiserver"]
    server.send(signal.SIGSTOP)
    assert not control_plane.is_ready()
    server.send(signal.SIGCONT)
    wait_until("API server", control_plane.is_ready, WAIT_S, [server])


MAKER = """
import sys
from tests.testbed.cluster import Cluster
from tests.testbed.nodes import Node
cluster = Cluster([Node("node1")]).start()
print(cluster.addresses.number, flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_of_a_cluster_whose_maker_was_killed():
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **PYTHON},
    )
    assert maker.stdin is not None
    assert maker.stdout is not None
    with maker, maker.stdin, maker.stdout:
        number = maker.stdout.readline().strip()
        assert number, "no cluster"
        folder, group = SLOTS / number, f"{CGROUP}/{number}"
        places = [folder, *CGROUPS.glob(group), *CGROUPS.glob(f"*/{group}")]
        assert len(places) > 1
        left = {place: _identity(place) for place in places}
        programs = _processes(str(folder))
        assert len(programs) > 5
        maker.send_signal(signal.SIGKILL)
    wait_until("end of its processes", lambda: not programs & _processes(str(folder)), WAIT_S)
    Slot.take().release()  # the next cluster's start cleans up
    assert [place for place in places if _identity(place) == left[place]] == []


def _identity(path: Path) -> tuple[int, int]:
    """The next cluster may have the same number, and so the same paths."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, status.st_ctime_ns


def _processes(folder: str) -> set[tuple[str, str]]:
    """Id and start of those whose command has files there."""
    commands = {path.parent: _read(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
    having = [process for process, command in commands.items() if f"{folder}/".encode() in command]
    states = [(process.name, _read(process / "stat").decode().rpartition(")")[2].split()) for process in having]
    return {(number, state[19]) for number, state in states if state}  # without one it has ended meanwhile


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""
