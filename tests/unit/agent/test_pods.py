"""What of a pod's JSON the meter rests on."""

from __future__ import annotations

import copy

import pytest

from adapter.agent.pods import intent_of, read_pod, snapshot_intent_of
from adapter.cluster.intent import read_intent
from adapter.controller.snapshot_pod import snapshot_pod

SECOND_NS = 10**9
AT_NS = 1_795_647_091 * SECOND_NS
"""2026-11-25T22:51:31Z"""


def pod(**status):
    return {
        "metadata": {
            "name": "embed-x", "namespace": "acme", "uid": "7ad98cc7-ec2e-431b", "creationTimestamp": "2026-11-25T22:51:31Z",
            "labels": {"gpufn.dev/function": "embed"},
            "annotations": {"gpufn.dev/price-class": "gold", "gpufn.dev/admitted-at": str(AT_NS + 250_000_000)},
            "managedFields": [{"manager": "kubelet"}],
        },
        "spec": {"containers": [{"name": "main", "image": "x", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]},
        "status": {"podIP": "10.0.0.7", "phase": "Running", "conditions": [{"type": "PodScheduled", "lastTransitionTime": "2026-11-25T22:51:32Z"}], **status},
    }  # fmt: skip


def container(state, **more):
    return {"name": "main", "state": state, "ready": True, "restartCount": 0, **more}


RUNNING = container({"running": {"startedAt": "2026-11-25T22:51:33Z"}})
ENDED = {"startedAt": "2026-11-25T22:51:33Z", "finishedAt": "2026-11-25T22:51:43Z"}


def test_a_running_pod():
    found = read_pod(pod(containerStatuses=[RUNNING]))
    assert (found.replica, found.ip, found.deleted_at_ns, found.is_over) == ("embed-x-7ad98cc7", "10.0.0.7", 0, False)
    assert (found.began_at_ns, found.scheduled_at_ns) == (AT_NS + 250_000_000, AT_NS + SECOND_NS)
    [main] = found.containers
    assert (main.runs, main.started_at_ns, main.finished_at_ns) == (True, AT_NS + 2 * SECOND_NS, 0)
    assert "managedFields" not in found.body["metadata"]


def test_a_container_that_waits_to_be_started_again_has_ended():
    waiting = container({"waiting": {"reason": "CrashLoopBackOff"}}, lastState={"terminated": ENDED}, restartCount=3)
    [main] = read_pod(pod(containerStatuses=[waiting])).containers
    assert (main.runs, main.restarts) == (False, 3)
    assert main.finished_at_ns - main.started_at_ns == 10 * SECOND_NS


def test_a_container_that_never_ran_and_a_pod_without_status():
    [main] = read_pod(pod(containerStatuses=[container({"waiting": {"reason": "ContainerCreating"}})])).containers
    assert (main.started_at_ns, main.finished_at_ns, main.runs) == (0, 0, False)
    bare = pod()
    del bare["status"]
    assert read_pod(bare).containers == ()


def test_somebody_asked_for_its_end_when_the_grace_began():
    value = pod()
    value["metadata"] |= {"deletionTimestamp": "2026-11-25T22:52:31Z", "deletionGracePeriodSeconds": 30}
    assert read_pod(value).deleted_at_ns == AT_NS + 30 * SECOND_NS


@pytest.mark.parametrize("text", ["", "soon", "-5", "9" * 40, str(AT_NS + 3600 * SECOND_NS), "٣"])
def test_when_it_was_admitted_is_not_what_its_user_says(text):
    value = pod()
    value["metadata"]["annotations"]["gpufn.dev/admitted-at"] = text
    assert read_pod(value).began_at_ns == AT_NS


def test_whose_it_is_says_its_namespace():
    intent = intent_of(read_pod(pod()), {"gpufn.dev/tenant": "acme-corp"})
    assert intent is not None
    assert (intent.key, intent.tenant, intent.spec.price_class) == ("embed.acme", "acme-corp", "gold")
    plain = intent_of(read_pod(pod()), {})
    assert plain is not None
    assert plain.tenant == "acme"


@pytest.mark.parametrize(
    "annotation", [("gpufn.dev/tenant", "another"), ("gpufn.dev/nonsense", "1"), ("gpufn.dev/gpus", "-1")]
)
def test_one_whose_annotations_cannot_be_used_holds_what_it_holds(annotation):
    value = copy.deepcopy(pod())
    value["metadata"]["annotations"][annotation[0]] = annotation[1]
    intent = intent_of(read_pod(value), {})
    assert intent is not None
    assert (intent.key, intent.tenant) == ("embed.acme", "acme")


@pytest.mark.parametrize("label", ["min", "max", "zero-duration"])
def test_one_whose_openfaas_labels_cannot_be_used_holds_what_it_holds(label):
    value = copy.deepcopy(pod())
    value["metadata"]["labels"] = {"faas_function": "embed", f"com.openfaas.scale.{label}": "abc"}
    intent = intent_of(read_pod(value), {})
    assert intent is not None
    assert (intent.key, intent.framework, intent.need.gpus) == ("embed.acme", "openfaas", 1)


def test_a_pod_without_our_labels_is_no_function():
    value = pod()
    value["metadata"]["labels"] = {"app": "embed"}
    assert intent_of(read_pod(value), {}) is None


# Pods that take snapshots --------------------------------------------------------------------------


def taking(limits=None, tenant="acme-corp", **annotations):
    """As the controller makes it for `pod()` in a namespace of that tenant's, and as it is changed afterwards."""
    replica, labels = pod(), {"gpufn.dev/tenant": tenant, "gpufn.dev/snapshots": "enabled"}
    replica["spec"]["containers"][0]["resources"]["limits"] = {"nvidia.com/gpu": "2"} if limits is None else limits
    replica["metadata"]["labels"]["gpufn.dev/revision"] = "7"
    intent = read_intent(replica, namespace="acme", namespace_labels=labels)
    assert intent is not None
    made = snapshot_pod(replica, intent, "node-1")
    made["metadata"] |= {"uid": "u", "creationTimestamp": "2026-11-25T22:51:31Z"}
    made["metadata"]["annotations"] |= annotations
    return made


def test_the_gpu_of_a_pod_that_takes_a_snapshot_is_held_by_its_function():
    intent = snapshot_intent_of(read_pod(taking()), {"gpufn.dev/tenant": "acme-corp"})
    assert intent is not None
    assert (intent.key, intent.tenant, intent.revision, intent.spec.price_class) == (
        "embed.acme", "acme-corp", "7", "gold",
    )  # fmt: skip
    assert intent.need.units == 2
    assert not intent.snapshots
    assert intent_of(read_pod(taking()), {"gpufn.dev/tenant": "acme-corp"}) is None  # it is no replica


def test_one_without_a_gpu_takes_nobodys_time():
    assert snapshot_intent_of(read_pod(taking(limits={"cpu": "1"})), {"gpufn.dev/tenant": "acme-corp"}) is None


@pytest.mark.parametrize("of", ["other/embed.acme", "acme-corp/embed.other", "embed", "acme-corp/.acme", ""])
def test_nobody_holds_for_another_tenant_or_namespace(of):
    value = taking(**{"gpufn.dev/snapshot-of": of})
    assert snapshot_intent_of(read_pod(value), {"gpufn.dev/tenant": "acme-corp"}) is None


def test_without_the_label_that_is_the_controllers_to_give_it_is_anybodys_pod():
    value = taking()
    value["metadata"]["labels"] = {}
    assert snapshot_intent_of(read_pod(value), {"gpufn.dev/tenant": "acme-corp"}) is None
