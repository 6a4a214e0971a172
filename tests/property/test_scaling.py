"""The scaling policy over everything it may be shown."""

import math
from dataclasses import replace

from hypothesis import assume, given, strategies as st

from adapter.policy.scaling import (
    PARKED,
    SERVING,
    SNAPSHOT_GRACE_S,
    STARTING,
    Park,
    ReplicaView,
    Start,
    Stop,
    decide as decide_with,
    next_deadline_s as next_deadline_with,
)
from adapter.spec import parse_spec

LIVE = (STARTING, SERVING, PARKED)
SECONDS = st.integers(0, 7).map(lambda minutes: minutes * 60.0)
"""Few values, so that durations and instants often meet: at borders things go wrong."""


@st.composite
def specs(draw):
    smallest = draw(st.integers(0, 4))
    scale = {
        "min": smallest,
        "max": draw(st.integers(max(1, smallest), 6)),
        "in_flight": draw(st.integers(1, 4)),
        "park": draw(SECONDS),
        "idle": draw(SECONDS),
    }
    return parse_spec({"scale": scale}, {})


@st.composite
def replica_views(draw, identity):
    state = draw(st.sampled_from((*LIVE, "stopping", "gone")))
    in_flight = draw(st.sampled_from((0, 0, 1, 4)))
    idle_since_s = draw(SECONDS) if draw(st.integers(0, 9)) else None  # also where it makes little sense
    return ReplicaView(identity, state, in_flight, idle_since_s, draw(st.booleans()), draw(st.integers(0, 3)) == 0)


@st.composite
def fleets(draw):
    return [draw(replica_views(f"r{n}")) for n in range(draw(st.integers(0, 6)))]


def decide(spec, replicas, waiting, now_s):
    return decide_with(spec, replicas, waiting, now_s, keep_alive_s=spec.idle_s)


def next_deadline_s(spec, replicas, now_s):
    return next_deadline_with(spec, replicas, now_s, keep_alive_s=spec.idle_s)


WAITING = st.just(0) | st.integers(0, 20)


def apply(replicas, actions, now_s):
    """The world after the actions have shown: `decide` sees it next."""
    views = {r.id: r for r in replicas}
    for action in actions:
        if isinstance(action, Stop):
            views[action.replica_id] = replace(views[action.replica_id], state="stopping")
        elif isinstance(action, Park):
            views[action.replica_id] = replace(views[action.replica_id], state=PARKED)
        else:
            views |= {f"new{n}": ReplicaView(f"new{n}", STARTING, 0, None) for n in range(action.count)}
    return list(views.values())


def current(replicas):
    return [r for r in replicas if r.state in LIVE and not r.outdated]


def capacity(spec, replicas):
    return len(current(replicas)) * spec.in_flight


@given(specs(), fleets(), WAITING, SECONDS)
def test_actions_are_possible_and_each_replica_has_one_at_most(spec, replicas, waiting, now_s):
    actions = decide(spec, replicas, waiting, now_s)
    views = {r.id: r for r in replicas}
    touched = [action.replica_id for action in actions if not isinstance(action, Start)]
    assert len(touched) == len(set(touched))
    assert sum(isinstance(action, Start) for action in actions) <= 1
    assert all(action.count > 0 for action in actions if isinstance(action, Start))
    assert all(views[action.replica_id].state == SERVING for action in actions if isinstance(action, Park))
    assert all(views[name].state in LIVE for name in touched)


@given(specs(), fleets(), WAITING, SECONDS)
def test_busy_replicas_are_left_alone(spec, replicas, waiting, now_s):
    busy = {r.id for r in replicas if r.in_flight}
    assert not any(a.replica_id in busy for a in decide(spec, replicas, waiting, now_s) if not isinstance(a, Start))


@given(specs(), fleets(), WAITING, SECONDS)
def test_it_never_grows_above_the_maximum(spec, replicas, waiting, now_s):
    after = current(apply(replicas, decide(spec, replicas, waiting, now_s), now_s))
    assert len(after) <= max(spec.max_replicas, len(current(replicas)))


@given(specs(), fleets(), WAITING, SECONDS)
def test_a_lowered_maximum_is_reached_as_far_as_requests_and_snapshots_allow(spec, replicas, waiting, now_s):
    after = current(apply(replicas, decide(spec, replicas, waiting, now_s), now_s))
    if len(after) > spec.max_replicas:
        assert all(r.in_flight or r.building_snapshot for r in after)


