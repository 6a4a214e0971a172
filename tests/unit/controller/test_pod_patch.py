"""What the pod webhook changes, case by case; tests/property says what holds for any pod."""

import copy
import json
from dataclasses import replace

import jsonpatch
import pytest

from adapter.cluster.intent import read_intent
from adapter.controller.pod_patch import Facts, patch_pod
from adapter.policy.node_terms import Requirement
from adapter.policy.placement import Verdict
from adapter.replica import ReplicaSettings

FACTS = Facts(now_ns=1_700_000_000_000_000_000, runtime_classes=frozenset({"nvidia"}), restores=True)
FITS = (Verdict("gpu-a", resource="nvidia.com/gpu", units=1, wake_s=0.4, score=90.0),)


def knative_pod(**annotations):
    """As Knative's controller makes it."""
    return {
        "metadata": {
            "generateName": "embed-00001-deployment-5d8c7-",
            "labels": {"serving.knative.dev/service": "embed", "serving.knative.dev/revision": "embed-00001"},
            "annotations": {f"gpufn.dev/{name.replace('_', '-')}": text for name, text in annotations.items()},
        },
        "spec": {
            "containers": [
                {
                    "name": "user-container",
                    "image": "registry.example/embed@sha256:00",
                    "ports": [{"name": "user-port", "containerPort": 8080}],
                    "env": [{"name": "PORT", "value": "8080"}, {"name": "K_SERVICE", "value": "embed"}],
                    "resources": {},
                },
                {
                    "name": "queue-proxy",
                    "image": "registry.example/queue",
                    "env": [{"name": "CONTAINER_CONCURRENCY", "value": "0"}],
                    "readinessProbe": {"httpGet": {"port": 8012}},
                },
            ]
        },
    }


LABELS = {
    "knative": {"serving.knative.dev/service": "embed", "serving.knative.dev/revision": "embed-00001"},
    "openfaas": {"faas_function": "embed"},
    "plain": {"gpufn.dev/function": "embed"},
}


def intent_of(pod, framework="knative", snapshots=False):
    pod = copy.deepcopy(pod)
    for name in LABELS["knative"]:
        del pod["metadata"]["labels"][name]
    pod["metadata"]["labels"] |= LABELS[framework]
    pod["metadata"]["annotations"].setdefault("gpufn.dev/park", "0")  # something of ours
    opts_in = {"gpufn.dev/tenant": "acme", **({"gpufn.dev/snapshots": "enabled"} if snapshots else {})}
    intent = read_intent(pod, namespace="team", namespace_labels=opts_in)
    assert intent is not None
    return intent


def patched(pod, intent=None, verdicts=FITS, facts=FACTS):
    """The pod as it comes out, by another program's JSON Patch."""
    answer = patch_pod(pod, intent or intent_of(pod), verdicts, facts)
    return jsonpatch.apply_patch(pod, list(answer.operations))


def variables(pod):
    return {item["name"]: item["value"] for item in pod["spec"]["containers"][0]["env"]}


def soft_terms(pod):
    terms = pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    return [(term["weight"], term["preference"]["matchExpressions"][0]["values"]) for term in terms]


def hard_terms(pod):
    affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
    return affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])


# A GPU ------------------------------------------------------------------------------------------


def test_a_gpu_asked_for_by_annotation_becomes_limit_and_request():
    container = patched(knative_pod(gpu="1"))["spec"]["containers"][0]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "1"}, "requests": {"nvidia.com/gpu": "1"}}


def test_the_resource_is_what_the_best_node_has():
    verdicts = (
        Verdict("whole", resource="nvidia.com/gpu.shared", units=4, score=80.0),
        Verdict("cut", resource="nvidia.com/gpu", units=1, score=10.0),
    )
    assert patched(knative_pod(gpu="1"), verdicts=verdicts)["spec"]["containers"][0]["resources"]["limits"] == {
        "nvidia.com/gpu.shared": "4"
    }


