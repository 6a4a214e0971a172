"""What can go wrong with a SQLite ledger on a disk, and what its user is told."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapter.errors import LedgerError
from adapter.ledger.store import FILE_NAME, Ledger, ledger_url
from adapter.records import LeaseInterval, LeasePhase

REPOSITORY = Path(__file__).parents[3]


def interval(n, function="embed"):
    return LeaseInterval(
        id=f"embed-1:{n}", function=function, namespace="openfaas-fn", revision="1", replica="embed-1", tenant="default",
        price_class="standard", device="cpu", share=1.0, phase=LeasePhase.IDLE, started_at_ns=n * 10 + 1, ended_at_ns=n * 10 + 11,
    )  # fmt: skip


def refused(url, **options):
    with pytest.raises(LedgerError) as caught:
        Ledger.open(url, **options).close()
    return caught.value


def test_its_files_are_private_whatever_the_umask(state_dir):
    ledger = Ledger.open(ledger_url(state_dir / "new"))
    ledger.add_intervals([interval(0)])
    files = sorted((state_dir / "new").iterdir())
    assert [f.name for f in files] == [FILE_NAME, f"{FILE_NAME}-shm", f"{FILE_NAME}-wal"]
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}
    assert stat.S_IMODE((state_dir / "new").stat().st_mode) == 0o700
    ledger.close()


def test_what_is_acknowledged_is_on_the_disk(state_dir):
    ledger = Ledger.open(ledger_url(state_dir))
    with ledger._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    ledger.close()


WRITER = """
import sys
from adapter.ledger.store import Ledger
from tests_interval import interval

ledger = Ledger.open(sys.argv[1])
for batch in range(10**6):
    ledger.add_intervals([interval(batch * 3 + n) for n in range(3)])
    print(batch, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 7, 40])
def test_kill_9_loses_nothing_that_was_acknowledged_and_leaves_no_half_batch(state_dir, tmp_path, acknowledged):
    (tmp_path / "tests_interval.py").write_text(Path(__file__).read_text())
    environment = {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, ledger_url(state_dir)], stdout=subprocess.PIPE, text=True, env=environment
    )
    for _ in range(acknowledged):
        assert writer.stdout.readline().strip()
    writer.kill()
    rest = writer.stdout.read().split()
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()

    ledger = Ledger.open(ledger_url(state_dir))
    found = ledger.intervals(0, 2**62)
    assert len(found) % 3 == 0
    assert len(found) >= 3 * (acknowledged + len(rest))
    assert found == [interval(n) for n in range(len(found))]
    assert ledger.add_intervals([interval(n) for n in range(len(found) + 3)]) == 3  # a sender tries again
    ledger.close()


def test_one_that_is_locked_says_so(state_dir):
    Ledger.open(ledger_url(state_dir)).close()
    holder = sqlite3.connect(state_dir / FILE_NAME, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    error = refused(ledger_url(state_dir), lock_timeout_s=0.05)
    assert "locked" in error.why
    assert "Another process" in error.hint
    holder.execute("ROLLBACK")
    holder.close()
    Ledger.open(ledger_url(state_dir)).close()


def test_a_reader_does_not_wait_for_a_writer(state_dir):
    ledger = Ledger.open(ledger_url(state_dir), lock_timeout_s=0.05)
    ledger.add_intervals([interval(0)])
    holder = sqlite3.connect(state_dir / FILE_NAME, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert ledger.intervals(0, 100) == [interval(0)]
    with pytest.raises(LedgerError):
        ledger.add_intervals([interval(1)])
    holder.execute("ROLLBACK")
    holder.close()
    assert ledger.add_intervals([interval(1)]) == 1
    ledger.close()


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_damaged_file_says_what_to_do(state_dir, content):
    (state_dir / FILE_NAME).write_bytes(content)
    error = refused(ledger_url(state_dir))
    assert FILE_NAME in error.why
    assert "move it away" in error.hint
    assert (state_dir / FILE_NAME).read_bytes() == content


def test_damage_inside_is_noticed_when_it_is_read(state_dir):
    ledger = Ledger.open(ledger_url(state_dir))
    ledger.add_intervals([interval(n) for n in range(2000)])
    ledger.close()
    with (state_dir / FILE_NAME).open("r+b") as file:
        file.seek(4096 * 10)
        file.write(b"\xff" * 4096 * 20)
    with pytest.raises(LedgerError) as caught:
        ledger = Ledger.open(ledger_url(state_dir))
        try:
            ledger.intervals(0, 2**62)
        finally:
            ledger.close()
    assert "move it away" in caught.value.hint


def test_a_full_disk_loses_the_batch_whole_and_says_so(state_dir):
    ledger = Ledger.open(ledger_url(state_dir))
    pages = 0

    def limit(connection, _record):
        connection.execute(f"PRAGMA max_page_count={pages}")

    with ledger._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar() + 1
    ledger._engine.dispose()
    sa.event.listen(ledger._engine, "connect", limit)
    with pytest.raises(LedgerError) as caught:
        ledger.add_intervals([interval(n, function="f" * 100) for n in range(500)])
    assert "Make room" in caught.value.hint
    assert ledger.intervals(0, 2**62) == []
    pages = 10**6
    ledger._engine.dispose()
    assert ledger.add_intervals([interval(n) for n in range(500)]) == 500
    ledger.close()


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    error = refused(f"sqlite:///{tmp_path}/file/ledger.sqlite")
    assert str(tmp_path) in error.why
    (tmp_path / "ledger.sqlite").mkdir()
    assert refused(f"sqlite:///{tmp_path}/ledger.sqlite").why


def test_a_file_that_went_away_while_open_is_an_error_not_a_crash(state_dir):
    ledger = Ledger.open(ledger_url(state_dir))
    ledger.add_intervals([interval(0)])
    ledger._engine.dispose()
    shutil.rmtree(state_dir)
    with pytest.raises(LedgerError):
        ledger.add_intervals([interval(1)])
    ledger.close()


@pytest.mark.parametrize("url", ["mysql://u@h/d", "sqlite://", "sqlite:///:memory:", "nonsense", ""])
def test_other_databases_are_refused(url):
    error = refused(url)
    assert "sqlite:///FILE" in error.hint


def test_a_password_is_in_no_message():
    error = refused("postgresql://user:hunter2@127.0.0.1:1/db?connect_timeout=1")
    assert "hunter2" not in f"{error.message} {error.why} {error.hint}"
    error = refused("mysql://user:hunter2@h/d")
    assert "hunter2" not in f"{error.message} {error.why} {error.hint}"


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    error = refused("postgresql://127.0.0.1:1/db")
    assert error.code == "ledger-driver"
    assert "psycopg" in error.hint
