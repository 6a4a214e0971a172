"""The API server itself applies our patches and takes what comes out, for every framework and every part of them."""

from __future__ import annotations

import asyncio
import itertools

import jsonpatch
import pytest

from adapter.cluster.api import Api, Pace
from adapter.cluster.credentials import Credentials
from adapter.cluster.intent import read_intent
from adapter.cluster.resources import PODS
from adapter.controller.pod_patch import Facts, patch_pod
from adapter.policy.node_terms import Requirement
from adapter.policy.placement import Verdict

ZONE = {"key": "zone", "operator": "In", "values": ["a"]}
USERS = {
    "nothing": {},
    "affinity": {
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [ZONE]},
                        {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node1"]}]},
                    ]
                },
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 3, "preference": {"matchExpressions": [ZONE]}}
                ],
            },
            "podAntiAffinity": {},
        },
        "tolerations": [{"key": "mine", "operator": "Exists"}],
    },
    "rights": {"securityContext": {"runAsUser": 1000, "fsGroup": 1000}},
    "volumes": {"volumes": [{"name": "mine", "emptyDir": {}}]},
    "scheduler": {"schedulerName": "another"},
}
LABELS = {
    "knative": {"serving.knative.dev/service": "f", "serving.knative.dev/revision": "f-00001"},
    "openfaas": {"faas_function": "f"},
    "plain": {"gpufn.dev/function": "f"},
}
ASKED = {
    "gpu": {"gpufn.dev/gpu": "1", "gpufn.dev/in-flight": "3"},
    "mig": {"gpufn.dev/mig": "1g.10gb+me"},
    "spot": {"gpufn.dev/gpu": "1", "gpufn.dev/spot": "require", "gpufn.dev/models": "L4"},
    "cpu": {"gpufn.dev/exec-timeout": "90s"},
}
FITS = [
    Verdict(f"node{n}", resource="nvidia.com/gpu", units=1, wake_s=1.0, score=50.0, cost_gpu_s=float(n // 2))
    for n in range(40)
]
FACTS = Facts(
    now_ns=1_700_000_000_000_000_000,
    hard=tuple(
        (Requirement(key, "In", ("NVIDIA-L4",)),)
        for key in ("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator")
    ),
    restores=True,
)


def pod(namespace, framework, asked, spec):
    container = {"name": "user-container", "image": "dev.local/echo:1", "ports": [{"containerPort": 8080}]}
    if "volumes" in spec:
        container["volumeMounts"] = [{"name": "mine", "mountPath": "/mine"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "f-1", "namespace": namespace, "labels": LABELS[framework], "annotations": dict(asked)},
        "spec": {"containers": [container, {"name": "queue-proxy", "image": "dev.local/echo:1"}], **spec},
    }


async def as_admitted(api, value):
    """As the API server has it when it calls a webhook: with all its defaults."""
    return await api.create(PODS.path(value["metadata"]["namespace"]), value, dry_run=True)


@pytest.mark.parametrize("users", USERS)
def test_the_api_server_takes_the_pod_that_comes_out(cluster, namespace, users):
    async def all_of_them():
        async with Api(Credentials(cluster.kubeconfig), pace=Pace(1000, 1000)) as api:
            for framework, asked, verdicts in itertools.product(LABELS, ASKED.values(), (FITS, ())):
                admitted = await as_admitted(api, pod(namespace, framework, asked, USERS[users]))
                for opted_in in ({}, {"gpufn.dev/snapshots": "enabled"}):
                    intent = read_intent(admitted, namespace=namespace, namespace_labels=opted_in)
                    assert intent is not None
                    patch = patch_pod(admitted, intent, verdicts, FACTS)
                    taken = await as_admitted(api, jsonpatch.apply_patch(admitted, list(patch.operations)))
                    again = read_intent(taken, namespace=namespace, namespace_labels=opted_in)
                    assert again is not None
                    assert patch_pod(taken, again, (), FACTS).operations == ()
                    assert taken["spec"]["containers"][1] == admitted["spec"]["containers"][1]

    asyncio.run(all_of_them())


def test_the_scheduler_takes_the_node_that_is_preferred(cluster, namespace, echo_image):
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    for preferred, other in (("node1", "node2"), ("node2", "node1")):
        value = pod(namespace, "plain", ASKED["gpu"], {"restartPolicy": "Never"})
        value["metadata"]["name"] = f"prefers-{preferred}"
        value["spec"]["containers"] = [{"name": "main", "image": echo_image, "command": ["true"], "resources": gpu}]
        intent = read_intent(value, namespace=namespace, namespace_labels={})
        assert intent is not None
        verdicts = [
            Verdict(preferred, resource="nvidia.com/gpu", units=1, score=100.0),
            Verdict(other, resource="nvidia.com/gpu", units=1, score=10.0, cost_gpu_s=200.0),
        ]
        patch = patch_pod(value, intent, verdicts, Facts(now_ns=1))
        cluster.apply([jsonpatch.apply_patch(value, list(patch.operations))])
        name = value["metadata"]["name"]
        cluster.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=condition=PodScheduled", "--timeout=60s")
        assert cluster.get("pod", name, "-n", namespace)["spec"]["nodeName"] == preferred
