"""A spool loses nothing that it took and tells nothing that it did not take, wherever its writer dies."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapter.agent import spool as module
from adapter.agent.spool import FILE_NAME, Spool
from adapter.errors import Conflict, Overloaded, StorageError
from adapter.ledger.server import BODY_LIMIT_BYTES
from adapter.ledger.wire import to_line

REPOSITORY = Path(__file__).parents[3]


def record(n):
    return {"kind": "lease", "n": n}


def numbers(spool):
    """What waits, as (number, n)."""
    return [(seq, each["n"]) for seq, each in spool.pending(10**9, 10**12)]


@pytest.fixture
def spool(tmp_path):
    return Spool.open(tmp_path)


def reopened(spool, folder):
    spool.close()
    return Spool.open(folder)


def test_what_was_appended_waits_in_order_until_it_is_acknowledged(spool):
    spool.append([record(1), record(2)], {"at": 1})
    spool.append([], {"at": 2})
    spool.append([record(3)], {"at": 3})
    assert numbers(spool) == [(1, 1), (2, 2), (3, 3)]
    assert (spool.unacked, spool.state) == (3, {"at": 3})
    spool.ack(1)
    assert (numbers(spool), spool.unacked) == ([(2, 2), (3, 3)], 2)
    spool.ack(99)
    assert (numbers(spool), spool.unacked) == ([], 0)
    spool.append([record(4)], {})
    assert numbers(spool) == [(4, 4)]


def test_some_of_what_waits_can_be_asked_for(spool):
    for n in range(1, 6):
        spool.append([record(n), record(-n)], {})
    assert [seq for seq, _ in spool.pending(5)] == [1, 2, 3, 4]
    assert [seq for seq, _ in spool.pending(1)] == [1, 2]


def large(n, size=300_000):
    return record(n) | {"pad": "x" * size}


def test_what_waits_is_given_in_parts_that_a_ledger_takes(spool):
    spool.append([large(n) for n in range(1, 31)], {"at": 1})
    taken = []
    while waiting := spool.pending():
        assert sum(len(to_line(seq, each)) for seq, each in waiting) < BODY_LIMIT_BYTES
        taken += [(seq, each["n"]) for seq, each in waiting]
        spool.ack(waiting[-1][0])
    assert taken == [(n, n) for n in range(1, 31)]
    assert spool.state == {"at": 1}


def test_a_frame_that_could_not_be_read_again_is_not_written(tmp_path, spool):
    spool.append([record(1)], {"at": 1})
    with pytest.raises(StorageError):
        spool.append([record(2)], {"at": "x" * 17 * 2**20})
    with pytest.raises(StorageError):
        spool.append([large(2, 17 * 2**20)], {"at": 2})
    again = reopened(spool, tmp_path)
    assert (numbers(again), again.state, again.dropped_bytes) == ([(1, 1)], {"at": 1}, 0)
    again.close()


def test_cut_anywhere_in_what_was_appended_in_several_frames_it_has_none_of_them(tmp_path):
    whole = tmp_path / "whole"
    spool = Spool.open(whole)
    spool.append([record(1)], {"at": 1})
    before = spool.size_bytes
    spool.append([large(n, 700_000) for n in range(2, 6)], {"at": 2})
    spool.close()
    data = (whole / FILE_NAME).read_bytes()
    assert len(spool._frames) == 1 + 4
    for length in [*(frame.offset for frame in spool._frames[1:]), spool._frames[-1].offset + 9, len(data) - 1]:
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / FILE_NAME).write_bytes(data[:length])
        cut = Spool.open(folder)
        assert (numbers(cut), cut.state, cut.size_bytes) == ([(1, 1)], {"at": 1}, before)
        cut.append([record(77)], {"at": 77})
        again = reopened(cut, folder)
        assert numbers(again) == [(1, 1), (2, 77)]
        again.close()


def test_another_process_may_not_have_it(tmp_path, spool):
    with pytest.raises(Conflict):
        Spool.open(tmp_path)


def test_what_is_no_spool_is_begun_anew(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"something else")
    spool = Spool.open(tmp_path)
    assert (spool.state, spool.dropped_bytes) == (None, 14)
    spool.append([record(1)], {})
    assert numbers(reopened(spool, tmp_path)) == [(1, 1)]


def test_cut_at_every_byte_it_is_what_it_was_before_or_after_a_frame(tmp_path):
    whole = tmp_path / "whole"
    spool = Spool.open(whole)
    sizes = [spool.size_bytes]
    for n in range(1, 4):
        spool.append([record(n)], {"at": n})
        sizes.append(spool.size_bytes)
    spool.close()
    data = (whole / FILE_NAME).read_bytes()
    for length in range(len(data) + 1):
        folder = tmp_path / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / FILE_NAME).write_bytes(data[:length])
        frames = sum(size <= length for size in sizes[1:])
        cut = Spool.open(folder)
        assert cut.state == ({"at": frames} if frames else None)
        assert numbers(cut) == [(n, n) for n in range(1, frames + 1)]
        cut.append([record(77)], {"at": 77})
        again = reopened(cut, folder)
        assert numbers(again)[-1] == (frames + 1, 77)
        again.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_byte_drops_what_is_behind_it_and_never_makes_something_up(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool.open(folder)
    sizes = []
    for n in range(1, 5):
        spool.append([record(n)], {"at": n})
        sizes.append(spool.size_bytes)
    spool.close()
    path = folder / FILE_NAME
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(8, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    damaged = Spool.open(folder)
    whole = sum(size <= at for size in sizes)
    assert numbers(damaged) == [(n, n) for n in range(1, whole + 1)]
    assert damaged.dropped_bytes == len(content) - ([8, *sizes][whole])
    damaged.close()


class _Machine(RuleBasedStateMachine):
    """A spool against a list, with restarts anywhere."""

    @initialize(folder=st.uuids())
    def open(self, folder):
        self.folder = Path(f"/dev/shm/gpufn-spool-{os.getpid()}-{folder}")
        self.spool = Spool.open(self.folder)
        self.told, self.acked, self.state = [], 0, None

    @rule(count=st.integers(0, 3), size=st.sampled_from([0, 0, 0, 200_000, 600_000]))
    def append(self, count, size):
        records = [{"n": len(self.told) + n, "pad": "x" * size} for n in range(count)]
        self.state = {"told": len(self.told) + count}
        self.spool.append(records, self.state)
        self.told += records

    @rule(part=st.integers(0, 4))
    def ack(self, part):
        waiting = self.spool.pending()
        if waiting:
            self.acked = waiting[min(part, len(waiting) - 1)][0]
            self.spool.ack(self.acked)

    @rule()
    def die(self):
        os.close(self.spool._fd)
        self.spool = Spool.open(self.folder)
        before = self.acked
        self.acked = self.spool.pending()[0][0] - 1 if self.spool.unacked else len(self.told)
        assert self.acked <= max(before, len(self.told))

    @invariant()
    def waits_for_the_rest(self):
        if hasattr(self, "spool"):
            seen = numbers(self.spool)
            assert seen == [(n + 1, n) for n in range(self.acked, len(self.told))]
            assert self.spool.unacked == len(seen)
            assert self.spool.state == self.state

    def teardown(self):
        if hasattr(self, "spool"):
            self.spool.close()
            shutil.rmtree(self.folder)


TestAnyOrder = _Machine.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_it_shrinks_once_the_ledger_has_most_of_it(tmp_path, spool):
    for n in range(1, 40):
        spool.append([record(n) | {"pad": "x" * 100_000}], {"at": n})
    spool.ack(38)
    assert spool.size_bytes < 200_000
    assert (tmp_path / FILE_NAME).stat().st_size == spool.size_bytes
    again = reopened(spool, tmp_path)
    assert (numbers(again), again.state) == ([(39, 39)], {"at": 39})
    again.append([record(40)], {})
    assert numbers(again) == [(39, 39), (40, 40)]
    again.close()


def test_what_was_acknowledged_waits_no_more_after_an_orderly_end(tmp_path, spool):
    spool.append([record(1)], {"at": 1})
    spool.append([record(2)], {"at": 2})
    spool.ack(1)
    again = reopened(spool, tmp_path)
    assert (numbers(again), again.state) == ([(2, 2)], {"at": 2})
    again.close()


def test_at_its_bound_it_refuses_and_keeps_what_it_has(tmp_path):
    spool = Spool.open(tmp_path, 10_000)
    with pytest.raises(Overloaded) as caught:
        for n in range(1, 100):
            spool.append([record(n) | {"pad": "x" * 1000}], {"at": n})
    assert caught.value.code == "spool-full"
    assert spool.is_full
    assert (tmp_path / FILE_NAME).stat().st_size <= 10_000
    spool.ack(spool.unacked)
    spool.append([record(100)], {})
    assert not spool.is_full
    for n in range(101, 110):  # there is room again
        spool.append([record(n) | {"pad": "x" * 1000}], {})
        spool.ack(10**9)
    assert numbers(spool) == []
    spool.close()


@pytest.fixture
def small_disk():
    """Files of this process end after 10,000 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_nothing_by_halves(tmp_path, small_disk):
    spool = Spool.open(tmp_path)
    with pytest.raises(StorageError):
        for n in range(1, 100):
            spool.append([record(n) | {"pad": "x" * 700}], {"at": n})
    taken = spool.unacked
    assert numbers(spool) == [(n, n) for n in range(1, taken + 1)]
    small_disk()
    spool.append([record(taken + 1)], {"at": -1})
    again = reopened(spool, tmp_path)
    assert numbers(again) == [(n, n) for n in range(1, taken + 2)]
    assert (again.state, again.dropped_bytes) == ({"at": -1}, 0)
    again.close()


