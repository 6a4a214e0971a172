"""Which snapshots are taken where, and what is said of those that were."""

import json

import pytest
from hypothesis import given, settings, strategies as st

from adapter.controller.snapshots import RETRY_S, Due, Step, Taking, due_of, next_step, taking_of

EMBED, CHAT = Due("team-a", "embed-1"), Due("team-b", "chat-1")


def taking(
    name="gpufn-snapshot-1", phase="Running", node="node-1", began_at_s=0.0, ended_at_s=0.0, message="", **changes
):
    return Taking(
        "team-a",
        name,
        "node-1",
        node,
        "team-a/embed.team-a",
        "embed-1",
        phase,
        message,
        began_at_s,
        ended_at_s or began_at_s,
        **changes,
    )


def test_what_is_due_is_taken_in_an_order_that_does_not_change():
    assert next_step([CHAT, EMBED, CHAT], [], 0.0).take == (EMBED, CHAT)


@pytest.mark.parametrize("phase", ["Pending", "Running", "Unknown"])
def test_a_node_takes_one_at_a_time(phase):
    assert next_step([EMBED], [taking(phase=phase)], 0.0).take == ()


def test_what_worked_is_cleared_away_once_its_agent_has_seen_it():
    done = taking(phase="Succeeded")
    assert next_step([CHAT], [done], 59.0) == Step(take=(CHAT,), again_s=1.0)
    assert next_step([CHAT], [done], 60.0) == Step(clear=(done,), take=(CHAT,))


def test_what_worked_and_is_still_called_due_is_not_taken_again_and_again():
    done = taking(phase="Succeeded")
    assert next_step([EMBED], [done], 60.0).clear == ()
    assert next_step([EMBED], [done], RETRY_S).clear == (done,)


def test_what_failed_stays_until_it_may_be_tried_again():
    failed = taking(phase="Failed", ended_at_s=100.0)
    before = next_step([EMBED], [failed], 99.0 + RETRY_S)
    assert (before.clear, before.again_s) == ((), 1.0)
    after = next_step([EMBED], [failed], 100.0 + RETRY_S)
    assert (after.clear, after.again_s) == ((failed,), None)


def test_one_that_finds_no_place_is_given_up():
    waiting = taking(phase="Pending", node="")
    assert next_step([], [waiting], 10.0).give_up == ()
    assert next_step([], [waiting], 10.0).again_s == 590.0
    assert next_step([], [waiting], 600.0).give_up == (waiting,)


def test_one_that_pulls_its_image_is_waited_for():
    assert next_step([], [taking(phase="Pending")], 10_000.0) == Step()


def test_one_that_waits_for_its_gpu_holds_up_none_that_needs_no_gpu():
    waiting = taking(phase="Pending", node="", has_gpu=True)
    assert next_step([EMBED], [waiting], 600.0) == Step(take=(EMBED,), gpu_waits=True, again_s=3_000.0)
    assert next_step([EMBED], [waiting, taking("gpufn-snapshot-2")], 600.0).take == ()


@pytest.mark.parametrize("phase", ["Pending", "Running"])
def test_one_that_has_its_gpu_is_waited_for_as_any_other(phase):
    assert next_step([EMBED], [taking(phase=phase, has_gpu=True)], 0.0).take == ()


def test_one_whose_gpu_is_in_use_for_an_hour_lets_another_wait():
    waiting = taking(phase="Pending", node="", has_gpu=True)
    assert next_step([EMBED], [waiting], 3_599.0) == Step(take=(EMBED,), gpu_waits=True, again_s=1.0)
    assert next_step([EMBED], [waiting], 3_600.0) == Step(give_up=(waiting,), take=(EMBED,))


def test_one_that_waits_for_a_node_that_is_gone_is_given_up():
    waiting = taking(phase="Pending", node="", has_gpu=True)
    assert next_step(None, [waiting], 10.0) == Step(give_up=(waiting,))
    assert next_step(None, [taking()], 10.0) == Step()


def test_one_that_made_room_for_another_is_no_reason_to_wait():
    gone = taking(phase="Failed", ended_at_s=100.0, made_room=True)
    assert next_step([EMBED], [gone], 100.0) == Step(clear=(gone,), take=(EMBED,))


def test_one_that_its_kubelet_never_ran_is_tried_again_sooner_than_one_that_failed():
    refused = taking(phase="Failed", ended_at_s=100.0, ran=False)
    assert next_step([EMBED], [refused], 100.0).clear == ()
    assert next_step([EMBED], [refused], 700.0).clear == (refused,)
    assert next_step([EMBED], [taking(phase="Failed", ended_at_s=100.0)], 700.0).clear == ()


