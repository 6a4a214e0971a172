"""What a node's meter tells is what was held, whatever happens in whatever order, and whoever goes on from its state."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

from hypothesis import given, strategies as st

from adapter.agent.meter import Calendar, Meter
from adapter.policy.conservation import conserve
from adapter.policy.leases import Holder
from adapter.records import DeviceInterval, LeaseInterval, LeasePhase

WALL_NS, BOOT_NS = 1_800_000_000 * 10**9, 5_000 * 10**9
DEVICES = ("GPU-a", "GPU-b")
NODE = "node-1"


def holder(pod, device, share=1.0):
    return Holder(
        "embed", "default", "embed-1", f"embed-{pod}", "default", "standard", device=device, share=share, node=NODE
    )


def begun():
    return Meter(NODE, Calendar("boot-1", WALL_NS, BOOT_NS), "0a1b2c")


STEP_NS = st.integers(0, 30).map(lambda seconds: seconds * 10**9)
POD = st.integers(0, 3)
EVENT = st.one_of(
    st.tuples(st.just("hold"), POD, st.integers(0, 1), STEP_NS),
    st.tuples(st.just("release"), POD, STEP_NS),
    st.tuples(st.just("move"), POD, st.sampled_from([LeasePhase.IDLE, LeasePhase.RESTORING, LeasePhase.DRAINING]), STEP_NS),
    st.tuples(st.just("busy"), POD, st.integers(0, 200).map(lambda seconds: seconds * 10**9)),
    st.tuples(st.just("others"), st.sampled_from([0.0, 1.0])),
    st.tuples(st.just("tell")),
    st.tuples(st.just("restart")),
)  # fmt: skip


class Play:
    """Plays events on a meter and keeps what was true; a device has one holder at a time, as kubelets have it."""

    def __init__(self):
        self.meter, self.now_ns, self.records = begun(), BOOT_NS, []
        self.meter.present({DEVICES[0]: "H100", DEVICES[1]: "H100"}, self.now_ns)
        self.held = {}  # device -> pod
        self.spans = []  # [pod, device, since, until]
        self.restarts = False

    def do(self, step_ns, what, *details):
        self.now_ns += step_ns
        getattr(self, f"_{what}")(*details)

    def _hold(self, pod, number, ago_ns):
        device = DEVICES[number]
        if device in self.held or any(span[0] == pod for span in self.spans):
            return
        ends = [until for _, of, _, until in self.spans if of == device]
        since = max([self.now_ns - ago_ns, self.meter.told_ns, *ends])
        self.held[device] = pod
        self.spans.append([pod, device, since, None])
        self.meter.hold((str(pod), "main", device), holder(pod, device), LeasePhase.RESTORING, self.now_ns - ago_ns)

    def _release(self, pod, ago_ns):
        for span in self.spans:
            if span[0] == pod and span[3] is None:
                span[3] = max(self.now_ns - ago_ns, self.since_of(span))
                self.meter.release((str(pod), "main", span[1]), self.now_ns - ago_ns)
                del self.held[span[1]]

    def since_of(self, span):
        lease = self.meter._leases[str(span[0]), "main", span[1]]
        return lease.since_ns

    def _move(self, pod, phase, ago_ns):
        self.meter.move(str(pod), phase, self.now_ns - ago_ns)

    def _busy(self, pod, counter_ns):
        self.meter.busy(str(pod), counter_ns, self.now_ns)

    def _others(self, share):
        free = {device: share for device in DEVICES if device not in self.held}
        self.meter.others(free, self.now_ns)

    def _tell(self):
        self.records += self.meter.tell(self.now_ns)

    def _restart(self):
        self.meter = Meter.from_json(json.loads(json.dumps(self.meter.to_json())), NODE)

    def done(self):
        self._tell()
        for span in self.spans:
            span[3] = self.now_ns if span[3] is None else span[3]
        return self


def played(events):
    play = Play()
    for step_ns, event in events:
        play.do(step_ns, *event)
    return play.done()


EVENTS = st.lists(st.tuples(STEP_NS, EVENT), max_size=30)


@given(EVENTS)
def test_leases_are_what_was_held_without_gap_or_overlap(events):
    play = played(events)
    told = defaultdict(list)
    for record in play.records:
        if isinstance(record, LeaseInterval):
            told[record.replica, record.device].append(record)
    for pod, device, since_ns, until_ns in play.spans:
        own = told.pop((f"embed-{pod}", device), [])
        assert sum(i.ended_at_ns - i.started_at_ns for i in own) == until_ns - since_ns
        assert all(first.ended_at_ns == second.started_at_ns for first, second in pairwise(own))
        assert all(i.ended_at_ns > i.started_at_ns for i in own)
        if own:
            assert own[0].started_at_ns == WALL_NS + since_ns - BOOT_NS
    assert not told
    assert len({record.id for record in play.records}) == len(play.records)


@given(EVENTS)
def test_what_devices_tell_and_what_leases_tell_is_the_same(events):
    play = played(events)
    leases = [record for record in play.records if isinstance(record, LeaseInterval)]
    devices = [record for record in play.records if isinstance(record, DeviceInterval)]
    found = conserve(leases, devices, start_ns=WALL_NS, end_ns=WALL_NS + play.now_ns - BOOT_NS)
    assert found.findings == ()
    assert found.residual_ns == 0
    there_ns = sum(device.ended_at_ns - device.started_at_ns for device in devices)
    assert there_ns == len(DEVICES) * (play.now_ns - BOOT_NS)


@given(EVENTS, st.data())
def test_telling_later_changes_no_totals(events, data):
    def totals(records):
        sums = defaultdict(int)
        for record in records:
            if isinstance(record, LeaseInterval):
                sums[record.replica] += record.ended_at_ns - record.started_at_ns
        return dict(sums)

    seldom = [
        (step, event) if event[0] != "tell" or data.draw(st.booleans()) else (step, ("restart",))
        for step, event in events
    ]
    # An agent that tells less often knows of the same starts: none of them is longer ago than a telling.
    assert totals(played([(s, e if e[0] != "hold" else (*e[:3], 0)) for s, e in seldom]).records) == totals(
        played([(s, e if e[0] != "hold" else (*e[:3], 0)) for s, e in events]).records
    )


@given(EVENTS)
def test_another_process_goes_on_from_the_state_as_if_nothing_had_happened(events):
    never = [(step, ("others", 0.0) if event[0] == "restart" else event) for step, event in events]
    always = [pair for step, event in never for pair in ((step, event), (0, ("restart",)))]
    assert played(never).records == played(always).records


def test_busy_seconds_are_running_and_the_rest_is_idle():
    meter = begun()
    key = ("uid", "main", "GPU-a")
    meter.hold(key, holder(1, "GPU-a"), LeasePhase.RESTORING, BOOT_NS)
    meter.move("uid", LeasePhase.IDLE, BOOT_NS + 4)
    meter.busy("uid", 3, BOOT_NS + 10)
    told = [(i.phase.value, i.ended_at_ns - i.started_at_ns) for i in meter.tell(BOOT_NS + 10)]
    assert told == [("restoring", 4), ("idle", 3), ("running", 3)]
    meter.busy("uid", 5, BOOT_NS + 20)  # 2 more
    assert [(i.phase.value, i.ended_at_ns - i.started_at_ns) for i in meter.tell(BOOT_NS + 20)] == [
        ("idle", 8),
        ("running", 2),
    ]
    meter.busy("uid", 4, BOOT_NS + 30)  # it has begun anew
    assert [(i.phase.value, i.ended_at_ns - i.started_at_ns) for i in meter.tell(BOOT_NS + 30)] == [
        ("idle", 6),
        ("running", 4),
    ]
    meter.busy("uid", 10**9, BOOT_NS + 40)  # nobody is busy for longer than it was there
    assert [(i.phase.value, i.ended_at_ns - i.started_at_ns) for i in meter.tell(BOOT_NS + 40)] == [("running", 10)]


def test_a_counter_that_counted_before_anybody_looked_is_not_believed_at_first():
    meter = begun()
    meter.hold(("uid", "main", "GPU-a"), holder(1, "GPU-a"), LeasePhase.IDLE, BOOT_NS - 1000)
    meter.busy("uid", 900, BOOT_NS + 10)
    assert [i.phase for i in meter.tell(BOOT_NS + 10)] == [LeasePhase.IDLE]
    meter.busy("uid", 905, BOOT_NS + 20)
    assert [i.phase for i in meter.tell(BOOT_NS + 20)] == [LeasePhase.IDLE, LeasePhase.RUNNING]


def test_after_a_reboot_nothing_is_told_of_the_time_that_nobody_saw():
    meter = begun()
    meter.present({"GPU-a": "H100"}, BOOT_NS)
    key = ("uid", "main", "GPU-a")
    meter.hold(key, holder(1, "GPU-a"), LeasePhase.IDLE, BOOT_NS)
    before = meter.tell(BOOT_NS + 10)
    again = Meter.from_json(meter.to_json(), NODE)
    assert again.reboot(Calendar("boot-2", WALL_NS + 10**12, 7)) == []
    again.present({"GPU-a": "H100"}, 7)
    again.hold(key, holder(1, "GPU-a"), LeasePhase.RESTORING, 9)
    after = again.tell(20)
    assert [(i.started_at_ns, i.ended_at_ns) for i in after] == [
        (WALL_NS + 10**12 + 2, WALL_NS + 10**12 + 13),
        (WALL_NS + 10**12, WALL_NS + 10**12 + 13),
    ]
    assert len({record.id for record in before + after}) == 4


def test_a_device_that_goes_away_is_there_no_more_and_may_come_back():
    meter = begun()
    meter.present({"GPU-a": "H100"}, BOOT_NS)
    meter.present({}, BOOT_NS + 5)
    meter.present({"GPU-a": "H100"}, BOOT_NS + 6)
    first = meter.tell(BOOT_NS + 10)
    meter.present({"GPU-a": "H100"}, BOOT_NS + 12)
    second = meter.tell(BOOT_NS + 20)
    assert [i.ended_at_ns - i.started_at_ns for i in first + second] == [5, 8]
    assert [i.id for i in first + second] == ["GPU-a:0a1b2c.0", "GPU-a:0a1b2c.1"]
