"""The pod that takes snapshots: what it has of the function's pod, and what it must not have."""

import copy
from dataclasses import replace

import pytest

from adapter.cluster.intent import Intent
from adapter.controller.snapshot_pod import has_gpu, name_of, network_policy, node_of, snapshot_pod
from adapter.policy.placement import Need
from adapter.spec import parse_spec

INTENT = Intent(
    function="embed",
    namespace="team-a",
    revision="embed-00001",
    framework="knative",
    tenant="team-a",
    container=1,
    spec=parse_spec({}, {}),
    need=Need("embed.team-a", snapshot="team-a/embed.team-a"),
    snapshots=True,
)
POD = {
    "metadata": {
        "name": "embed-1",
        "labels": {"serving.knative.dev/revision": "embed-00001"},
        "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "embed", "uid": "u", "controller": True}
        ],
    },
    "spec": {
        "priorityClassName": "important",
        "runtimeClassName": "nvidia",
        "serviceAccountName": "embed",
        "securityContext": {"runAsUser": 1000, "fsGroup": 7, "sysctls": [{"name": "a", "value": "b"}]},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "pull"}],
        "volumes": [
            {"name": "token", "projected": {"sources": []}},
            {"name": "secret", "secret": {"secretName": "key"}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "gpufn-snapshots", "hostPath": {"path": "/var/lib/gpufn/snapshots/team-a/embed.team-a"}},
            {"name": "gpufn-criu", "hostPath": {"path": "/var/lib/gpufn/criu"}},
            {"name": "theirs", "hostPath": {"path": "/var/lib/gpufn/snapshots/team-b/chat.team-b"}},
        ],
        "containers": [
            {"name": "queue-proxy", "image": "queue"},
            {
                "name": "user-container",
                "image": "embed@sha256:1",
                "args": ["--x"],
                "env": [
                    {"name": "A", "value": "1"},
                    {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "key", "key": "k"}}},
                    {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                    {"name": "GPUFN_TASK", "value": "something else"},
                ],
                "envFrom": [{"secretRef": {"name": "key"}}, {"configMapRef": {"name": "settings"}}],
                "resources": {
                    "limits": {"cpu": "2", "memory": "1Gi", "nvidia.com/gpu": "2", "example.com/nic": "1"},
                    "requests": {"cpu": "1", "nvidia.com/gpu": "2"},
                    "claims": [{"name": "x"}],
                },
                "volumeMounts": [
                    {"name": name, "mountPath": f"/{name}"}
                    for name in ("token", "secret", "gpufn-snapshots", "gpufn-criu")
                ],
                "securityContext": {"allowPrivilegeEscalation": False, "privileged": True, "runAsGroup": 5},
            },
        ],
    },
}


@pytest.fixture
def made():
    return snapshot_pod(POD, INTENT, "node-1")


def test_it_runs_the_image_as_the_function_does(made):
    (container,) = made["spec"]["containers"]
    assert (container["image"], container["args"]) == ("embed@sha256:1", ["--x"])
    assert made["spec"]["securityContext"] == {"runAsUser": 1000, "fsGroup": 7}
    assert container["securityContext"]["runAsGroup"] == 5
    assert made["spec"]["imagePullSecrets"] == [{"name": "pull"}]