def test_nodes_with_another_resource_are_not_preferred():
    verdicts = (
        Verdict("whole", resource="nvidia.com/gpu", units=1, score=80.0),
        Verdict("cut", resource="nvidia.com/mig-1g.5gb", units=1, score=70.0),
    )
    assert soft_terms(patched(knative_pod(gpu="1"), verdicts=verdicts)) == [(100, ["whole"])]


def test_a_limit_of_the_users_is_left_alone():
    pod = knative_pod()
    pod["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": "2"}}
    after = patched(pod, intent_of(pod))
    assert after["spec"]["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": "2"}}


def test_a_mig_profile_that_no_node_has_is_asked_for_as_its_device_plugin_names_it():
    pod = knative_pod(mig="1g.10gb+me")
    assert "nvidia.com/mig-1g.10gb.me" in patched(pod, verdicts=())["spec"]["containers"][0]["resources"]["limits"]


def test_the_runtime_class_is_set_where_the_cluster_has_it():
    assert patched(knative_pod(gpu="1"))["spec"]["runtimeClassName"] == "nvidia"
    assert (
        "runtimeClassName"
        not in patched(knative_pod(gpu="1"), facts=replace(FACTS, runtime_classes=frozenset()))["spec"]
    )


def test_a_runtime_class_of_the_users_stays():
    pod = knative_pod(gpu="1")
    pod["spec"]["runtimeClassName"] = "kata"
    assert patched(pod)["spec"]["runtimeClassName"] == "kata"


def test_a_function_without_gpu_sees_none_and_tolerates_no_gpu_taint():
    spec = patched(knative_pod(idle="1m"), verdicts=(Verdict("cpu", score=1.0),))["spec"]
    assert variables({"spec": spec})["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"tolerations", "runtimeClassName"} & spec.keys()


@pytest.mark.parametrize("there", [{"operator": "Exists"}, {"key": "nvidia.com/gpu", "operator": "Exists"}])
def test_a_toleration_that_is_there_is_not_added_again(there):
    pod = knative_pod(gpu="1")
    pod["spec"]["tolerations"] = [there]
    assert patched(pod)["spec"]["tolerations"] == [there]


def test_the_taint_of_gpu_nodes_is_tolerated_whatever_its_value():
    assert patched(knative_pod(gpu="1"))["spec"]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]


# Nodes ------------------------------------------------------------------------------------------


def test_each_rank_of_nodes_weighs_half_of_the_one_before():
    verdicts = [replace(FITS[0], node=name, cost_gpu_s=cost) for name, cost in (("a", 1), ("b", 1), ("c", 60))]
    assert soft_terms(patched(knative_pod(gpu="1"), verdicts=verdicts)) == [(100, ["a", "b"]), (50, ["c"])]


def test_without_gpu_and_snapshot_the_scheduler_chooses():
    verdicts = [Verdict(f"n{n}", cost_gpu_s=200.0) for n in range(9)]
    assert "affinity" not in patched(knative_pod(idle="1m"), verdicts=verdicts)["spec"]


def test_nodes_are_named_by_their_hostname_label():
    facts = replace(FACTS, hostnames={"gpu-a": "ip-10-0-0-1"})
    assert soft_terms(patched(knative_pod(gpu="1"), facts=facts)) == [(100, ["ip-10-0-0-1"])]


def test_where_no_node_fits_only_what_autoscalers_know_is_required_and_the_reason_is_kept():
    facts = replace(FACTS, hard=((Requirement("cloud.google.com/gke-accelerator", "In", ("nvidia-l4",)),),))
    refused = [Verdict(f"n{n}", "gpu-model", "It has T4, not L4.") for n in range(30)]
    after = patched(knative_pod(gpu="1", models="L4"), verdicts=refused, facts=facts)
    assert after["spec"]["affinity"] == {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {
                        "matchExpressions": [
                            {"key": "cloud.google.com/gke-accelerator", "operator": "In", "values": ["nvidia-l4"]}
                        ]
                    }
                ]
            }
        }
    }
    note = json.loads(after["metadata"]["annotations"]["gpufn.dev/placement"])
    assert "None of 30 nodes fits; 30: another GPU model" in note["why"]
    assert note["refused"] == [
        {"code": "gpu-model", "reason": "It has T4, not L4.", "count": 30, "nodes": [f"n{n}" for n in range(5)]}
    ]


