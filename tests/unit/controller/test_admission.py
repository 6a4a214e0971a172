import asyncio
import base64
import json

import jsonpatch
import pytest
from hypothesis import given, settings, strategies as st

from adapter.controller.admission import Admission, Answer, Review
from adapter.errors import ConfigError, Unavailable
from adapter.ledger.held import HeldToday
from adapter.policy.activity import Activity
from adapter.policy.budget import utc_day
from adapter.policy.needs import LOAD_S
from adapter.records import Rung
from tests.fakes.cluster_objects import GPU, View, function_pod, gpu_node, namespace, node


def review(value, operation="CREATE", old=None, **fields):
    request = {"uid": "u-1", "namespace": "team", "operation": operation, "object": value, "oldObject": old, **fields}
    body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
    return Review.parse(json.dumps(body).encode())


def answer_to(view, value, **fields) -> dict:
    return Admission(view).pod(review(value, **fields)).to_json()["response"]


def patched(value, response):
    return jsonpatch.apply_patch(value, json.loads(base64.b64decode(response["patch"])))


@pytest.fixture
def view():
    return View(node("n1"), node("n2"), node("cpu", gpus=0), gpu_node("n2", ["team/fn.team"]),
                namespace("team", **{"gpufn.dev/snapshots": "enabled"}))  # fmt: skip


def test_a_functions_pod_prefers_the_node_that_has_its_snapshot(view):
    response = answer_to(view, function_pod())
    assert (response["uid"], response["allowed"], response["patchType"]) == ("u-1", True, "JSONPatch")
    affinity = patched(function_pod(), response)["spec"]["affinity"]["nodeAffinity"]
    [first, *_] = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert first["preference"]["matchExpressions"][0]["values"] == ["n2"]


def test_a_wake_is_what_was_measured_of_the_function_where_anything_was(view):
    def wakes(activity):
        response = Admission(view, activity=lambda *_: activity).pod(review(function_pod())).to_json()["response"]
        note = json.loads(patched(function_pod(), response)["metadata"]["annotations"]["gpufn.dev/placement"])
        return {name: wake_s for name, _, wake_s in note["prefer"]}

    assert wakes(None)["n1"] == LOAD_S
    slow = Activity("fn", "team", (), {Rung.RESTORE: (0.5,), Rung.LOAD: (90.0, 100.0, 110.0)})
    assert wakes(slow)["n1"] == 100
    assert wakes(slow)["n2"] < 100  # it has the snapshot
    assert wakes(Activity("fn", "team", (), {Rung.RESTORE: (0.5,)}))["n1"] == LOAD_S


def test_asked_again_about_what_it_made_it_changes_nothing_and_promises_nothing(view):
    once = patched(function_pod(), answer_to(view, function_pod()))
    held = len(view.reservations)
    assert "patch" not in answer_to(view, once)
    assert len(view.reservations) == held == 1


def test_many_pods_at_once_do_not_all_choose_one_node():
    view = View(node("n1", gpus=4), node("n2", gpus=4), namespace("team"))
    admission = Admission(view)
    for number in range(8):
        assert admission.pod(review(function_pod(f"fn{number}"))).outcome == "patched"
    assert [each.offers[0].free for each in view.inventory()] == [0, 0]


def test_a_dry_run_promises_nothing(view):
    assert answer_to(view, function_pod(), dryRun=True)["patch"]
    assert len(view.reservations) == 0


def test_what_is_none_of_ours_is_left_alone(view):
    other = {"metadata": {"name": "web"}, "spec": {"containers": [{"name": "web", "image": "nginx"}]}}
    for value in (other, function_pod(gpus=0)):
        assert answer_to(view, value) == {"uid": "u-1", "allowed": True}
    assert answer_to(view, function_pod(), operation="UPDATE") == {"uid": "u-1", "allowed": True}


@pytest.mark.parametrize(
    "annotations",
    [
        {"gpufn.dev/idle": "-5s"},
        {"gpufn.dev/tenant": "somebody-else"},
        {"gpufn.dev/no-such-key": "x"},
        {"gpufn.dev/memory": "lots"},
    ],
)
def test_a_users_error_is_refused_with_what_to_do(view, annotations):
    response = answer_to(view, function_pod(annotations=annotations))
    assert not response["allowed"]
    [said, why, *_] = response["status"]["message"].splitlines()
    assert said.startswith("✗ ")
    assert said.endswith("]")
    assert why


def test_an_error_of_ours_lets_the_pod_pass_and_is_counted(view, monkeypatch, caplog):
    monkeypatch.setattr(view, "inventory", lambda: 1 / 0)
    answer = Admission(view).pod(review(function_pod()))
    assert (answer.outcome, answer.code) == ("failed", "failed")
    response = answer.to_json()["response"]
    assert response["allowed"]
    assert "patch" not in response
    assert "ZeroDivisionError" in caplog.text


def test_a_cluster_that_is_not_known_yet_lets_the_pod_pass():
    answer = Admission(View(ready="nothing is heard of nodes")).pod(review(function_pod()))
    assert (answer.outcome, answer.code) == ("failed", "not-ready")


def test_a_namespace_that_there_is_not_is_promised_nothing(view):
    answer_to(view, function_pod(), namespace="made-up")
    assert len(view.reservations) == 0


def test_where_no_node_fits_the_pod_has_no_preference_and_promises_nothing():
    view = View(node("n1", gpus=1), namespace("team"))
    response = answer_to(view, function_pod(gpus=4))
    assert response["allowed"]
    note = json.loads(patched(function_pod(gpus=4), response)["metadata"]["annotations"]["gpufn.dev/placement"])
    assert note["refused"][0]["code"] == "gpu-count"
    assert len(view.reservations) == 0


