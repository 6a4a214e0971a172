import json

import pytest

from adapter.errors import ConfigError
from adapter.openfaas.wire import STATUS_ANNOTATION, FunctionDeployment
from adapter.spec import parse_spec

FULL = {
    "service": "fn", "image": "me/fn:1", "namespace": "other", "envProcess": "python index.py", "envVars": {"a": "b"},
    "constraints": ["gpu=true"], "secrets": ["token"], "labels": {"l": "1"}, "annotations": {"gpufn.dev/idle": "5m"},
    "limits": {"memory": "1Gi", "nvidia.com/gpu": "2"}, "requests": {"cpu": "100m"}, "readOnlyRootFilesystem": True,
}  # fmt: skip


def parse(**data) -> FunctionDeployment:
    return FunctionDeployment.parse(json.dumps({"service": "fn", "image": "fn", **data}).encode())


def status(deployment, note=""):
    return deployment.status(replicas=1, available=0, invocations=3, created_at="2026-01-01T00:00:00Z", note=note)


def test_what_was_deployed_is_what_is_shown():
    shown = status(parse(**FULL))
    for key, value in FULL.items():
        assert shown["name" if key == "service" else key] == value
    assert (shown["replicas"], shown["availableReplicas"], shown["invocationCount"]) == (1, 0, 3)


def test_our_own_form_keeps_everything():
    deployment = parse(**FULL)
    assert FunctionDeployment.from_json(json.loads(json.dumps(deployment.to_json()))) == deployment


def test_absent_and_null_are_alike():
    keys = ("namespace", "envVars", "secrets", "labels", "annotations", "limits", "requests", "constraints")
    assert parse(**dict.fromkeys(keys)) == parse()
    assert parse().namespace == "openfaas-fn"
    assert parse(futureKey=[1]) == parse()


@pytest.mark.parametrize(
    "data",
    [
        {"service": "Fn"}, {"service": ""}, {"service": "a" * 64}, {"service": "../x"}, {"service": 5}, {"image": ""},
        {"namespace": "No"}, {"envVars": {"a": 1}}, {"envVars": ["a"]}, {"secrets": "a"}, {"secrets": [1]}, {"labels": 5},
        {"envVars": []}, {"secrets": {}}, {"namespace": 0}, {"image": False}, {"readOnlyRootFilesystem": "no"},
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(data):
    with pytest.raises(ConfigError, match=next(iter(data))):
        parse(**data)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"5", b"[" * 100_000, b'{"image": "\\ud800"}'])
def test_what_is_no_object_is_refused(body):
    with pytest.raises(ConfigError, match="JSON"):
        FunctionDeployment.parse(body)


def test_limits_and_labels_of_openfaas_become_policy():
    deployment = parse(
        limits={"nvidia.com/gpu": "1"},
        labels={
            "com.openfaas.scale.min": "2",
            "com.openfaas.scale.max": "5",
            "com.openfaas.scale.zero-duration": "20m",
        },
    )
    spec = parse_spec({}, deployment.policy())
    assert (spec.gpus, spec.min_replicas, spec.max_replicas, spec.idle_s) == (1, 2, 5, 1200)
    assert parse_spec({}, parse(labels={"com.openfaas.scale.zero": "false"}).policy()).idle_s == 0


def test_annotations_win_over_labels_and_constraints():
    deployment = parse(
        labels={"com.openfaas.scale.max": "5"},
        constraints=["gpufn.dev/max=4", "gpufn.dev/models=a100,h100", "zone=a"],
        annotations={"gpufn.dev/gpu": "0.5", "gpufn.dev/max": "3"},
    )
    spec = parse_spec({}, deployment.policy())
    assert (spec.gpus, spec.max_replicas, spec.gpu_models) == (0.5, 3, ("a100", "h100"))


def test_a_gpu_limit_wins_over_the_annotation_and_the_function_says_so():
    deployment = parse(requests={"nvidia.com/gpu": "1"}, annotations={"gpufn.dev/gpu": "0.5"}, limits={"memory": "1Gi"})
    assert parse_spec({}, deployment.policy()).gpus == 1
    assert deployment.without_effect(bounded=False).startswith(
        "limits of memory are not enforced here; gpufn.dev/gpu = 0.5 has no effect"
    )
    assert deployment.without_effect(bounded=True).startswith("gpufn.dev/gpu = 0.5 has no effect")


@pytest.mark.parametrize("count", ["many", "1000", "-1x"])
def test_a_gpu_limit_that_cannot_be_is_refused_and_breaks_no_list(count):
    deployment = parse(limits={"nvidia.com/gpu": count})
    with pytest.raises(ConfigError):
        deployment.policy()
    assert deployment.without_effect(bounded=False) == ""


def test_a_status_that_comes_back_with_a_deploy_is_no_annotation():
    deployment = parse(annotations={STATUS_ANNOTATION: "failed: long ago"})
    parse_spec({}, deployment.policy())
    assert STATUS_ANNOTATION not in status(deployment)["annotations"]
    assert status(deployment, "preparing: x")["annotations"][STATUS_ANNOTATION] == "preparing: x"
