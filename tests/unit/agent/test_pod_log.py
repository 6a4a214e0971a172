"""Events in a container's log, however the runtime cut, rotated or has not written it yet."""

from __future__ import annotations

import gzip
import shutil
from itertools import chain

import pytest
from hypothesis import given, strategies as st

from adapter.agent.pod_log import PodLog, log_folder
from adapter.records import Event, EventName

T = b"2026-11-25T22:51:31.123456789Z"


def line(text, tag=b"F", stream=b"stdout"):
    return b" ".join((T, stream, tag, text)) + b"\n"


def event(n):
    return Event(EventName.LISTENING, n, {"port": 8080})


def said(n):
    return line(event(n).to_line().strip())


@pytest.fixture
def folder(tmp_path):
    folder = log_folder("acme", "embed-x", "uid", "main", tmp_path)
    folder.mkdir(parents=True)
    assert folder == tmp_path / "acme_embed-x_uid" / "main"
    return folder


@pytest.fixture
def log(folder):
    log = PodLog(folder)
    yield log
    log.close()


def times(events):
    return [found.at_ns for found in events]


def test_each_event_is_told_once_as_it_comes(folder, log):
    assert log.read(0) == []
    with (folder / "0.log").open("ab", buffering=0) as file:
        file.write(line(b"hello") + said(1))
        assert log.read(0) == [event(1)]
        assert log.read(0) == []
        file.write(said(2)[:40])
        assert log.read(0) == []
        file.write(said(2)[40:] + said(3))
        assert times(log.read(0)) == [2, 3]


def test_a_rotated_file_is_read_to_its_end_and_the_new_one_from_its_beginning(folder, log):
    with (folder / "0.log").open("ab", buffering=0) as file:
        file.write(said(1))
        assert times(log.read(0)) == [1]
        file.write(said(2))
        (folder / "0.log").rename(folder / "0.log.20261125-225131")
        file.write(said(3))
    (folder / "0.log").write_bytes(said(4))
    assert times(log.read(0)) == [2, 3, 4]
    assert log.read(0) == []


def test_one_that_comes_later_reads_what_is_still_there(folder, log):
    (folder / "0.log.20261125-100000.gz").write_bytes(gzip.compress(said(1)))
    (folder / "0.log.20261125-110000").write_bytes(said(2))
    (folder / "0.log.20261125-120000").write_bytes(said(3))
    (folder / "0.log").write_bytes(said(4))
    assert times(log.read(0)) == [2, 3, 4]


def test_between_the_rotation_and_the_new_file_nothing_is_lost(folder, log):
    (folder / "0.log").write_bytes(said(1))
    log.read(0)
    (folder / "0.log").rename(folder / "0.log.20261125-225131")
    assert log.read(0) == []
    (folder / "0.log").write_bytes(said(2))
    assert times(log.read(0)) == [2]


def test_a_container_that_was_started_again_has_another_file(folder, log):
    (folder / "0.log").write_bytes(said(1))
    assert times(log.read(0)) == [1]
    with (folder / "0.log").open("ab") as file:
        file.write(said(2))
    (folder / "1.log").write_bytes(said(3))
    assert times(log.read(1)) == [2, 3]
    assert log.read(1) == []


def test_when_the_folder_is_gone_there_are_no_events(folder, log):
    (folder / "0.log").write_bytes(said(1))
    log.read(0)
    shutil.rmtree(folder.parent)
    assert log.read(0) == []
    assert log.read(1) == []


def test_a_line_that_the_runtime_cut_is_put_together(folder, log):
    text = event(7).to_line().strip()
    (folder / "0.log").write_bytes(line(text[:10], b"P") + line(text[10:20], b"P") + line(text[20:]) + said(8))
    assert times(log.read(0)) == [7, 8]


def test_the_middle_of_a_functions_long_line_is_no_event(folder, log):
    forged = event(7).to_line().strip()
    (folder / "0.log").write_bytes(line(b"x" * 100, b"P") + line(forged) + said(8))
    assert times(log.read(0)) == [8]


@pytest.mark.parametrize(
    "forged",
    [
        line(event(7).to_line().strip(), stream=b"stderr"),
        line(b'{"event": "listening"'),
        line(b'{"event": "invoiced", "at_ns": 7}'),
        line(b'{"event": "listening", "at_ns": "x"}'),
        line(b' {"event": "listening", "at_ns": 7}'),
        line(b'{"event": "listening", "at_ns": 7, "port": "' + b"x" * 70_000 + b'"}'),
        b"\n",
        b"no line of a runtime\n",
        line(b'{"event"' + b"x" * 8_000, b"P") * 20 + line(b"}"),
    ],
)
def test_what_is_no_event_as_a_whole_is_none_and_hides_none(folder, log, forged):
    (folder / "0.log").write_bytes(said(1) + forged + said(2))
    assert times(log.read(0)) == [1, 2]


def test_one_that_writes_a_lot_is_read_over_several_rounds_in_order_and_to_its_end(folder, log):
    noise = line(b"x" * 1000) * 2000
    (folder / "0.log.20261125-110000").write_bytes(said(1) + noise + said(2))
    (folder / "0.log.20261125-120000").write_bytes(said(3) + noise + said(4))
    (folder / "0.log").write_bytes(said(5) + noise + said(6))
    (folder / "1.log").write_bytes(said(7))
    rounds = [times(log.read(1)) for _ in range(10)]
    assert rounds[0] == [1]
    assert list(chain(*rounds)) == [1, 2, 3, 4, 5, 6, 7]
    with (folder / "1.log").open("ab") as file:
        file.write(noise + said(8))
    assert (log.read(1), times(log.read(1))) == ([], [8])


def test_one_that_says_a_lot_is_heard_over_several_rounds(folder, log):
    (folder / "0.log").write_bytes(b"".join(said(n) for n in range(5000)))
    rounds = [times(log.read(0)) for _ in range(10)]
    assert max(map(len, rounds)) < 2000
    assert list(chain(*rounds)) == list(range(5000))


def test_of_a_file_that_was_rotated_twice_none_is_left_out(folder, log):
    (folder / "0.log").write_bytes(said(1))
    assert times(log.read(0)) == [1]
    (folder / "0.log").rename(folder / "0.log.20261125-110000")
    (folder / "0.log.20261125-120000").write_bytes(said(2))
    (folder / "0.log").write_bytes(said(3))
    assert times(log.read(0)) == [2, 3]


@given(st.lists(st.integers(1, 60), max_size=30))
def test_where_reads_cut_the_file_does_not_matter(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("log")
    text = event(1).to_line().strip()
    content = said(0) + line(b"noise") + line(text[:9], b"P") + line(text[9:]) + said(2)
    log, events = PodLog(folder), []
    with (folder / "0.log").open("ab", buffering=0) as file:
        for cut in [*cuts, len(content)]:
            file.write(content[:cut])
            content = content[cut:]
            events += log.read(0)
    log.close()
    assert times(events) == [0, 1, 2]