def test_a_knative_service_gets_its_templates_annotations():
    container = {"name": "c", "image": "fn", "resources": {"limits": {GPU: "1"}}}
    service = {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "fn", "namespace": "team", "annotations": {"gpufn.dev/max": "3"}},
        "spec": {"template": {"spec": {"containers": [container]}}},
    }
    admission = Admission(View(namespace("team")))
    answer = admission.service(review(service))
    assert answer.outcome == "patched"
    made = jsonpatch.apply_patch(service, list(answer.operations))
    assert made["spec"]["template"]["metadata"]["annotations"]["autoscaling.knative.dev/max-scale"] == "3"
    assert admission.service(review(made, operation="UPDATE", old=made)).outcome == "untouched"
    service["metadata"]["annotations"]["gpufn.dev/max"] = "-1"
    assert admission.service(review(service)).outcome == "refused"


def test_warnings_are_no_longer_than_the_api_server_passes_on():
    response = Answer("u", "untouched", warnings=("x" * 1000,) * 50).to_json()["response"]
    assert len(response["warnings"]) == 12
    assert {len(text) for text in response["warnings"]} == {256}


VALID = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {"uid": "u", "object": {}}}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        json.dumps({**VALID, "kind": "Pod"}).encode(),
        json.dumps({**VALID, "apiVersion": "admission.k8s.io/v1beta1"}).encode(),
        json.dumps({**VALID, "request": None}).encode(),
        json.dumps({**VALID, "request": {"object": {}}}).encode(),
        json.dumps({**VALID, "request": {"uid": 7, "object": {}}}).encode(),
        json.dumps({**VALID, "request": {"uid": "u"}}).encode(),
        json.dumps({**VALID, "request": {"uid": "u", "object": "pod"}}).encode(),
    ],
)
def test_what_is_no_review_is_said_to_be_none(body):
    with pytest.raises(ConfigError) as caught:
        Review.parse(body)
    assert caught.value.code == "bad-review"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
PARTS = st.sampled_from(["metadata", "labels", "annotations", "spec", "containers", "resources", "limits", "affinity"])
ODD = st.recursive(
    JSON | st.just("1") | st.just(GPU),
    lambda inner: (
        st.dictionaries(PARTS | st.sampled_from(["gpufn.dev/function", "gpufn.dev/gpu", GPU]), inner, max_size=4)
        | st.lists(inner, max_size=3)
    ),
    max_leaves=20,
)


@settings(max_examples=60)
@given(st.dictionaries(PARTS, ODD, max_size=5))
def test_no_pod_however_odd_gets_no_answer(value):
    view = View(node("n1"), namespace("team"))
    for answer in (Admission(view).pod(review(value)), Admission(view).service(review(value))):
        assert answer.to_json()["response"]["uid"] == "u-1"


NOON = utc_day(1_800_000_000 * 10**9)[0] + 12 * 3600 * 10**9


def of_budget(held_gpu_s, later_s=0.0, gpus=1, budget="7200", **fields):
    """The answer to a pod of a function that held so much (an error: nobody knows) when that was asked last."""

    async def ask(start_ns, end_ns):
        if isinstance(held_gpu_s, Exception):
            raise held_gpu_s
        return {"fn.team": held_gpu_s}

    held = HeldToday(ask, clock_ns=lambda: NOON)
    asyncio.run(held.look())
    view = View(node("n1"), node("cpu", gpus=0), namespace("team"))
    admission = Admission(view, held=held, clock_ns=lambda: NOON + int(later_s * 1e9))
    return admission.pod(review(function_pod(gpus=gpus, annotations={"gpufn.dev/budget": budget}), **fields))


def test_a_pod_whose_functions_budget_is_spent_is_refused_with_how_much_and_until_when():
    answer = of_budget(7300.0)
    assert (answer.outcome, answer.code) == ("refused", "budget-spent")
    status = answer.to_json()["response"]["status"]
    assert (status["code"], status["reason"]) == (403, "Forbidden")
    for part in ("fn.team", "7,300.0 of 7,200.0 GPU-seconds", "UTC day", "00:00 UTC, in 12h", "gpufn.dev/budget"):
        assert part in status["message"]


@pytest.mark.parametrize(
    ("held", "changes"),
    [(7100.0, {}), (7300.0, {"later_s": 12 * 3600}), (7300.0, {"budget": "9000"}), (7300.0, {"budget": "0"})],
    ids=["some is left", "the next day", "it was raised", "there is none"],
)
def test_else_it_is_let_in(held, changes):
    assert of_budget(held, **changes).outcome == "patched"


def test_what_has_no_gpu_holds_none():
    assert of_budget(7300.0, gpus=0).outcome == "patched"


def test_a_dry_run_is_told_and_not_refused():
    answer = of_budget(7300.0, dryRun=True)
    assert answer.outcome == "patched"
    assert any("budget of fn.team is spent" in text for text in answer.warnings)


def test_nearly_spent_it_is_let_in_with_a_warning():
    answer = of_budget(7000.0)
    assert answer.outcome == "patched"
    assert any("nearly spent" in text for text in answer.warnings)


def test_while_the_ledger_cannot_be_asked_it_is_let_in_and_that_is_counted():
    answer = of_budget(Unavailable("It is away."))
    assert (answer.outcome, answer.code) == ("patched", "budget-unknown")
    assert any("not known" in text for text in answer.warnings)