def test_our_alternatives_hold_within_each_of_the_users():
    mine = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [z]}]} for z in "ab"]
    pod = knative_pod(gpu="1")
    pod["spec"]["affinity"] = {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": copy.deepcopy(mine)}}
    }
    one, other = Requirement("gke", "In", ("l4",)), Requirement("karpenter", "In", ("l4",))
    terms = hard_terms(patched(pod, facts=replace(FACTS, hard=((one,), (other,)))))
    said = {tuple((e["key"], *e["values"]) for e in term["matchExpressions"]) for term in terms}
    assert said == {(("zone", z), (key, "l4")) for z in "ab" for key in ("gke", "karpenter")}


def test_spot_machines_are_required_by_any_name_that_autoscalers_have_for_them():
    terms = hard_terms(patched(knative_pod(gpu="1", spot="require")))
    assert [{"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot", "SPOT"]}] in [
        term["matchExpressions"] for term in terms
    ]
    assert all(len(term["matchExpressions"]) == 1 for term in terms)


def test_a_pod_that_is_never_to_be_on_spot_machines_is_kept_off_whatever_they_are_called():
    (term,) = hard_terms(patched(knative_pod(gpu="1", spot="never")))
    assert {item["operator"] for item in term["matchExpressions"]} == {"NotIn"}
    assert len(term["matchExpressions"]) > 4


@pytest.mark.parametrize("spot", ["any", "prefer", "avoid"])
def test_what_only_weighs_is_not_required(spot):
    assert hard_terms(patched(knative_pod(gpu="1", spot=spot))) == []


def test_a_term_of_the_users_that_matches_nothing_still_matches_nothing():
    pod = knative_pod(gpu="1")
    pod["spec"]["affinity"] = {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{}]}}
    }
    assert hard_terms(patched(pod, facts=replace(FACTS, hard=((Requirement("gke", "In", ("l4",)),),)))) == [{}]


@pytest.mark.parametrize(
    "foreign",
    [
        {"spec": {"schedulerName": "volcano"}},
        {"metadata": {"annotations": {"gpu-fraction": "0.5"}}},
        {"metadata": {"labels": {"kai.scheduler/queue": "a"}}},
    ],
)
def test_a_pod_of_another_scheduler_gets_soft_hints_only(foreign):
    pod = knative_pod(gpu="1")
    pod["spec"].update(foreign.get("spec", {}))
    for kind, entries in foreign.get("metadata", {}).items():
        pod["metadata"][kind].update(entries)
    facts = replace(FACTS, hard=((Requirement("gke", "In", ("l4",)),),))
    answer = patch_pod(pod, intent_of(pod), FITS, facts)
    after = jsonpatch.apply_patch(pod, list(answer.operations))
    assert hard_terms(after) == []
    assert soft_terms(after) == [(100, ["gpu-a"])]
    assert after["spec"]["containers"][0]["resources"] == {}
    assert "runtimeClassName" not in after["spec"]
    assert any("another scheduler" in warning for warning in answer.warnings)


# Snapshots --------------------------------------------------------------------------------------


def test_without_the_namespaces_leave_there_is_no_volume_and_no_right():
    after = patched(knative_pod(gpu="1"))
    assert "volumes" not in after["spec"]
    assert "securityContext" not in after["spec"]["containers"][0]
    assert not {"GPUFN_SNAPSHOT_DIR", "GPUFN_CRIU"} & variables(after).keys()


