"""Pages brought into memory: all of them, by whatever the kernel has, and never an error that a start could not bear."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path

import pytest

from adapter import pagecache
from adapter.pagecache import ReadAhead, populate, resident_ratio

SIZE = 3 * 2**20 + 5


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "_PIECE_BYTES", 2**20)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file that is not in the page cache."""
    path = tmp_path / "data"
    path.write_bytes(os.urandom(SIZE))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if resident(path) > 0.5:
        pytest.skip("this file system keeps its pages")
    return path


def resident(path: Path) -> float:
    return resident_ratio(mapped(path))


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def test_every_page_is_there_afterwards(cold: Path) -> None:
    populate(mapped(cold))
    assert resident(cold) == 1


def test_without_the_newer_call_pages_are_asked_for(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Spied(mmap.mmap):
        def madvise(self, option, *place):
            if option == mmap.MADV_WILLNEED:
                asked.append(place)
            return super().madvise(option, *place)

    def refused(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(pagecache, "_madvise", refused)
    with cold.open("rb") as file:
        populate(Spied(file.fileno(), 0, access=mmap.ACCESS_COPY))
    reached = 0
    for start, length in sorted(asked):
        assert start == reached
        assert length <= 2**17
        reached += length
    assert reached == SIZE


def test_a_file_that_became_shorter_is_an_error_and_no_crash(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = mapped(cold)
    os.truncate(cold, 4096)
    monkeypatch.setattr(pagecache, "resident_ratio", lambda _: 0.0)
    with pytest.raises(OSError) as caught:
        populate(mapping)
    assert caught.value.errno == errno.EFAULT


def test_residency_is_told_without_reading(cold: Path) -> None:
    mapping = mapped(cold)
    assert resident_ratio(mapping) == 0
    mapping.madvise(mmap.MADV_RANDOM)
    assert mapping[0] is not None
    assert 0 < resident_ratio(mapping) < 1
    assert resident_ratio(mapping, [0]) == 1
    assert resident_ratio(mapping, [SIZE + 2**20]) == 0


def test_what_is_in_the_page_cache_is_left_to_faults(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold.read_bytes()
    calls = []
    monkeypatch.setattr(pagecache, "_populate", lambda _, start, length: calls.append((start, length)))
    populate(mapped(cold))
    assert not calls


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EAGAIN])
def test_a_tight_memory_limit_is_no_error(code: int, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(pagecache, "_madvise", refused)
    mapping = mapped(cold)
    populate(mapping)
    assert mapping[:] == cold.read_bytes()


def test_what_is_mapped_stays_private(cold: Path) -> None:
    before = cold.read_bytes()
    mapping = mapped(cold)
    populate(mapping)
    mapping[5] = before[5] ^ 1
    assert cold.read_bytes() == before


def test_read_ahead_brings_the_file_into_the_page_cache(cold: Path) -> None:
    assert ReadAhead(cold).wait(60)
    assert resident(cold) == 1
    assert not [thread for thread in threading.enumerate() if "read-ahead" in thread.name]


def test_read_ahead_is_bounded_by_the_memory_there_is(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = []
    monkeypatch.setattr(pagecache, "_available_bytes", lambda: 2**20)
    monkeypatch.setattr(pagecache, "_in_threads", lambda act, size: bounds.append(size))
    assert ReadAhead(cold).wait(60)
    assert bounds == [2**19]


def test_a_stopped_read_ahead_reads_no_further_piece(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, go_on, pieces = threading.Event(), threading.Event(), []

    def slow(_mapping: object, start: int, _length: int) -> None:
        pieces.append(start)
        first.set()
        go_on.wait(60)

    monkeypatch.setattr(pagecache, "_populate", slow)
    monkeypatch.setattr(pagecache, "_THREADS", 1)
    reading = ReadAhead(cold)
    assert first.wait(60)
    stopping = threading.Thread(target=reading.stop)
    stopping.start()
    assert reading._stopped.wait(60)
    go_on.set()
    stopping.join(60)
    assert pieces == [0]


def test_a_read_ahead_that_fails_on_the_way_is_harmless(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        ctypes.set_errno(errno.EFAULT)
        return -1

    monkeypatch.setattr(pagecache, "_madvise", failing)
    assert ReadAhead(cold).wait(60)


@pytest.mark.parametrize("kind", ["missing", "empty", "folder"])
def test_read_ahead_of_what_cannot_be_read_is_harmless(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    assert ReadAhead(path).wait(60)