@given(specs(), fleets(), WAITING, SECONDS)
def test_it_never_goes_below_the_minimum(spec, replicas, waiting, now_s):
    after = current(apply(replicas, decide(spec, replicas, waiting, now_s), now_s))
    assert len(after) >= spec.min_replicas
    if any(r.state == PARKED and r.building_snapshot for r in replicas):
        return  # that one is kept, whoever must go instead
    # A parked one with a request is being woken.
    awake = [r for r in current(replicas) if r.state != PARKED or r.in_flight]
    awake_after = [r for r in after if r.state != PARKED or r.in_flight]
    assert len(awake_after) >= min(spec.min_replicas, len(awake))


@given(specs(), fleets(), WAITING, SECONDS)
def test_what_waits_gets_room_up_to_the_maximum(spec, replicas, waiting, now_s):
    after = apply(replicas, decide(spec, replicas, waiting, now_s), now_s)
    in_flight = sum(r.in_flight for r in current(after))
    assert capacity(spec, after) >= min(waiting + in_flight, spec.max_replicas * spec.in_flight)


@given(specs(), fleets(), WAITING, SECONDS)
def test_it_is_idempotent(spec, replicas, waiting, now_s):
    after = apply(replicas, decide(spec, replicas, waiting, now_s), now_s)
    assert decide(spec, after, waiting, now_s) == []


@given(specs(), fleets(), WAITING, SECONDS, st.randoms())
def test_the_order_in_which_replicas_are_listed_does_not_matter(spec, replicas, waiting, now_s, random):
    shuffled = random.sample(replicas, len(replicas))
    assert decide(spec, shuffled, waiting, now_s) == decide(spec, replicas, waiting, now_s)


@given(specs(), fleets(), WAITING, WAITING, SECONDS)
def test_more_waiting_never_means_fewer_replicas(spec, replicas, waiting, more, now_s):
    fewer, greater = (decide(spec, replicas, count, now_s) for count in (waiting, waiting + more))
    assert len(current(apply(replicas, greater, now_s))) >= len(current(apply(replicas, fewer, now_s)))

    def awake(actions):
        return sum(r.state != PARKED for r in current(apply(replicas, actions, now_s)))

    assert awake(greater) >= awake(fewer)


@given(specs(), fleets(), WAITING, SECONDS)
def test_a_replica_whose_snapshot_is_being_taken_rests_later_by_a_constant(spec, replicas, waiting, now_s):
    touched = {a.replica_id for a in decide(spec, replicas, waiting, now_s) if not isinstance(a, Start)}
    for r in replicas:
        if r.building_snapshot and r.idle_since_s is not None and now_s < r.idle_since_s + SNAPSHOT_GRACE_S:
            assert r.id not in touched
    # A snapshot that hangs for ever holds nothing up for ever.
    late_s = now_s + 10_000.0
    replicas = [replace(r, idle_since_s=r.idle_since_s or 0.0) for r in replicas]
    done = [replace(r, building_snapshot=False) for r in replicas]
    assert {str(a) for a in decide(spec, replicas, waiting, late_s)} == {
        str(a) for a in decide(spec, done, waiting, late_s)
    }


@given(specs(), fleets(), WAITING, SECONDS)
def test_outdated_replicas_drain_once_they_are_free(spec, replicas, waiting, now_s):
    stopped = {
        a.replica_id for a in decide(spec, replicas, waiting, now_s) if isinstance(a, Stop) and a.reason == "outdated"
    }
    for r in replicas:
        free = r.state in LIVE and not r.in_flight and not r.building_snapshot
        assert (r.id in stopped) or not (r.outdated and free)
        assert r.id not in stopped or r.outdated


@given(specs(), fleets(), WAITING, SECONDS, st.floats(0, 1, exclude_max=True))
def test_nothing_happens_before_the_deadline(spec, replicas, waiting, now_s, part):
    deadline_s = next_deadline_s(spec, replicas, now_s)
    assert deadline_s is None or deadline_s > now_s
    until_s = now_s + 20_000.0 if deadline_s is None else deadline_s
    between_s = now_s + (until_s - now_s) * part
    assume(between_s < until_s)
    assert decide(spec, replicas, waiting, between_s) == decide(spec, replicas, waiting, now_s)