@pytest.mark.parametrize(
    ("annotations", "resource"),
    [
        ({"gpu": "0.5"}, "nvidia.com/gpu"),
        ({"mig": "1g.5gb"}, "nvidia.com/mig-1g.5gb"),
        ({"gpu": "1"}, "nvidia.com/gpu.shared"),
        ({"gpu": "1", "models": "mi300x"}, "amd.com/gpu"),
    ],
)
def test_where_no_driver_could_checkpoint_it_a_function_gets_no_right_for_nothing(annotations, resource):
    pod, verdicts = knative_pod(**annotations), (replace(FITS[0], resource=resource),)
    answer = patch_pod(pod, intent_of(pod, snapshots=True), verdicts, FACTS)
    after = jsonpatch.apply_patch(pod, list(answer.operations))
    assert "volumes" not in after["spec"]
    assert "securityContext" not in after["spec"]["containers"][0]
    assert "GPUFN_SNAPSHOT_BY" not in variables(after)
    assert [w for w in answer.warnings if w.startswith("process snapshots are not used")]
    assert patch_pod(after, intent_of(after, snapshots=True), (), FACTS).operations == ()


@pytest.mark.parametrize("annotations", [{"idle": "1m"}, {"gpu": "1"}])
def test_a_function_sees_its_own_snapshots_alone_and_has_the_one_right(annotations):
    pod = knative_pod(**annotations)
    after = patched(pod, intent_of(pod, snapshots=True))
    place = "/var/lib/gpufn/snapshots/acme/embed.team"
    assert after["spec"]["volumes"] == [
        {"name": "gpufn-snapshots", "hostPath": {"path": place, "type": "DirectoryOrCreate"}},
        {"name": "gpufn-criu", "hostPath": {"path": "/var/lib/gpufn/criu", "type": "DirectoryOrCreate"}},
    ]
    container = after["spec"]["containers"][0]
    assert container["volumeMounts"] == [
        {"name": "gpufn-snapshots", "mountPath": place},
        {"name": "gpufn-criu", "mountPath": "/opt/gpufn/lent-criu", "readOnly": True},
    ]
    assert container["securityContext"] == {
        "capabilities": {"add": ["CHECKPOINT_RESTORE"], "drop": ["ALL"]},
        "seccompProfile": {"type": "Localhost", "localhostProfile": "gpufn.json"},
    }
    assert {"GPUFN_SNAPSHOT_BY": "host", "GPUFN_CRIU": "/opt/gpufn/lent-criu/criu"}.items() <= variables(after).items()


def test_capabilities_of_the_users_stay_and_the_right_is_added():
    pod = knative_pod()
    pod["spec"]["containers"][0]["securityContext"] = {"capabilities": {"drop": ["NET_RAW"]}}
    after = patched(pod, intent_of(pod, snapshots=True))
    assert after["spec"]["containers"][0]["securityContext"]["capabilities"] == {
        "drop": ["NET_RAW"],
        "add": ["CHECKPOINT_RESTORE"],
    }


@pytest.mark.parametrize(
    ("rights", "said"),
    [
        ({"seccompProfile": {"type": "RuntimeDefault"}}, "seccomp profile of its own"),
        ({"allowPrivilegeEscalation": False}, "allowPrivilegeEscalation"),
        ({"privileged": True}, "privileged"),
    ],
)
def test_rights_under_which_no_restore_works_stay_and_are_named(rights, said):
    pod = knative_pod()
    pod["spec"]["containers"][0]["securityContext"] = rights
    answer = patch_pod(pod, intent_of(pod, snapshots=True), FITS, FACTS)
    after = jsonpatch.apply_patch(pod, list(answer.operations))
    assert after["spec"]["containers"][0]["securityContext"] == rights
    assert "volumes" not in after["spec"]
    assert any(said in warning for warning in answer.warnings)


def test_root_needs_no_file_with_the_right():
    pod = knative_pod()
    pod["spec"]["containers"][0]["securityContext"] = {"allowPrivilegeEscalation": False, "runAsUser": 0}
    assert "volumes" in patched(pod, intent_of(pod, snapshots=True))["spec"]


def test_where_no_agent_can_restore_a_pod_depends_on_nothing_of_a_node():
    pod = knative_pod()
    assert "volumes" not in patched(pod, intent_of(pod, snapshots=True), facts=replace(FACTS, restores=False))["spec"]


