"""Who holds what, by what Kubernetes says, round after round; and never for longer than a round could not see."""

from __future__ import annotations

from dataclasses import replace

from adapter.agent.kubelet import Allocation
from adapter.agent.meter import Calendar, Meter
from adapter.agent.observe import Now, observe, still_there
from adapter.agent.pods import Container, Pod, intent_of
from adapter.policy.conservation import conserve
from adapter.records import DeviceInterval, LeaseInterval, LeasePhase

SECOND_NS = 10**9
WALL_S, BOOT_S = 1_800_000_000, 5_000
GPU, OTHER = "GPU-a", "GPU-b"


def at(seconds, step_s=0):
    """An instant so long after the beginning; the wall clock may have been stepped."""
    return Now((BOOT_S + seconds) * SECOND_NS, (WALL_S + seconds + step_s) * SECOND_NS)


def wall(seconds):
    return (WALL_S + seconds) * SECOND_NS


def pod(uid="1", *, started=None, finished=None, restarts=0, gpus=1, labels=None, **changes):
    containers = (
        []
        if started is None
        else [Container("main", wall(started), wall(finished) if finished is not None else 0, restarts, True)]
    )
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    base = Pod(
        uid=uid, name=f"embed-{uid}", namespace="acme", ip="10.0.0.1", created_at_ns=wall(0), admitted_at_ns=0, scheduled_at_ns=wall(0),
        deleted_at_ns=0, is_over=False, containers=tuple(containers),
        body={
            "metadata": {"name": f"embed-{uid}", "labels": labels or {"gpufn.dev/function": "embed"}, "annotations": {"gpufn.dev/price-class": "gold"}},
            "spec": {"containers": [{"name": "main", "resources": {"limits": limits}}]},
        },
    )  # fmt: skip
    return replace(base, **changes)


def allocation(**held):
    """Pod UID → device."""
    return Allocation(
        {("acme", f"embed-{uid[1:]}", "main"): {device: 1.0} for uid, device in held.items()}, {GPU: 1.0, OTHER: 1.0}
    )


class Node:
    def __init__(self):
        self.meter = Meter("node-1", Calendar("boot-1", WALL_S * SECOND_NS, BOOT_S * SECOND_NS), "abc")
        self.records = []

    def round(self, now, *pods, given=None):
        by_uid = {one.uid: one for one in pods}
        intents = {uid: intent for uid, one in by_uid.items() if (intent := intent_of(one, {}))}
        observe(self.meter, by_uid, intents, given, {GPU: "H100", OTHER: "H100"}, now)
        return self

    def tell(self, now):
        self.records += self.meter.tell(now.boot_ns)
        return self

    def leases(self):
        return [record for record in self.records if isinstance(record, LeaseInterval)]

    def spans(self):
        """Device → (start, end) of every lease's intervals in seconds, what touches as one."""
        found = {}
        for record in self.leases():
            start, end = (ns / SECOND_NS - WALL_S for ns in (record.started_at_ns, record.ended_at_ns))
            known = found.setdefault((record.replica, record.device), [])
            if known and known[-1][1] == start:
                known[-1] = (known[-1][0], end)
            else:
                known.append((start, end))
        return found

    def adds_up(self, until):
        devices = [record for record in self.records if isinstance(record, DeviceInterval)]
        found = conserve(self.leases(), devices, start_ns=wall(0), end_ns=wall(until))
        return found.residual_ns == 0 and not found.findings


def test_a_lease_lasts_from_its_containers_start_to_its_end():
    node, given = Node(), allocation(u1=GPU)
    node.round(at(10), pod(), given=given)
    node.round(at(20), pod(started=15), given=given).tell(at(20))
    node.round(at(30), pod(started=15), given=given)
    node.round(at(42), pod(started=15, finished=40, is_over=True), given=Allocation({}, given.shares)).tell(at(42))
    assert node.spans() == {("embed-1-1", GPU): [(15, 40)]}
    assert node.leases()[0].price_class == "gold"
    assert node.adds_up(42)


def test_a_replica_without_a_gpu_holds_its_place():
    node = Node()
    node.round(at(20), pod(started=15, gpus=0), given=allocation()).tell(at(20))
    assert node.spans() == {("embed-1-1", "cpu"): [(15, 20)]}


def test_a_gpu_that_the_kubelet_does_not_name_counts_all_the_same_and_once():
    node = Node()
    node.round(at(20), pod(started=15, gpus=2), given=allocation()).tell(at(20))
    node.round(at(30), pod(started=15, gpus=2), given=allocation(u1=GPU))
    node.round(at(32), pod(started=15, gpus=2), given=allocation()).tell(at(40))
    assert node.spans() == {("embed-1-1", "unknown"): [(15, 30)], ("embed-1-1", GPU): [(30, 40)]}
    assert {lease.device: lease.share for lease in node.leases()} == {"unknown": 2.0, GPU: 1.0}