@given(specs(), fleets())
def test_without_requests_deadlines_lead_to_the_minimum(spec, replicas):
    """What a gateway does: act, wait for the deadline, act. It ends, with what never rests and no more."""
    replicas = [replace(r, in_flight=0, idle_since_s=r.idle_since_s or 0.0) for r in replicas if r.state != STARTING]
    now_s = 0.0
    for _ in range(60):
        replicas = apply(replicas, decide(spec, replicas, 0, now_s), now_s)
        replicas = [
            replace(r, id=f"{r.id}'", state=SERVING, idle_since_s=now_s) if r.state == STARTING else r for r in replicas
        ]
        deadline_s = next_deadline_s(spec, replicas, now_s)
        if deadline_s is None:
            break
        now_s = deadline_s
    else:
        raise AssertionError(f"still a deadline after {now_s} s")
    left = len(current(replicas))
    assert left >= spec.min_replicas
    assert left == spec.min_replicas or not spec.idle_s
    assert left <= spec.max_replicas
    assert not any(r.outdated and r.state in LIVE for r in replicas)
    if not spec.idle_s and spec.park_after_s:
        assert sum(r.state == SERVING for r in current(replicas)) <= max(spec.min_replicas, 0)


def test_from_zero_one_request_starts_one_replica():
    spec = parse_spec({"scale": {"max": 5, "in_flight": 2, "idle": "300s"}}, {})
    assert decide(spec, [], 1, 0.0) == [Start(1)]
    assert decide(spec, [], 3, 0.0) == [Start(2)]
    assert decide(spec, [], 500, 0.0) == [Start(5)]
    assert next_deadline_s(spec, [], math.pi) is None


def test_an_idle_replica_is_parked_and_then_stopped():
    spec = parse_spec({"scale": {"park": "60s", "idle": "300s"}}, {})
    awake = ReplicaView("r", SERVING, 0, 100.0)
    assert decide(spec, [awake], 0, 159.9) == []
    assert next_deadline_s(spec, [awake], 159.9) == 160.0
    assert decide(spec, [awake], 0, 160.0) == [Park("r")]
    parked = replace(awake, state=PARKED)
    assert decide(spec, [parked], 0, 399.9) == []
    assert next_deadline_s(spec, [parked], 160.0) == 400.0
    assert decide(spec, [parked], 0, 400.0) == [Stop("r", "idle")]


def test_the_longest_idle_goes_first():
    spec = parse_spec({"scale": {"min": 1, "max": 3, "park": "0s", "idle": "10s"}}, {})
    views = [ReplicaView("young", SERVING, 0, 5.0), ReplicaView("old", SERVING, 0, 1.0)]
    assert decide(spec, views, 0, 100.0) == [Stop("old", "idle")]


def test_parked_replicas_are_kept_up_to_the_minimum():
    spec = parse_spec({"scale": {"min": 1, "max": 3, "park": "10s", "idle": "10s"}}, {})
    views = [ReplicaView(name, PARKED, 0, 0.0) for name in ("a", "b", "c")]
    assert decide(spec, views, 0, 100.0) == [Stop("a", "idle"), Stop("b", "idle")]


def test_a_lowered_maximum_keeps_those_that_are_awake():
    spec = parse_spec({"scale": {"max": 1, "park": "0s", "idle": "0s"}}, {})
    views = [ReplicaView("awake", SERVING, 0, 0.0), ReplicaView("parked", PARKED, 0, 50.0)]
    assert decide(spec, views, 0, 100.0) == [Stop("parked", "above max")]


def test_as_many_stay_awake_as_the_minimum_asks_for():
    spec = parse_spec({"scale": {"min": 1, "max": 3, "park": "10s", "idle": "60s"}}, {})
    awake = [ReplicaView(name, SERVING, 0, 0.0) for name in ("a", "b", "c")]
    assert decide(spec, awake, 0, 30.0) == [Park("a"), Park("b")]
    mixed = [ReplicaView("awake", SERVING, 0, 0.0), ReplicaView("parked", PARKED, 0, 20.0)]
    assert decide(spec, mixed, 0, 100.0) == [Stop("parked", "idle")]


def test_a_surplus_replica_goes_when_its_snapshot_has_had_its_time():
    spec = parse_spec({"scale": {"max": 1, "park": "0s", "idle": "0s"}}, {})
    views = [ReplicaView(name, SERVING, 0, 10.0, building_snapshot=True) for name in ("a", "b")]
    assert decide(spec, views, 0, 100.0) == []
    assert next_deadline_s(spec, views, 100.0) == 10.0 + SNAPSHOT_GRACE_S
    assert decide(spec, views, 0, 10.0 + SNAPSHOT_GRACE_S) == [Stop("a", "above max")]