def test_it_has_no_secret_no_token_and_no_foreign_folder(made):
    (container,) = made["spec"]["containers"]
    assert [volume["name"] for volume in made["spec"]["volumes"]] == ["tmp", "gpufn-snapshots", "gpufn-criu"]
    assert container["volumeMounts"] == [
        {"name": "gpufn-snapshots", "mountPath": "/gpufn-snapshots"},
        {"name": "gpufn-criu", "mountPath": "/gpufn-criu", "readOnly": True},
    ]
    assert [item["name"] for item in container["env"]][:2] == ["A", "NODE"]
    assert container["envFrom"] == [{"configMapRef": {"name": "settings"}}]
    assert made["spec"]["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in made["spec"]


def test_its_task_is_ours_to_say(made):
    (container,) = made["spec"]["containers"]
    assert [item["value"] for item in container["env"] if item["name"] == "GPUFN_TASK"] == ["snapshot"]


def test_it_has_the_gpus_of_the_function_and_what_they_run_under(made):
    (container,) = made["spec"]["containers"]
    assert container["resources"] == {
        "limits": {"cpu": "2", "memory": "1Gi", "nvidia.com/gpu": "2"},
        "requests": {"cpu": "1", "nvidia.com/gpu": "2"},
    }
    assert made["spec"]["runtimeClassName"] == "nvidia"
    assert has_gpu(made)


@pytest.mark.parametrize("resources", [{}, {"limits": {"cpu": "2"}}, {"limits": {"nvidia.com/gpu": "0"}}])
def test_without_gpus_it_runs_under_what_the_node_has(resources):
    pod = copy.deepcopy(POD)
    pod["spec"]["containers"][1]["resources"] = resources
    made = snapshot_pod(pod, INTENT, "node-1")
    assert "runtimeClassName" not in made["spec"]
    assert not has_gpu(made)


def test_every_functions_pod_may_have_its_place_at_once(made):
    assert made["spec"]["priorityClassName"] == "gpufn-snapshots"
    assert made["spec"]["terminationGracePeriodSeconds"] <= 5


def test_it_says_whose_time_it_takes(made):
    said = made["metadata"]["annotations"]
    names = ("snapshot-of", "snapshot-of-revision", "price-class")
    assert [said[f"gpufn.dev/{name}"] for name in names] == ["team-a/embed.team-a", "embed-00001", "standard"]


def test_it_goes_with_what_the_replica_goes_with_which_does_not_count_it(made):
    [owner] = made["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "embed", "uid": "u"}


def test_it_has_no_right_but_one(made):
    (container,) = made["spec"]["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHECKPOINT_RESTORE"]}
    assert "privileged" not in container["securityContext"]


def test_no_service_finds_it_and_no_traffic_reaches_it(made):
    labels = made["metadata"]["labels"]
    assert {name for name in labels if not name.startswith("sidecar.istio.io/")} == {"gpufn.dev/task"}
    policy = network_policy("team-a")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert (policy["policyTypes"], "ingress" in policy) == (["Ingress", "Egress"], False)


def test_it_goes_to_the_node_and_ends_by_itself(made):
    affinity = made["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert affinity["nodeSelectorTerms"][0]["matchFields"][0]["values"] == ["node-1"]
    assert made["spec"]["restartPolicy"] == "Never"
    assert node_of(made) == "node-1"
    assert made["spec"]["activeDeadlineSeconds"] > INTENT.spec.start_timeout_s


def test_one_that_hangs_does_not_keep_its_node_for_as_long_as_its_function_might():
    spec = replace(INTENT.spec, start_timeout_s=720 * 3600.0)
    hanging = snapshot_pod(POD, replace(INTENT, spec=spec), "node-1")
    assert 3600 <= hanging["spec"]["activeDeadlineSeconds"] < 2 * 3600


def test_no_mesh_puts_a_container_into_it_that_would_not_end(made):
    assert made["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
    assert made["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"
    assert made["metadata"]["annotations"]["linkerd.io/inject"] == "disabled"


def test_the_same_work_has_the_same_name_and_other_work_another():
    name = name_of(INTENT, "node-1", "image")
    assert name == name_of(INTENT, "node-1", "image")
    others = {
        name_of(INTENT, "node-2", "image"),
        name_of(INTENT, "node-1", "image-2"),
        name_of(replace(INTENT, revision="embed-00002"), "node-1", "image"),
        name_of(replace(INTENT, need=Need("f.b", snapshot="b/f.b")), "node-1", "image"),
    }
    assert len({name, *others}) == 5


def test_the_pod_it_is_made_from_stays_as_it_was():
    before = repr(POD)
    snapshot_pod(POD, INTENT, "node-1")["spec"]["containers"][0]["args"].append("more")
    assert repr(POD) == before
