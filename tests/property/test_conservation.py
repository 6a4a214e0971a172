"""GPU time adds up, and where it does not, it is said by how much and where."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import assume, given, strategies as st

from adapter.policy.activity import Run, activity
from adapter.policy.conservation import HOUR_NS, FindingKind, conserve
from adapter.records import DeviceInterval, LeaseInterval, LeasePhase

SECOND_NS = 10**9
BEGIN_NS = 500_000 * HOUR_NS
DEVICE, NODE = "GPU-5b1f", "node-1"


def lease(n, start_ns, end_ns, **changes):
    base = LeaseInterval(
        id=str(n), function="embed", namespace="default", revision="1", replica=f"embed-{n}", tenant=f"tenant-{n % 2}",
        price_class="standard", device=DEVICE, share=1.0, phase=LeasePhase.IDLE, started_at_ns=start_ns, ended_at_ns=end_ns,
        node=NODE,
    )  # fmt: skip
    return replace(base, **changes)


def present(n, start_ns, end_ns, held_ns, others_ns=0, **changes):
    base = DeviceInterval(str(n), NODE, DEVICE, "H100", start_ns, end_ns, held_ns, others_ns)
    return replace(base, **changes)


WHO = st.sampled_from(["function", "half", "others", "nobody", "down"])


@st.composite
def days(draw):
    """Leases and device intervals of one device, whose holder changes now and then: each told in pieces."""
    at_ns, leases, devices = BEGIN_NS + draw(st.integers(0, 3600)) * SECOND_NS, [], []
    for n, (who, seconds) in enumerate(draw(st.lists(st.tuples(WHO, st.integers(1, 5000)), min_size=1, max_size=8))):
        end_ns = at_ns + seconds * SECOND_NS
        edges = {at_ns, end_ns, *(at_ns + draw(st.integers(0, seconds)) * SECOND_NS for _ in range(3))}
        edges |= set(range((at_ns // HOUR_NS + 1) * HOUR_NS, end_ns, HOUR_NS))
        cuts = sorted(edges)
        for low, high in pairwise(cuts):
            length_ns = high - low
            share = {"function": 1.0, "half": 0.5}.get(who, 0.0)
            if share:
                leases.append(lease(n, low, high, share=share))
            if who != "down":
                others_ns = length_ns if who == "others" else 0
                devices.append(present(n, low, high, int(length_ns * share), others_ns))
        at_ns = end_ns
    return leases, devices, at_ns


@given(days())
def test_what_both_tell_alike_adds_up_to_the_capacity_of_every_hour(day):
    leases, devices, end_ns = day
    found = conserve(leases, devices, start_ns=BEGIN_NS, end_ns=end_ns)
    assert found.findings == ()
    for hour in found.hours:
        told_ns = sum(ns for _, ns in hour.tenants_ns)
        assert told_ns + hour.idle_ns + hour.others_ns + hour.down_ns == hour.capacity_ns
        assert hour.residual_ns == 0
        assert min(told_ns, hour.idle_ns, hour.others_ns, hour.down_ns) >= 0
    held_ns = sum(int(i.share * (i.ended_at_ns - i.started_at_ns)) for i in leases)
    assert sum(ns for hour in found.hours for _, ns in hour.tenants_ns) == held_ns


@given(days(), st.data())
def test_the_order_of_what_was_told_does_not_matter(day, data):
    leases, devices, end_ns = day
    shuffled = data.draw(st.permutations(leases)), data.draw(st.permutations(devices))
    assert conserve(*shuffled, start_ns=BEGIN_NS, end_ns=end_ns) == conserve(
        leases, devices, start_ns=BEGIN_NS, end_ns=end_ns
    )


@given(days(), st.data())
def test_a_lease_that_is_missing_is_the_residual_and_a_gap(day, data):
    leases, devices, end_ns = day
    assume(leases)
    lost = data.draw(st.sampled_from(leases))
    left = [each for each in leases if each is not lost]
    found = conserve(left, devices, start_ns=BEGIN_NS, end_ns=end_ns)
    lost_ns = int(lost.share * (lost.ended_at_ns - lost.started_at_ns))
    assert found.residual_ns == lost_ns
    [gap] = found.findings
    assert (gap.kind, gap.nanoseconds) == (FindingKind.GAP, lost_ns)
    assert gap.started_at_ns <= lost.started_at_ns < lost.ended_at_ns <= gap.ended_at_ns


@given(days(), st.data())
def test_two_who_hold_one_device_at_once_are_named(day, data):
    leases, devices, end_ns = day
    whole = [each for each in leases if each.share == 1.0]
    assume(whole)
    twice = data.draw(st.sampled_from(whole))
    second = replace(twice, id="second", replica="thief")
    found = conserve([*leases, second], devices, start_ns=BEGIN_NS, end_ns=end_ns)
    length_ns = twice.ended_at_ns - twice.started_at_ns
    assert found.residual_ns == length_ns
    [overlap] = found.findings
    assert (overlap.kind, overlap.nanoseconds) == (FindingKind.OVERLAP, length_ns)
    assert overlap.replicas == tuple(sorted({twice.replica, "thief"}))


def test_leases_of_a_device_that_was_not_there_or_is_another_nodes_are_named():
    low, high = BEGIN_NS, BEGIN_NS + HOUR_NS
    stray = lease(1, low, low + 5 * SECOND_NS, device="GPU-none")
    foreign = lease(2, low, low + 5 * SECOND_NS, node="node-2")
    rows = [present(0, low, low + 5 * SECOND_NS, 5 * SECOND_NS), present(1, low + 5 * SECOND_NS, high, 0)]
    found = conserve([stray, foreign], rows, start_ns=low, end_ns=high)
    assert [(f.kind, f.device, f.replicas) for f in found.findings] == [
        (FindingKind.MISMATCH, DEVICE, ("embed-2",)),
        (FindingKind.MISMATCH, "GPU-none", ("embed-1",)),
    ]
    assert found.residual_ns == 0


def test_a_lease_of_time_in_which_nobody_held_the_device_is_named():
    low, high = BEGIN_NS, BEGIN_NS + HOUR_NS
    found = conserve([lease(1, low, low + 5 * SECOND_NS)], [present(0, low, high, 0)], start_ns=low, end_ns=high)
    [finding] = found.findings
    assert (finding.kind, finding.nanoseconds, finding.replicas) == (FindingKind.MISMATCH, 5 * SECOND_NS, ("embed-1",))
    assert found.residual_ns == 5 * SECOND_NS


def test_an_hour_between_in_which_a_device_was_away_is_down_and_later_ones_are_none():
    rows = [present(0, BEGIN_NS, BEGIN_NS + HOUR_NS, 0), present(1, BEGIN_NS + 2 * HOUR_NS, BEGIN_NS + 3 * HOUR_NS, 0)]
    found = conserve([], rows, start_ns=BEGIN_NS, end_ns=BEGIN_NS + 24 * HOUR_NS)
    assert [(hour.idle_ns, hour.down_ns) for hour in found.hours] == [(HOUR_NS, 0), (0, HOUR_NS), (HOUR_NS, 0)]


def test_replicas_without_a_gpu_have_no_part_in_it():
    assert conserve([lease(0, 1, 5, device="cpu")], [], start_ns=0, end_ns=9).findings == ()


INTERVALS = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 50)), max_size=12)


@given(INTERVALS, st.integers(0, 20))
def test_busy_intervals_cover_what_was_busy_and_stand_apart(spans, resolution_ns):
    runs = [Run("n", "f", start, start + length) for start, length in sorted(spans)]
    found = activity(runs, [], resolution_ns=resolution_ns)
    if not runs:
        assert found == []
        return
    [one] = found
    assert all(any(low <= run.started_at_ns and run.ended_at_ns <= high for low, high in one.busy) for run in runs)
    assert all(second[0] - first[1] > resolution_ns for first, second in pairwise(one.busy))
    assert one.last_busy_end_ns == max(run.ended_at_ns for run in runs)