def test_while_the_kubelet_says_nothing_who_holds_goes_on_and_who_comes_waits():
    node, given = Node(), allocation(u1=GPU, u2=OTHER)
    node.round(at(10), pod(started=5), given=given)
    node.round(at(20), pod(started=5), pod("2", started=15), given=None).tell(at(20))
    assert node.spans() == {("embed-1-1", GPU): [(5, 20)]}
    node.round(at(22), pod(started=5), pod("2", started=15), given=given).tell(at(30))
    assert node.spans()["embed-2-2", OTHER] == [(20, 30)]


def test_a_container_that_is_started_again_has_kept_its_gpu():
    node, given = Node(), allocation(u1=GPU)
    node.round(at(10), pod(started=5), given=given)
    node.round(at(20), pod(started=5, finished=12, restarts=0), given=given)
    node.round(at(60), pod(started=55, restarts=1), given=given).tell(at(60))
    assert node.spans() == {("embed-1-1", GPU): [(5, 60)]}


def test_it_drains_from_when_somebody_asked_for_its_end():
    node, given = Node(), allocation(u1=GPU)
    node.round(at(10), pod(started=5), given=given)
    node.meter.move("1", LeasePhase.IDLE, at(8).boot_ns)
    node.round(at(20), pod(started=5, deleted_at_ns=wall(14)), given=given)
    node.meter.move("1", LeasePhase.IDLE, at(18).boot_ns)
    node.round(at(26), pod(started=5, deleted_at_ns=wall(14), finished=25), given=given).tell(at(26))
    times = [(lease.phase.value, (lease.ended_at_ns - lease.started_at_ns) // SECOND_NS) for lease in node.leases()]
    assert times == [("restoring", 3), ("idle", 6), ("draining", 11)]


def test_one_that_vanishes_held_until_it_was_seen_no_more_and_the_next_one_from_there():
    node = Node()
    node.round(at(10), pod(started=5), given=allocation(u1=GPU))
    node.round(at(20), pod("2", started=12), given=allocation(u2=GPU)).tell(at(30))
    assert node.spans() == {("embed-1-1", GPU): [(5, 20)], ("embed-2-2", GPU): [(20, 30)]}
    assert node.adds_up(30)


def test_a_successor_on_the_same_gpu_does_not_overlap_whatever_whole_seconds_say():
    node = Node()
    node.round(at(10), pod(started=5), given=allocation(u1=GPU)).tell(at(10))  # told up to 10
    ended = pod(started=5, finished=9, is_over=True)
    node.round(at(11), ended, pod("2", started=9), given=allocation(u2=GPU)).tell(at(20))
    assert node.spans() == {("embed-1-1", GPU): [(5, 10)], ("embed-2-2", GPU): [(10, 20)]}
    assert node.adds_up(20)


def test_one_that_came_and_went_between_two_rounds_held_what_it_held():
    node = Node()
    node.round(at(10), given=allocation()).tell(at(10))
    node.round(at(20), pod(started=12, finished=17, is_over=True), given=allocation())
    node.round(at(22), pod(started=12, finished=17, is_over=True), given=allocation()).tell(at(22))
    node.round(at(30), pod(started=12, finished=17, is_over=True), given=allocation()).tell(at(30))
    assert node.spans() == {("embed-1-1", "unknown"): [(12, 17)]}


def test_pods_that_are_no_functions_hold_what_nobody_pays_for_here():
    node, given = Node(), allocation(u1=GPU, u2=OTHER)
    job = pod("2", started=5, labels={"app": "training"})
    node.round(at(10), pod(started=5), job, given=given)
    node.round(at(20), pod(started=5), job, given=given).tell(at(20))
    assert node.spans() == {("embed-1-1", GPU): [(5, 20)]}
    found = {record.device: record for record in node.records if isinstance(record, DeviceInterval)}
    assert (found[GPU].held_ns, found[GPU].others_ns) == (15 * SECOND_NS, 0)
    assert (found[OTHER].held_ns, found[OTHER].others_ns) == (0, 10 * SECOND_NS)


def test_a_step_of_the_wall_clock_makes_nothing_longer_and_nothing_shorter():
    for step_s in (3600, -3600):
        node, given = Node(), allocation(u1=GPU, u2=OTHER)
        node.round(at(10), pod(started=5), given=given).tell(at(10))
        # From here on the kubelet's times are stepped, as are its clock and ours.
        late = pod("2", started=15 + step_s)
        node.round(at(20, step_s), pod(started=5), late, given=given).tell(at(20, step_s))
        ended = pod(started=5, finished=25 + step_s, is_over=True)
        node.round(at(30, step_s), ended, late, given=allocation(u2=OTHER)).tell(at(30, step_s))
        assert node.spans() == {("embed-1-1", GPU): [(5, 25)], ("embed-2-2", OTHER): [(15, 30)]}
        assert node.adds_up(30)


def test_while_the_api_server_is_silent_who_has_no_gpu_any_more_is_gone():
    node, given = Node(), allocation(u1=GPU)
    pods = {one.uid: one for one in (pod(started=5), pod("2", started=5, gpus=0))}
    node.round(at(10), *pods.values(), given=given)
    assert still_there(pods, given, node.meter.held()) == pods
    assert list(still_there(pods, allocation(), node.meter.held())) == ["2"]