@settings(max_examples=200)
@given(
    st.lists(
        st.builds(
            taking, st.text("abc", min_size=1, max_size=2), st.sampled_from(["Pending", "Running", "Succeeded", "Failed"]),
            st.sampled_from(["", "node-1"]), st.floats(0, 1e6), has_gpu=st.booleans(), made_room=st.booleans(),
        ),
        max_size=4,
    ),
    st.floats(0, 2e6),
)  # fmt: skip
def test_at_most_one_is_taken_and_one_waits_for_a_gpu_and_none_is_forgotten(takings, now_s):
    step = next_step([EMBED], takings, now_s)
    over = {each for each in takings if each.is_over}
    active = set(takings) - over - set(step.give_up)
    for_gpu = {each for each in active if each.waits and each.has_gpu}
    assert step.gpu_waits is bool(for_gpu)
    assert bool(step.take) is (active == for_gpu)
    assert set(step.clear) <= over
    assert all(each.waits for each in step.give_up)
    assert (step.again_s is not None) is (any(each.waits for each in active) or bool(over - set(step.clear)))


def test_an_agent_that_says_nothing_sensible_means_nothing_is_due():
    assert due_of({}) == ()
    assert due_of({"status": {"snapshotsDue": [{"namespace": "a"}, "x", {"namespace": "a", "pod": "b"}]}}) == (
        Due("a", "b"),
    )


FOR_NODE_1 = {
    "nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-1"]}]}]
}


def pod(phase, terminated, limits=None, **status):
    return {
        "metadata": {
            "name": "gpufn-snapshot-1",
            "namespace": "team-a",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "annotations": {
                "gpufn.dev/snapshot-of": "team-a/embed.team-a",
                "gpufn.dev/for-pod": "embed-1",
                "gpufn.dev/for-node": "another",
            },
        },
        "spec": {
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": FOR_NODE_1}},
            "containers": [{"resources": {"limits": limits or {}}}],
        },
        "status": {"phase": phase, "containerStatuses": [{"state": {"terminated": terminated}}], **status},
    }


def test_a_snapshot_that_was_taken_says_how_large_it_is():
    said = json.dumps({"state": "published", "key": "k", "bytes": 3 * 2**20, "seconds": 1.5})
    found = taking_of(pod("Succeeded", {"finishedAt": "2026-01-01T00:01:00Z", "message": said + "\n"}))
    assert found.news == "Took the snapshot team-a/embed.team-a on node-1: 3.0Mi in 1.50s."
    assert found.ended_at_s - found.began_at_s == 60


def test_a_function_that_writes_the_message_itself_is_believed_nothing_and_harms_nobody():
    found = taking_of(
        pod("Succeeded", {"finishedAt": "2026-01-01T00:01:00Z", "message": '{"bytes":1e999,"seconds":1}'})
    )
    assert found.news == "Took the snapshot team-a/embed.team-a on node-1."


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (json.dumps({"state": "failed", "code": "criu-missing", "reason": "No CRIU."}), "No CRIU. [criu-missing]"),
        ("Traceback", "Traceback"),
        ('{"reason": ' + "[" * 100_000, "[" * 100_000),
        ("", "OOMKilled"),
    ],
)
def test_one_that_was_not_taken_says_why(message, why):
    found = taking_of(pod("Failed", {"finishedAt": "2026-01-01T00:01:00Z", "message": message, "reason": "OOMKilled"}))
    assert found.news.endswith(why)
    assert "replicas there load as before" in found.news


@pytest.mark.parametrize(
    ("statuses", "ran"),
    [
        ([{"state": {"terminated": {}}}], True),
        ([{"state": {"running": {}}}], True),
        ([{"state": {"waiting": {"reason": "ImagePullBackOff"}}}], False),
        ([], False),  # UnexpectedAdmissionError, OutOfcpu
    ],
)
def test_whether_it_ran_is_in_its_containers_states(statuses, ran):
    found = taking_of(pod("Failed", {}, containerStatuses=statuses, message="Pod was rejected: no healthy devices"))
    assert found.ran is ran
    assert "rejected: no healthy devices" in found.news


@pytest.mark.parametrize(("limits", "has_gpu"), [({"cpu": "1"}, False), ({"nvidia.com/gpu": "1"}, True)])
def test_whether_it_needs_a_gpu_is_in_its_limits(limits, has_gpu):
    assert taking_of(pod("Running", {}, limits)).has_gpu is has_gpu


def disrupted(reason, status="True"):
    return {"conditions": [{"type": "Ready", "status": "False"}, {"type": "DisruptionTarget", "status": status, "reason": reason}]}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "made_room"),
    [
        (disrupted("PreemptionByScheduler"), True),
        ({"reason": "Preempting"}, True),
        (disrupted("PreemptionByScheduler", "False"), False),
        (disrupted("TerminationByKubelet") | {"reason": "Evicted"}, False),  # its node has too little of something
        ({}, False),
    ],
)
def test_one_that_another_pod_preempted_is_told_from_one_that_failed(status, made_room):
    found = taking_of(pod("Failed", {"finishedAt": "2026-01-01T00:01:00Z", "reason": "Error"}, **status))
    assert found.made_room is made_room
    assert ("made room for another" in found.news) is made_room