def test_what_the_disk_has_damaged_holds_up_nothing_else(tmp_path, spool, caplog):
    for n in range(1, 4):
        spool.append([record(n)], {"at": n})
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.seek(spool._frames[1].offset + 10)
        file.write(b"\xff")
    assert numbers(spool) == [(1, 1), (3, 3)]
    assert "are lost" in caplog.text
    assert spool.unacked == 2
    again = reopened(spool, tmp_path)
    assert (numbers(again), again.state) == ([(1, 1), (3, 3)], {"at": 3})
    again.close()


def test_a_sync_that_fails_is_no_success(tmp_path, spool, monkeypatch):
    spool.append([record(1)], {"at": 1})

    def fail(_fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module.os, "fdatasync", fail)
    with pytest.raises(StorageError):
        spool.append([record(2)], {"at": 2})
    monkeypatch.undo()
    spool.append([record(3)], {"at": 3})
    assert numbers(spool) == [(1, 1), (2, 3)]


def test_a_folder_that_cannot_be_synced_does_not_part_it_from_its_file(tmp_path, monkeypatch):
    spool = Spool.open(tmp_path)
    spool.append([record(1)], {"at": 1})

    def fail(_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module, "sync", fail)
    spool._compact()
    monkeypatch.undo()
    spool.append([record(2)], {"at": 2})
    os.close(spool._fd)  # killed
    again = Spool.open(tmp_path)
    assert numbers(again) == [(1, 1), (2, 2)]
    again.close()


_WRITER = """
import sys
from pathlib import Path
from adapter.agent.spool import Spool
spool = Spool.open(Path(sys.argv[1]), 10**9)
n = (spool.state or {"n": 0})["n"]
while True:
    n += 1
    spool.append([{"n": n}], {"n": n})
    print(n, flush=True)
    if n % 7 == 0:
        spool.ack(spool.pending()[0][0])
    if n % 50 == 0:
        spool.ack(n)
        spool._compact()
"""


def test_killed_in_the_middle_of_it_again_and_again_it_loses_nothing_that_was_said_to_be_kept(tmp_path):
    said = 0
    for round_ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert writer.stdout is not None
        for _ in range(20 + 17 * round_):
            said = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        for line in writer.communicate()[0].split():
            said = int(line)
        spool = Spool.open(tmp_path)
        assert spool.state is not None
        kept = spool.state["n"]
        assert kept in (said, said + 1)
        assert [(seq, n) for seq, n in numbers(spool) if seq != n] == []
        assert not spool.unacked or numbers(spool)[-1] == (kept, kept)
        spool.close()
