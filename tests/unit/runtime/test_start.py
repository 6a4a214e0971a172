"""A start record accounts for the whole wall time, one row a phase."""

import time

from adapter.errors import HandlerError, SnapshotError
from adapter.records import PhaseName, Rung
from adapter.replica import ReplicaSettings
from adapter.runtime.ladder import Step
from adapter.runtime.start import Start


def begun(*rungs):
    return Start(ReplicaSettings(), time.monotonic_ns(), [Step(rung) for rung in rungs], [])


def names(record):
    return [phase.name for phase in record.phases]


def test_a_plain_start_is_covered_and_boots_once():
    start = begun(Rung.LOAD)
    start.next_step()
    start.launched()
    at = time.monotonic_ns()
    start.reported(PhaseName.IMPORT, at + 100, at + 200)
    start.reported(PhaseName.LOAD, at + 200, at + 300)
    start.woke()
    start.handed_over()
    start.answered()
    record = start.record()
    assert names(record) == [
        PhaseName.BOOT, PhaseName.IMPORT, PhaseName.LOAD, PhaseName.HANDOVER, PhaseName.FIRST_RESPONSE
    ]  # fmt: skip
    assert record.covered_ratio == 1.0


def test_a_rung_that_failed_is_named_and_its_time_counts():
    start = begun(Rung.RESTORE, Rung.LOAD)
    start.next_step()
    start.launched()
    start.failed(SnapshotError("CRIU could not restore the process.", why="Can't fork.", code="restore-failed"))
    assert start.next_step().rung is Rung.LOAD
    start.launched()
    start.handed_over()
    record = start.record()
    assert [(s.rung, s.code, s.reason) for s in record.skipped] == [
        (Rung.RESTORE, "restore-failed", "CRIU could not restore the process. Can't fork.")
    ]
    assert PhaseName.RESTORE in names(record)
    assert record.covered_ratio == 1.0


def test_when_all_rungs_failed_the_record_says_why():
    start = begun(Rung.LOAD)
    start.next_step()
    start.failed(HandlerError("The function's `load` failed.", why="It raised ValueError."))
    assert start.next_step() is None
    assert "ValueError" in start.record(start.last_error).error
