"""Lease intervals add up to lifetimes, whatever a replica does and however often it is told."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, strategies as st

from adapter.policy import leases
from adapter.policy.leases import Holder, LeaseTracker
from adapter.records import LeasePhase

WALL_NS, MONOTONIC_NS = 1_700_000_000_000_000_000, 5_000_000_000
STEP = st.integers(0, 10**10)
EVENT = st.tuples(st.sampled_from(["heartbeat", "end", *LeasePhase]), st.integers(0, 2), STEP)


def holder(n):
    return Holder("embed", "openfaas-fn", "1", f"embed-{n}", "default", "standard", share=0.5)


def play(events):
    """Replays events; returns the tracker's intervals and, per replica, from when to when it was there."""
    tracker = LeaseTracker(WALL_NS, MONOTONIC_NS)
    now_ns, intervals, lifetimes, gone = MONOTONIC_NS, [], {}, set()
    for what, n, step_ns in events:
        now_ns += step_ns
        name = f"embed-{n}"
        if what == "heartbeat":
            intervals += tracker.heartbeat(now_ns)
        elif what == "end":
            intervals += tracker.end(name, now_ns)
            if name in lifetimes and name not in gone:
                lifetimes[name][1] = now_ns
            gone.add(name)
        else:
            intervals += tracker.observe(holder(n), what, now_ns)
            if name not in gone:
                lifetimes.setdefault(name, [now_ns, None])
    intervals += tracker.heartbeat(now_ns)
    ends = {name: (since, now_ns if until is None else until) for name, (since, until) in lifetimes.items()}
    return intervals, ends


@given(st.lists(EVENT, max_size=40))
def test_intervals_are_the_lifetime_without_gap_or_overlap(events):
    intervals, lifetimes = play(events)
    by_replica = {name: [i for i in intervals if i.replica == name] for name in lifetimes}
    assert sum(map(len, by_replica.values())) == len(intervals)
    for name, (since_ns, until_ns) in lifetimes.items():
        own = by_replica[name]
        assert sum(i.ended_at_ns - i.started_at_ns for i in own) == until_ns - since_ns
        assert all(i.ended_at_ns > i.started_at_ns for i in own)
        assert all(first.ended_at_ns == second.started_at_ns for first, second in pairwise(own))
        if own:
            assert own[0].started_at_ns == WALL_NS + since_ns - MONOTONIC_NS


@given(st.lists(EVENT, max_size=40))
def test_ids_count_up_from_zero(events):
    intervals, lifetimes = play(events)
    for name in lifetimes:
        own = [i.id for i in intervals if i.replica == name]
        assert own == [f"{name}:{n}" for n in range(len(own))]


@given(st.lists(EVENT, max_size=30), st.data())
def test_repeated_news_change_nothing(events, data):
    """Every observation may come twice, and late ones come after the end."""
    twice = [event for what, n, step in events for event in ((what, n, step), (what, n, 0))]
    assert play(twice) == play(events)


@given(st.lists(EVENT, max_size=30), st.sampled_from(list(LeasePhase)))
def test_news_of_a_replica_that_has_ended_open_no_lease(events, phase):
    intervals, _ = play([*events, ("end", 0, 1), (phase, 0, 10), ("heartbeat", 0, 10)])
    before, _ = play([*events, ("end", 0, 1), ("heartbeat", 0, 20)])
    assert [i for i in intervals if i.replica == "embed-0"] == [i for i in before if i.replica == "embed-0"]


@given(st.lists(EVENT, max_size=30))
def test_heartbeats_change_no_total(events):
    def totals(intervals):
        sums = {}
        for i in intervals:
            sums[i.replica, i.phase] = sums.get((i.replica, i.phase), 0) + i.ended_at_ns - i.started_at_ns
        return sums

    beating = [e for event in events for e in (event, ("heartbeat", 0, 0))]
    quiet = [event if event[0] != "heartbeat" else ("end", 99, event[2]) for event in events]
    assert totals(play(beating)[0]) == totals(play(quiet)[0])


def test_a_clock_that_goes_back_loses_and_doubles_nothing():
    """Threads may deliver in another order than they looked at the clock."""
    tracker = LeaseTracker(WALL_NS, MONOTONIC_NS)
    assert tracker.observe(holder(0), LeasePhase.RESTORING, 100) == []
    (first,) = tracker.observe(holder(0), LeasePhase.RUNNING, 200)
    assert tracker.observe(holder(0), LeasePhase.IDLE, 150) == []
    (second,) = tracker.end("embed-0", 300)
    assert (first.phase, second.phase) == (LeasePhase.RESTORING, LeasePhase.IDLE)
    assert first.ended_at_ns == second.started_at_ns
    assert second.ended_at_ns - first.started_at_ns == 200


@given(st.lists(st.tuples(st.integers(1, 10**10), st.integers(-(10**15), 10**15)), max_size=20))
def test_a_calendar_that_is_set_makes_no_lease_longer_and_none_overlap(steps):
    tracker, now_ns, intervals = LeaseTracker(WALL_NS, MONOTONIC_NS), MONOTONIC_NS, []
    tracker.observe(holder(0), LeasePhase.IDLE, now_ns)
    for step_ns, jump_ns in steps:
        now_ns += step_ns
        tracker.set_calendar(WALL_NS + now_ns + jump_ns, now_ns)
        intervals += tracker.heartbeat(now_ns)
    assert sum(i.ended_at_ns - i.started_at_ns for i in intervals) == now_ns - MONOTONIC_NS
    assert all(first.ended_at_ns <= second.started_at_ns for first, second in pairwise(intervals))


