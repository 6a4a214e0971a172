"""What is sent for a replica."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapter.errors import ConfigError
from adapter.hosts import Deployment, Terms
from adapter.hosts.kubernetes_pods import (
    Owner,
    annotations_of,
    check_terms,
    drain_s,
    new_identity,
    node_selector,
    pod_of,
    service_of,
)
from adapter.spec import parse_spec

OWNER = Owner("function-fn", "uid-1")


def deployment(config=None, *, annotations=None, env=(), names=(), image="fn:1", **terms) -> Deployment:
    spec = parse_spec(config or {}, annotations or {})
    return Deployment("fn", "ns", "3", image, spec, tuple(env), tuple(names), Terms(**terms))


def made(wanted: Deployment, **options):
    pod = pod_of(wanted, "fn-1", OWNER, **options)
    return pod, pod["spec"]["containers"][0]


def env_of(container) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container["env"]}


# A pod -------------------------------------------------------------------------------------------


def test_a_pod_belongs_to_its_record_and_is_found_by_function_and_revision():
    pod, container = made(deployment(labels=(("team", "ml"), ("faas_function", "other"))))
    assert pod["metadata"]["labels"] == {
        "team": "ml",
        "faas_function": "fn",
        "app.kubernetes.io/managed-by": "gpufn",
        "gpufn.dev/revision": "3",
    }
    (owner,) = pod["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("ConfigMap", "uid-1", True)
    assert container["name"] == "fn"


def test_a_pod_has_no_token_no_rights_and_no_other_services_addresses():
    pod, container = made(deployment())
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["enableServiceLinks"] is False
    assert container["securityContext"] == {
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": False,
        "allowPrivilegeEscalation": False,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def test_where_snapshots_are_kept_the_profile_is_the_webhooks_to_give():
    _, container = made(deployment(), snapshots=True)
    assert not {"seccompProfile", "allowPrivilegeEscalation"} & container["securityContext"].keys()
    _, container = made(deployment(annotations={"gpufn.dev/snapshot": "off"}), snapshots=True)
    assert container["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize(
    ("user", "says"), [("1000", True), ("1000:1000", True), ("0", False), ("app", False), ("", False), ("0:0", False)]
)
def test_an_image_that_is_plainly_not_root_must_stay_so(user, says):
    _, container = made(deployment(user=user))
    assert container["securityContext"].get("runAsNonRoot", False) is says


def test_secrets_are_files_and_those_for_pulling_are_not():
    pod, container = made(deployment(names=("token", "registry")), pull_secrets={"registry"})
    assert pod["spec"]["volumes"][0]["projected"]["sources"] == [{"secret": {"name": "token"}}]
    assert container["volumeMounts"][0]["mountPath"] == "/var/openfaas/secrets"
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]


def test_a_read_only_root_leaves_a_place_to_write():
    pod, container = made(deployment(read_only_root=True))
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["spec"]["volumes"] == [{"name": "tmp", "emptyDir": {}}]
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]


def test_whole_gpus_are_a_limit_and_shares_are_left_to_the_webhook():
    _, container = made(deployment({"gpu": {"count": 2}}, limits=(("memory", "1Gi"),), requests=(("cpu", "100m"),)))
    assert container["resources"] == {"limits": {"memory": "1Gi", "nvidia.com/gpu": "2"}, "requests": {"cpu": "100m"}}
    pod, container = made(deployment({"gpu": {"count": 0.5}}))
    assert container["resources"] == {}
    assert pod["metadata"]["annotations"]["gpufn.dev/gpu"] == "0.5"
    _, container = made(deployment({"gpu": {"mig": "1g.5gb"}}))
    assert container["resources"] == {}


def test_a_gpu_that_was_asked_for_by_its_resource_stays_that_one():
    wanted = deployment(annotations={"gpufn.dev/gpu": "1"}, requests=(("amd.com/gpu", "1"),))
    _, container = made(wanted)
    assert container["resources"] == {"limits": {"amd.com/gpu": "1"}}


def test_a_function_without_a_gpu_sees_none_whatever_its_image_asks_for():
    env = env_of(made(deployment())[1])
    assert (env["CUDA_VISIBLE_DEVICES"], env["NVIDIA_VISIBLE_DEVICES"], env["GPUFN_DEVICE"]) == ("", "void", "cpu")
    env = env_of(made(deployment({"gpu": {"count": 1}}))[1])
    assert not {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "GPUFN_DEVICE"} & env.keys()


def test_a_replica_is_told_who_it_is_and_nothing_about_snapshots():
    env = env_of(made(deployment(env=(("GREETING", "hi"), ("exec_timeout", "7"))))[1])
    told = {"GPUFN_FUNCTION": "fn", "GPUFN_NAMESPACE": "ns", "GPUFN_REVISION": "3", "GPUFN_REPLICA": "fn-1"}
    assert told.items() <= env.items()
    assert (env["GREETING"], env["exec_timeout"], env["PORT"]) == ("hi", "7", "8080")
    assert not {"GPUFN_SNAPSHOT_DIR", "GPUFN_SNAPSHOT_BY", "GPUFN_TENANT", "GPUFN_FOLDER"} & env.keys()


def test_a_path_of_the_users_goes_before_the_images():
    env = env_of(made(deployment(env=(("PYTHONPATH", "/own"),), python_path="/opt/shim"))[1])
    assert env["PYTHONPATH"] == "/own:/opt/shim"


def test_what_of_watchdog_starts_is_passed_on():
    assert env_of(made(deployment(command="python index.py"))[1])["fprocess"] == "python index.py"


@pytest.mark.parametrize(("holds", "path"), [(True, "/_/ready"), (False, "/_/health")])
def test_a_probe_asks_what_the_image_answers(holds, path):
    assert made(deployment(holds_requests=holds))[1]["readinessProbe"]["httpGet"]["path"] == path


def test_kubernetes_waits_longer_than_a_drain():
    wanted = deployment(env=(("write_timeout", "100"), ("healthcheck_interval", "5")))
    assert made(wanted)[0]["spec"]["terminationGracePeriodSeconds"] == drain_s(wanted) == 115


def test_annotations_of_ours_are_the_specs_and_others_are_the_users():
    said = (("team", "x"), ("gpufn.dev/idle", "10m"), ("prometheus.io.scrape", "true"))
    wanted = deployment({"gpu": {"count": 1, "memory": "16Gi"}}, annotations=dict(said))
    annotations = made(replace(wanted, terms=Terms(annotations=said)))[0]["metadata"]["annotations"]
    assert (annotations["team"], annotations["prometheus.io.scrape"]) == ("x", "true")
    assert (annotations["gpufn.dev/memory"], annotations["gpufn.dev/idle"]) == (str(16 * 2**30), "600")


def test_names_of_pods_fit_and_differ():
    names = {new_identity("f" * 63) for _ in range(50)}
    assert len(names) == 50
    assert all(len(name) == 63 for name in names)
    assert new_identity("fn").startswith("fn-")


def test_a_service_leads_to_all_revisions_of_a_function():
    service = service_of(deployment(), OWNER)
    assert service["spec"]["selector"] == {"faas_function": "fn", "app.kubernetes.io/managed-by": "gpufn"}
    assert service["metadata"]["ownerReferences"][0]["uid"] == "uid-1"


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "selector"),
    [
        ("gpu=true", {"gpu": "true"}),
        ("node.labels.disk == ssd", {"disk": "ssd"}),
        ("kubernetes.io/arch=arm64", {"kubernetes.io/arch": "arm64"}),
        ("gpufn.dev/models=a100", {}),
    ],
)
def test_constraints_select_nodes_by_label_unless_they_are_keys_of_ours(constraint, selector):
    assert node_selector(deployment(constraints=(constraint,))) == selector


@pytest.mark.parametrize("constraint", ["gpu", "gpu!=true", "a b=c", "x=y z", "-=x", ""])
def test_other_constraints_are_refused_by_their_own_words(constraint):
    with pytest.raises(ConfigError, match="The constraint"):
        check_terms(deployment(constraints=(constraint,)))


@pytest.mark.parametrize("label", [("a", "no spaces"), ("a", "x" * 64), ("a/b/c", "d"), ("", "x")])
def test_labels_that_no_pod_can_have_are_refused(label):
    with pytest.raises(ConfigError, match="The label"):
        check_terms(deployment(labels=(label,)))


def test_a_spec_survives_being_written_as_annotations():
    config = {
        "gpu": {"count": 2, "models": ["a100", "h100"], "compute": 8.0, "spot": "avoid"},
        "scale": {"idle": "auto", "in_flight": 3},
    }
    spec = parse_spec(config, {"gpufn.dev/cold-price": "2.5", "gpufn.dev/budget": "36h"})
    assert parse_spec({}, annotations_of(spec)) == spec
