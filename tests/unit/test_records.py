import json

import pytest

from adapter.records import Event, EventName, Phase, PhaseName, Rung, SkippedRung, StartRecord

RECORD = StartRecord(
    function="embed", namespace="openfaas-fn", revision="3", replica="embed-1", rung=Rung.RESTORE, started_at_ns=1_000_000,
    total_ns=300, phases=(Phase(PhaseName.BOOT, 0, 100), Phase(PhaseName.RESTORE, 100, 250), Phase(PhaseName.HANDOVER, 240, 300)),
    skipped=(SkippedRung(Rung.RESUME, "not-parked", "No replica is parked."),), held_requests=2,
)  # fmt: skip


def test_json_form_is_stable():
    data = json.loads(json.dumps(RECORD.to_json()))
    assert data["rung"] == "restore"
    assert data["phases"][1] == {"name": "restore", "start_ns": 100, "end_ns": 250}
    assert data["skipped"] == [{"rung": "resume", "code": "not-parked", "reason": "No replica is parked."}]
    assert data["version"] == 1
    assert StartRecord.from_json(data) == RECORD


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"rung": "fly"},
        {"phases": [{"name": "restore"}]},
        {"phases": 3},
        {"unknown": 1},
        {"skipped": [1]},
        {"skipped": [{"rung": "resume", "code": 1, "reason": ""}]},
        {"total_ns": "x"},
        {"total_ns": True},
        {"total_ns": 0.5},
        {"started_at_ns": -1},
        {"started_at_ns": 2**63},
        {"started_at_ns": float("inf")},
        {"held_requests": None},
        {"replica": 7},
        {"error": []},
        {"phases": [{"name": "restore", "start_ns": 0, "end_ns": "1"}]},
        {"phases": [{"name": "restore", "start_ns": -1, "end_ns": 1}]},
        {"rung": deep(5_000)},
    ],
)
def test_a_foreign_record_is_refused(change):
    with pytest.raises(ValueError, match=r".+"):
        StartRecord.from_json({**RECORD.to_json(), **change})


@pytest.mark.parametrize("data", [None, [], "record", 7])
def test_what_is_no_object_is_no_record(data):
    with pytest.raises(ValueError, match="not a start record"):
        StartRecord.from_json(data)


def test_a_record_without_a_field_is_refused():
    data = RECORD.to_json()
    del data["total_ns"]
    with pytest.raises(ValueError, match="not a start record"):
        StartRecord.from_json(data)


def test_covered_ratio_counts_overlaps_once():
    assert RECORD.covered_ratio == 1.0
    gap = StartRecord(
        "f", "n", "1", "r", Rung.LOAD, 0, 100, (Phase(PhaseName.IMPORT, 0, 30), Phase(PhaseName.LOAD, 20, 50))
    )
    assert gap.covered_ratio == 0.5


def test_host_time_becomes_the_first_phase():
    seen = RECORD.with_host_time(RECORD.started_at_ns - 50)
    assert seen.phases[0] == Phase(PhaseName.SCHEDULE, 0, 50)
    assert seen.total_ns == 350
    assert seen.phases[1] == Phase(PhaseName.BOOT, 50, 150)
    assert seen.started_at_ns + seen.total_ns == RECORD.started_at_ns + RECORD.total_ns


def test_a_host_whose_clock_is_behind_adds_nothing():
    assert RECORD.with_host_time(RECORD.started_at_ns + 10).total_ns == RECORD.total_ns


@pytest.mark.parametrize(
    "line",
    [
        b"", b"[]", b"{}", b"\xff", b'{"event": "nap", "at_ns": 1}', b'{"event": "serving", "at_ns": null}', b"7",
        b'{"event": "serving", "at_ns": 1e999}', b'{"event": "serving", "at_ns": -1}', b'{"event": "serving", "at_ns": 1.5}',
        b'{"event": "serving", "at_ns": 9223372036854775808}', b'{"event": "serving", "at_ns": 1' + b"0" * 9999 + b"}",
        b'{"event": ' + b"[" * 100_000, b'{"event": "serving", "at_ns": 1, "x": ' + b'{"x":' * 100_000,
    ],
)  # fmt: skip
def test_a_line_that_is_no_event_is_refused(line):
    with pytest.raises(ValueError, match="not an event"):
        Event.from_line(line)


def test_an_event_is_one_line():
    line = Event(EventName.FAILED, 7, {"reason": "two\nlines"}).to_line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")


def test_a_wait_for_a_gpu_comes_before_all_else():
    seen = RECORD.with_host_time(RECORD.started_at_ns - 50).with_gpu_wait(1000)
    assert seen.phases[:2] == (Phase(PhaseName.GPU_WAIT, 0, 1000), Phase(PhaseName.SCHEDULE, 1000, 1050))
    assert (seen.started_at_ns, seen.total_ns) == (RECORD.started_at_ns - 1050, 1350)
    assert seen.covered_ratio == 1.0
