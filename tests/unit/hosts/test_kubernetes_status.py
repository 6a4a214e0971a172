"""What is read in a replica's pod, and what it means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapter.hosts import Deployment
from adapter.hosts.kubernetes_pods import Owner, pod_of
from adapter.hosts.kubernetes_status import Ending, Pod, answers_requests, hindrance_of, problem_of, read_pod
from adapter.spec import parse_spec


def made():
    return pod_of(Deployment("fn", "ns", "3", "fn:1", parse_spec({}, {})), "fn-1", Owner("function-fn", "uid-1"))


def status_of(state=None, last=None, restarts=0, **fields):
    pod = made()
    pod["metadata"] |= {"uid": "u", "annotations": {"gpufn.dev/placement": "{}"}}
    containers = [
        {"name": "istio-proxy", "state": {"running": {}}, "restartCount": 9},
        {"name": "fn", "state": state or {}, "lastState": last or {}, "restartCount": restarts},
    ]
    pod["status"] = {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": containers, **fields}
    return read_pod(pod)


def test_a_pod_is_read_of_its_functions_container_whatever_is_beside_it():
    pod = status_of({"running": {}}, conditions=[{"type": "Ready", "status": "True"}])
    assert (pod.key, pod.revision, pod.owner, pod.ip, pod.port) == ("fn.ns", "3", "uid-1", "10.0.0.1", 8080)
    assert (pod.is_running, pod.is_ready, pod.restarts, pod.is_ending) == (True, True, 0, False)
    assert problem_of(pod) is None
    assert answers_requests(pod, holds_requests=False)


def test_one_that_is_not_ready_is_sent_requests_only_where_its_entrypoint_holds_them():
    pod = status_of({"running": {}})
    assert answers_requests(pod, holds_requests=True)
    assert not answers_requests(pod, holds_requests=False)
    assert not answers_requests(replace(pod, is_ending=True), holds_requests=True)


@pytest.mark.parametrize(
    ("state", "code", "reason"),
    [
        (
            {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}},
            "image-pull-failed",
            "cannot be started: not found",
        ),
        (
            {"waiting": {"reason": "CreateContainerConfigError", "message": "secret x"}},
            "container-refused",
            "cannot be started: secret x",
        ),
        ({"terminated": {"exitCode": 3}}, "replica-died", "ended with code 3"),
        ({"terminated": {"exitCode": 143}}, "replica-died", "was killed by signal 15"),
        ({"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, "out-of-memory", "was killed: out of memory"),
    ],
)
def test_what_hinders_a_container_for_good_is_a_problem(state, code, reason):
    problem = problem_of(status_of(state))
    assert problem is not None
    assert (problem.code, problem.reason) == (code, reason)


def test_a_first_pull_that_failed_is_only_a_hindrance():
    pod = status_of({"waiting": {"reason": "ErrImagePull", "message": "busy"}})
    assert problem_of(pod) is None
    assert hindrance_of(pod) == "ErrImagePull: busy"


def test_a_restart_is_an_end_unless_it_was_before():
    pod = status_of({"running": {}}, {"terminated": {"exitCode": 1}}, restarts=2)
    assert problem_of(pod, restarts=2) is None
    assert problem_of(pod, restarts=1) is not None


def test_who_ends_a_pod_is_named():
    message = "Taint manager: deleting due to NoExecute taint"
    condition = {"type": "DisruptionTarget", "status": "True", "message": message}
    pod = replace(status_of({"running": {}}, conditions=[condition]), is_ending=True)
    problem = problem_of(pod)
    assert problem is not None
    assert problem.reason == f"was ended by the cluster: {message}"


def test_no_room_is_said_in_the_schedulers_words():
    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    pod = status_of(phase="Pending", conditions=[{"type": "PodScheduled", "status": "False", "message": message}])
    assert hindrance_of(pod) == f"no node takes it: {message}"


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ('{"why": "no node has an H100: 3 have an L4"}', "no node has an H100: 3 have an L4"),
        ('{"prefer": [["n", 1, 2]]}', "0/3 nodes are available."),
        ("{", "0/3 nodes are available."),
        ('["why"]', "0/3 nodes are available."),
        ('{"why": 7}', "0/3 nodes are available."),
    ],
)
def test_why_no_node_takes_it_is_said_as_the_webhook_found_it(note, said):
    body = made()
    body["metadata"] |= {"uid": "u", "annotations": {"gpufn.dev/placement": note}}
    condition = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available."}
    body["status"] = {"phase": "Pending", "conditions": [condition]}
    assert hindrance_of(read_pod(body)) == f"no node takes it: {said}"


def test_a_pod_without_a_status_has_no_problem_yet():
    assert problem_of(Pod("p", "ns", "u", "fn", "1", "o")) is None
    assert problem_of(Pod("p", "ns", "u", "fn", "1", "o", phase="Failed", ended=Ending(0))) is not None