def test_leases_follow_a_calendar_ahead_and_those_that_begin_then_wherever_it_is():
    tracker, hour_ns = LeaseTracker(WALL_NS, 0), 3600 * 10**9
    tracker.observe(holder(0), LeasePhase.IDLE, 0)
    tracker.set_calendar(WALL_NS + hour_ns, 10)
    (slept,) = tracker.heartbeat(10)
    assert (slept.started_at_ns, slept.ended_at_ns) == (WALL_NS + hour_ns - 10, WALL_NS + hour_ns)
    tracker.set_calendar(WALL_NS - hour_ns, 20)
    tracker.observe(holder(1), LeasePhase.IDLE, 20)
    old, new = tracker.heartbeat(30)
    assert (old.started_at_ns, new.started_at_ns) == (WALL_NS + hour_ns, WALL_NS - hour_ns)


def test_two_looks_at_the_clocks_are_never_at_once():
    tracker = LeaseTracker(WALL_NS, 0)
    tracker.observe(holder(0), LeasePhase.IDLE, 0)
    tracker.set_calendar(WALL_NS + 10**9 - 1, 0)
    assert tracker.heartbeat(10)[0].started_at_ns == WALL_NS


def test_an_interval_carries_the_holder():
    tracker = LeaseTracker(WALL_NS, MONOTONIC_NS)
    tracker.observe(holder(7), LeasePhase.RUNNING, 0)
    (interval,) = tracker.end("embed-7", 5)
    assert (interval.function, interval.namespace, interval.revision) == ("embed", "openfaas-fn", "1")
    assert (interval.tenant, interval.price_class, interval.device, interval.share) == (
        "default",
        "standard",
        "cpu",
        0.5,
    )


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=200))
def test_a_busy_replica_has_few_rows_and_exact_sums(steps):
    tracker, now_ns, spent = (
        LeaseTracker(WALL_NS, MONOTONIC_NS),
        MONOTONIC_NS,
        {LeasePhase.RUNNING: 0, LeasePhase.IDLE: 0},
    )
    phases = (LeasePhase.RUNNING, LeasePhase.IDLE)
    assert tracker.observe(holder(0), phases[0], now_ns) == []
    for n, step_ns in enumerate(steps):
        now_ns += step_ns
        spent[phases[n % 2]] += step_ns
        assert tracker.observe(holder(0), phases[(n + 1) % 2], now_ns) == []
    running, idle = tracker.heartbeat(now_ns)
    assert {i.phase: i.ended_at_ns - i.started_at_ns for i in (running, idle)} == spent


@given(st.lists(st.tuples(st.sampled_from(list(LeasePhase)), st.integers(0, 10**6)), min_size=1, max_size=50))
def test_what_is_looked_at_untold_is_what_will_be_told_and_changes_nothing(steps):
    tracker, now_ns = LeaseTracker(WALL_NS, MONOTONIC_NS), MONOTONIC_NS
    for phase, step_ns in steps:
        tracker.observe(holder(0), phase, now_ns)
        now_ns += step_ns
        looked = tracker.untold(now_ns)
        assert looked == tracker.untold(now_ns)
    assert looked == tracker.heartbeat(now_ns)
    assert tracker.untold(now_ns) == []


def test_other_phases_stand_where_they_were():
    tracker = LeaseTracker(0, 0)
    seen = [
        LeasePhase.RESTORING,
        LeasePhase.RUNNING,
        LeasePhase.IDLE,
        LeasePhase.PARKED,
        LeasePhase.RUNNING,
        LeasePhase.DRAINING,
    ]
    intervals = [i for at, phase in enumerate(seen) for i in tracker.observe(holder(0), phase, at * 10)]
    intervals += tracker.end("embed-0", 60)
    assert [(i.phase, i.started_at_ns, i.ended_at_ns) for i in intervals] == [
        (p, n * 10, n * 10 + 10) for n, p in enumerate(seen)
    ]


def test_the_ended_are_forgotten_some_day(monkeypatch):
    monkeypatch.setattr(leases, "_REMEMBERED", 2)
    tracker = LeaseTracker(0, 0)
    for n in range(50):
        tracker.observe(holder(n), LeasePhase.IDLE, n)
        tracker.end(f"embed-{n}", n)
    assert list(tracker._ended) == ["embed-48", "embed-49"]


@given(st.lists(st.tuples(EVENT, st.integers(0, 1)), max_size=30))
def test_each_gpu_is_held_from_when_it_is_told_until_the_next(events):
    """A replica that wakes on another GPU: no nanosecond is the wrong one's."""
    tracker = LeaseTracker(WALL_NS, MONOTONIC_NS)
    now_ns, on, intervals, expected = MONOTONIC_NS, None, [], {0: 0, 1: 0}
    for (what, _, step_ns), gpu in events:
        now_ns += step_ns
        if on is not None:
            expected[on] += step_ns
        if what == "heartbeat":
            intervals += tracker.heartbeat(now_ns)
        elif isinstance(what, LeasePhase):
            on = gpu
            intervals += tracker.observe(replace(holder(0), device=f"GPU-{gpu}"), what, now_ns)
    intervals += tracker.heartbeat(now_ns)
    for gpu, held_ns in expected.items():
        assert sum(i.ended_at_ns - i.started_at_ns for i in intervals if i.device == f"GPU-{gpu}") == held_ns
    assert [i.id for i in intervals] == [f"embed-0:{n}" for n in range(len(intervals))]
