import io
import json

from adapter.hosts import replica_log
from adapter.hosts.replica_log import ReplicaLog


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_lines_carry_time_instance_and_text(tmp_path):
    log = ReplicaLog(tmp_path / "logs" / "a.jsonl", "a-1")
    log.feed(b"hello\n")
    entry = json.loads((tmp_path / "logs" / "a.jsonl").read_text())
    assert entry["instance"] == "a-1"
    assert entry["text"] == "hello"
    assert entry["timestamp"].endswith("+00:00")
    assert (tmp_path / "logs" / "a.jsonl").stat().st_mode & 0o077 == 0


def test_a_last_line_without_an_end_is_kept(tmp_path):
    log = ReplicaLog(tmp_path / "a", "a-1")
    log.feed(b"one\ntw")
    log.feed(b"o")
    log.close()
    assert texts(tmp_path / "a") == ["one", "two"]


def test_bytes_that_are_no_text_are_kept_readable(tmp_path):
    ReplicaLog(tmp_path / "a", "a-1").feed(b"\xff\x00ok\n")
    assert texts(tmp_path / "a") == ["\ufffd\0ok"]


def test_a_line_without_an_end_does_not_grow_in_memory(tmp_path):
    log = ReplicaLog(tmp_path / "a", "a-1")
    for _ in range(5):
        log.feed(b"x" * 65536)
    assert len(texts(tmp_path / "a")) >= 2


def test_the_file_is_rotated_at_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(replica_log, "_LIMIT_BYTES", 1000)
    log = ReplicaLog(tmp_path / "a", "a-1")
    for number in range(100):
        log.feed(b"line %d\n" % number)
    kept = texts(tmp_path / "a.1") + (texts(tmp_path / "a") if (tmp_path / "a").exists() else [])
    assert kept == [f"line {n}" for n in range(100 - len(kept), 100)]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2500


def test_replicas_share_a_file(tmp_path):
    first, second = ReplicaLog(tmp_path / "a", "a-1"), ReplicaLog(tmp_path / "a", "a-2")
    first.feed(b"one\n")
    second.feed(b"two\n")
    assert texts(tmp_path / "a") == ["one", "two"]


def test_a_log_that_cannot_be_written_does_not_stop_the_function(tmp_path, caplog):
    (tmp_path / "file").touch()
    echo = io.StringIO()
    ReplicaLog(tmp_path / "file" / "log", "a-1", echo).feed(b"said\n")
    assert echo.getvalue() == "said\n"
    assert "lost" in caplog.text