# What the shim is told --------------------------------------------------------------------------


def settings(pod):
    return ReplicaSettings.from_env(variables(pod))


def test_the_shim_reads_back_who_it_is_and_what_was_asked():
    said = settings(patched(knative_pod(gpu="1", in_flight="3", exec_timeout="90s", queue="7")))
    assert (said.function, said.namespace, said.tenant) == ("embed", "team", "acme")
    assert (said.in_flight, said.exec_timeout_s, said.write_timeout_s, said.queue) == (3, 90.0, 90.0, 7)


def test_what_was_not_asked_is_left_to_the_image():
    assert not {"exec_timeout", "GPUFN_QUEUE", "GPUFN_START_TIMEOUT"} & variables(patched(knative_pod(gpu="1"))).keys()


def test_on_a_gpu_one_request_is_handled_at_once_or_as_many_as_knative_sends():
    assert settings(patched(knative_pod(gpu="1"))).in_flight == 1
    pod = knative_pod(gpu="1")
    pod["spec"]["containers"][1]["env"][0]["value"] = "4"
    assert settings(patched(pod)).in_flight == 4


@pytest.mark.parametrize("name", ["GPUFN_IN_FLIGHT", "max_inflight"])
def test_a_variable_of_the_users_wins_under_any_name(name):
    pod = knative_pod(gpu="1", in_flight="3")
    pod["spec"]["containers"][0]["env"].append({"name": name, "value": "6"})
    assert settings(patched(pod)).in_flight == 6


def test_sidecars_are_not_touched():
    pod = knative_pod(gpu="1")
    assert patched(pod, intent_of(pod, snapshots=True))["spec"]["containers"][1] == pod["spec"]["containers"][1]


# Readiness --------------------------------------------------------------------------------------


def test_knative_asks_by_itself():
    assert "readinessProbe" not in patched(knative_pod(gpu="1"))["spec"]["containers"][0]


def test_an_openfaas_function_is_ready_when_its_model_is():
    pod = knative_pod()
    probe = patched(pod, intent_of(pod, "openfaas"))["spec"]["containers"][0]["readinessProbe"]
    assert probe["httpGet"] == {"path": "/_/ready", "port": 8080}


def test_a_bare_pod_is_asked_for_nothing_but_its_port():
    pod = knative_pod()
    probe = patched(pod, intent_of(pod, "plain"))["spec"]["containers"][0]["readinessProbe"]
    assert probe["tcpSocket"] == {"port": 8080}
    del pod["spec"]["containers"][0]["ports"]
    assert "readinessProbe" not in patched(pod, intent_of(pod, "plain"))["spec"]["containers"][0]


def test_a_probe_of_the_users_stays():
    pod = knative_pod()
    pod["spec"]["containers"][0]["readinessProbe"] = {"exec": {"command": ["true"]}}
    after = patched(pod, intent_of(pod, "openfaas"))["spec"]["containers"][0]
    assert after["readinessProbe"] == {"exec": {"command": ["true"]}}


# Once -------------------------------------------------------------------------------------------


def test_asked_again_nothing_is_changed_whatever_the_nodes_are_now():
    pod = knative_pod(gpu="1")
    after = patched(pod)
    again = patch_pod(after, intent_of(after), (), replace(FACTS, now_ns=1))
    assert again.operations == ()


def test_a_pod_made_from_a_copy_of_another_functions_is_patched_anew():
    after = patched(knative_pod(gpu="1"))
    after["metadata"]["annotations"]["gpufn.dev/in-flight"] = "5"
    assert patch_pod(after, intent_of(after), FITS, FACTS).operations


def test_a_pod_says_when_it_was_admitted_and_why_it_went_where():
    annotations = patched(knative_pod(gpu="1"))["metadata"]["annotations"]
    assert annotations["gpufn.dev/admitted-at"] == "1700000000000000000"
    assert json.loads(annotations["gpufn.dev/placement"]) == {
        "resource": "nvidia.com/gpu",
        "units": 1,
        "prefer": [["gpu-a", 90.0, 0.4]],
    }
