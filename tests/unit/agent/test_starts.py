"""Start records from a replica's words: whose they are says the pod, and they begin when the pod did."""

from __future__ import annotations

import pytest

from adapter.agent.pods import Container, Pod, intent_of
from adapter.agent.starts import PhaseChange, phase_changes, phase_of, start_records
from adapter.records import Event, EventName, LeasePhase, Phase, PhaseName, Rung, StartRecord

SECOND_NS = 10**9
BEGAN_NS = 1_800_000_000 * SECOND_NS
POD = Pod(
    uid="7ad98cc7-ec2e", name="embed-x", namespace="acme", ip="", created_at_ns=BEGAN_NS, admitted_at_ns=BEGAN_NS + 100,
    scheduled_at_ns=BEGAN_NS + SECOND_NS, deleted_at_ns=0, is_over=False, containers=(),
    body={
        "metadata": {
            "name": "embed-x", "annotations": {},
            "labels": {"serving.knative.dev/service": "embed", "serving.knative.dev/revision": "embed-00007"},
        },
        "spec": {"containers": [{"name": "user-container", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]},
    },
)  # fmt: skip
INTENT = intent_of(POD, {})
assert INTENT is not None


def record(**changes):
    base = {
        "function": "function", "namespace": "openfaas-fn", "revision": "1", "replica": "whoever", "rung": Rung.RESTORE,
        "started_at_ns": BEGAN_NS + 3 * SECOND_NS, "total_ns": 400, "phases": (Phase(PhaseName.RESTORE, 0, 300), Phase(PhaseName.HANDOVER, 300, 400)),
    }  # fmt: skip
    return StartRecord(**base | changes)


def started(at_ns, **changes):
    return Event(EventName.STARTED, at_ns, {"record": record(**changes).to_json()})


def told(events, *, seen_at_ns=0, told_at_ns=0, is_first=True):
    return start_records(events, POD, INTENT, seen_at_ns=seen_at_ns, told_at_ns=told_at_ns, is_first=is_first)


def test_the_first_start_begins_when_the_pod_did():
    [(at_ns, found)] = told([started(5)], seen_at_ns=BEGAN_NS + 2 * SECOND_NS - 10)
    assert at_ns == 5
    assert (found.function, found.namespace, found.revision, found.replica) == (
        "embed", "acme", "embed-00007", "embed-x-7ad98cc7",
    )  # fmt: skip
    lead_ns = 3 * SECOND_NS - 100
    assert (found.started_at_ns, found.total_ns) == (BEGAN_NS + 100, lead_ns + 400)
    assert found.phases == (
        Phase(PhaseName.SCHEDULE, 0, 2 * SECOND_NS - 110),
        Phase(PhaseName.PULL, 2 * SECOND_NS - 110, lead_ns),
        Phase(PhaseName.RESTORE, lead_ns, lead_ns + 300),
        Phase(PhaseName.HANDOVER, lead_ns + 300, lead_ns + 400),
    )
    assert found.covered_ratio == 1.0


def test_an_agent_that_came_later_takes_when_it_was_scheduled():
    [(_, found)] = told([started(5)])
    assert found.phases[0] == Phase(PhaseName.SCHEDULE, 0, SECOND_NS - 100)


def test_an_agent_that_saw_it_late_takes_the_second_in_which_it_was_scheduled():
    [(_, found)] = told([started(5)], seen_at_ns=BEGAN_NS + 3600 * SECOND_NS)
    assert found.phases[0] == Phase(PhaseName.SCHEDULE, 0, 2 * SECOND_NS - 100)


@pytest.mark.parametrize("seen_at_ns", [1, BEGAN_NS + 3600 * SECOND_NS])
def test_clocks_that_disagree_make_no_phase_negative(seen_at_ns):
    [(_, found)] = told([started(5)], seen_at_ns=seen_at_ns)
    assert all(0 <= phase.start_ns <= phase.end_ns <= found.total_ns for phase in found.phases)


def test_a_start_before_its_pod_is_left_as_it_is():
    [(_, found)] = told([started(5, started_at_ns=BEGAN_NS - SECOND_NS)])
    assert found.phases == record().phases


def test_later_starts_are_the_replicas_alone_and_each_is_told_once():
    found = told([started(5), started(9, rung=Rung.RESUME)], told_at_ns=5, is_first=False)
    assert [(at_ns, one.rung, len(one.phases)) for at_ns, one in found] == [(9, Rung.RESUME, 2)]
    both = told([started(5), started(9)])
    assert [len(one.phases) for _, one in both] == [4, 2]


def test_a_failed_start_is_told_too():
    event = Event(EventName.FAILED, 5, {"code": "x", "reason": "y", "record": record(error="It broke.").to_json()})
    assert [one.error for _, one in told([event])] == ["It broke."]


@pytest.mark.parametrize("fields", [{}, {"record": None}, {"record": {"version": 7}}, {"record": "x"}])
def test_what_a_function_printed_is_no_record(fields):
    assert told([Event(EventName.STARTED, 5, fields), started(6)])[0][0] == 6


def test_phases_of_leases():
    events = [Event(name, n) for n, name in enumerate(EventName)]
    assert phase_changes(events) == [
        PhaseChange(LeasePhase.RESTORING, 0),
        PhaseChange(LeasePhase.IDLE, 1),
        *(
            PhaseChange(LeasePhase.RESTORING, n)
            for n, name in enumerate(EventName)
            if name.value in ("failed", "model_exited")
        ),
    ]
    assert phase_of(Container("main", ready=False)) is LeasePhase.RESTORING
    assert phase_of(Container("main", ready=True)) is LeasePhase.IDLE
