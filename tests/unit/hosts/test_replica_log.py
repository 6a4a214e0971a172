import asyncio
import io
import json
import threading

import pytest

from adapter.hosts import replica_log
from adapter.hosts.replica_log import LogWriter, ReplicaLog
from tests.fakes.host import AtOnce
from tests.fakes.replicas import until


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_lines_carry_time_instance_and_text(tmp_path):
    log = ReplicaLog(tmp_path / "logs" / "a.jsonl", "a-1", AtOnce())
    log.feed(b"hello\n")
    entry = json.loads((tmp_path / "logs" / "a.jsonl").read_text())
    assert entry["instance"] == "a-1"
    assert entry["text"] == "hello"
    assert entry["timestamp"].endswith("+00:00")
    assert (tmp_path / "logs" / "a.jsonl").stat().st_mode & 0o077 == 0


def test_a_last_line_without_an_end_is_kept(tmp_path):
    log = ReplicaLog(tmp_path / "a", "a-1", AtOnce())
    log.feed(b"one\ntw")
    log.feed(b"o")
    log.close()
    assert texts(tmp_path / "a") == ["one", "two"]


def test_bytes_that_are_no_text_are_kept_readable(tmp_path):
    ReplicaLog(tmp_path / "a", "a-1", AtOnce()).feed(b"\xff\x00ok\n")
    assert texts(tmp_path / "a") == ["\ufffd\0ok"]


def test_a_line_without_an_end_does_not_grow_in_memory(tmp_path):
    log = ReplicaLog(tmp_path / "a", "a-1", AtOnce())
    for _ in range(5):
        log.feed(b"x" * 65536)
    assert len(texts(tmp_path / "a")) >= 2


def test_the_file_is_rotated_at_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(replica_log, "_LIMIT_BYTES", 1000)
    log = ReplicaLog(tmp_path / "a", "a-1", AtOnce())
    for number in range(100):
        log.feed(b"line %d\n" % number)
    kept = texts(tmp_path / "a.1") + (texts(tmp_path / "a") if (tmp_path / "a").exists() else [])
    assert kept == [f"line {n}" for n in range(100 - len(kept), 100)]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2500


def test_replicas_share_a_file(tmp_path):
    first, second = ReplicaLog(tmp_path / "a", "a-1", AtOnce()), ReplicaLog(tmp_path / "a", "a-2", AtOnce())
    first.feed(b"one\n")
    second.feed(b"two\n")
    assert texts(tmp_path / "a") == ["one", "two"]


def test_a_log_that_cannot_be_written_does_not_stop_the_function(tmp_path, caplog):
    (tmp_path / "file").touch()
    echo = io.StringIO()
    ReplicaLog(tmp_path / "file" / "log", "a-1", AtOnce(), echo=echo).feed(b"said\n")
    assert echo.getvalue() == "said\n"
    assert "lost" in caplog.text


@pytest.fixture
def flooded(tmp_path, monkeypatch):
    """A log of which two lines may be written in a second, and its clock: call it to let a second pass."""
    monkeypatch.setattr(replica_log, "LINES_PER_S", 2)
    now = 0.0

    def tick():
        nonlocal now
        now += 1.0

    return ReplicaLog(tmp_path / "a", "a-1", AtOnce(), clock=lambda: now), tick


def test_more_lines_than_allowed_are_dropped_counted_and_told(tmp_path, flooded):
    log, tick = flooded
    assert log.feed(b"1\n2\n")
    assert not log.feed(b"3\n4\n5\nhal")
    assert not log.feed(b"f\n")
    tick()
    assert log.feed(b"later\n")
    shown = texts(tmp_path / "a")
    assert shown[:2] + shown[3:] == ["1", "2", "gpufn: 4 lines were dropped", "later"]
    assert "the rest is dropped" in shown[2]


def test_what_was_dropped_last_is_told_at_the_end(tmp_path, flooded):
    log, _ = flooded
    assert not log.feed(b"\n" * 65536)
    log.close()
    shown = texts(tmp_path / "a")
    assert shown[:2] == ["", ""]
    assert shown[-1] == f"gpufn: {65536 - 2} lines were dropped"


def test_more_bytes_than_allowed_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(replica_log, "BYTES_PER_S", 10)
    log = ReplicaLog(tmp_path / "a", "a-1", AtOnce(), clock=lambda: 0.0)
    assert log.feed(b"0123456789\n")
    assert not log.feed(b"more\n")
    assert texts(tmp_path / "a")[0] == "0123456789"
    assert "more" not in texts(tmp_path / "a")


def test_lines_that_find_the_disk_too_slow_are_dropped_and_counted(tmp_path):
    writer, now = AtOnce(), 0.0
    log = ReplicaLog(tmp_path / "a", "a-1", writer, clock=lambda: now)
    writer.full = True
    assert log.feed(b"1\n2\n")
    writer.full, now = False, 1.0
    log.feed(b"3\n")
    assert texts(tmp_path / "a") == ["gpufn: 2 lines were dropped", "3"]


def test_a_writer_waits_for_no_disk_keeps_the_order_and_outlives_what_raises(monkeypatch):
    monkeypatch.setattr(replica_log, "_BACKLOG", 3)

    async def scenario():
        writer, disk, done, busy = LogWriter(), threading.Event(), [], threading.Event()
        assert writer.give(lambda: (busy.set(), disk.wait()))
        assert busy.wait(10)
        assert [writer.give(work) for work in (lambda: 1 / 0, lambda: done.append(1), lambda: done.append(2))] == [
            True
        ] * 3
        assert not writer.give(lambda: done.append(3))
        disk.set()
        await until(lambda: done)  # there is room again
        await writer.flush()
        assert done == [1, 2]
        await writer.close()

    asyncio.run(scenario())
