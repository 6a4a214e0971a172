"""Reading pieces of a file: whatever a disk answers, the bytes are right or the error is clear."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from contextlib import closing
from pathlib import Path

import pytest

from adapter.errors import SnapshotCorrupt, SnapshotError
from adapter.gpu import reads
from adapter.gpu.reads import PAGE_BYTES, Mode, Source, plan

SIZE = 10 * PAGE_BYTES + 123


@pytest.fixture
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def fd(tmp_path: Path, content: bytes):
    path = tmp_path / "data"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    yield fd
    os.close(fd)


@pytest.fixture(params=[Mode.BUFFERED, Mode.DIRECT])
def mode(request, monkeypatch: pytest.MonkeyPatch) -> Mode:
    monkeypatch.setattr(reads, "_resident_ratio", lambda *_: 0.0)
    monkeypatch.setattr(reads, "_is_direct_faster", lambda *_: request.param is Mode.DIRECT)
    return request.param


def read_all(fd: int, limit: int = 4 * PAGE_BYTES) -> tuple[bytes, Mode]:
    """The file as its reads put it together."""
    target = bytearray(SIZE)
    work = plan([(100, SIZE - 100, 100)], limit)
    view = memoryview(mmap.mmap(-1, limit))  # begins at a page
    with closing(Source(fd, work)) as source:
        for read in work:
            source.read(read, view)
            for start, size, address in read.copies:
                target[address : address + size] = view[start : start + size]
        return bytes(target), source.mode


def test_all_bytes_are_read(fd: int, content: bytes, mode: Mode) -> None:
    found, used = read_all(fd)
    assert found[100:] == content[100:]
    assert used is mode or used is Mode.BUFFERED, "a file system may have no direct reads"


@pytest.mark.parametrize("step", [1 + PAGE_BYTES, 2 * PAGE_BYTES, 513])
def test_short_reads_go_on(step: int, fd: int, content: bytes, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(_: int, buffers: list, at: int) -> int:
        data = os.pread(fd, min(step, len(buffers[0])), at)
        buffers[0][: len(data)] = data
        return len(data)

    monkeypatch.setattr(os, "preadv", short)
    assert read_all(fd)[0][100:] == content[100:]


def test_interrupted_reads_go_on(fd: int, content: bytes, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.preadv, itertools.count()

    def interrupted(*arguments) -> int:
        if next(calls) % 2 == 0:
            raise InterruptedError
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", interrupted)
    assert read_all(fd)[0][100:] == content[100:]


def test_a_file_system_that_refuses_direct_reads_late_is_read_through_the_cache(
    fd: int, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "_resident_ratio", lambda *_: 0.0)
    monkeypatch.setattr(reads, "_is_direct_faster", lambda *_: True)
    monkeypatch.setattr(reads, "_open_direct", os.dup)
    real, refused = os.preadv, []

    def refusing(used: int, buffers: list, at: int) -> int:
        if used != fd:
            refused.append(at)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(used, buffers, at)

    monkeypatch.setattr(os, "preadv", refusing)
    found, mode = read_all(fd)
    assert found[100:] == content[100:]
    assert mode is Mode.BUFFERED
    assert len(refused) == 1


def test_without_direct_reads_the_cache_is_used(fd: int, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "_resident_ratio", lambda *_: 0.0)
    monkeypatch.setattr(reads, "_is_direct_faster", lambda *_: True)
    monkeypatch.setattr(reads, "_open_direct", lambda fd: -1)
    found, mode = read_all(fd)
    assert found[100:] == content[100:]
    assert mode is Mode.BUFFERED


def test_a_read_error_says_where(fd: int, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def failing(used: int, buffers: list, at: int) -> int:
        if at >= 4 * PAGE_BYTES:
            raise OSError(errno.EIO, "Input/output error")
        return real(used, buffers, at)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(SnapshotError, match="cannot be read") as caught:
        read_all(fd)
    assert caught.value.why == f"Input/output error at byte {4 * PAGE_BYTES}."
    assert caught.value.code == "read-failed"


@pytest.mark.parametrize("left", [0, 100, PAGE_BYTES, 5 * PAGE_BYTES, 5 * PAGE_BYTES + 512, SIZE - 1])
def test_a_file_that_shrinks_is_said_so(left: int, fd: int, mode: Mode) -> None:
    work = plan([(0, SIZE, 0)], 16 * PAGE_BYTES)
    view = memoryview(mmap.mmap(-1, 16 * PAGE_BYTES))
    with closing(Source(fd, work)) as source:
        os.truncate(fd, left)
        with pytest.raises(SnapshotCorrupt, match="end early"):
            source.read(work[0], view)


def test_what_lies_in_the_page_cache_is_read_from_there(fd: int) -> None:
    assert read_all(fd)[1] is Mode.CACHED


def test_residency_is_measured_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    path.write_bytes(os.urandom(100 * PAGE_BYTES))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    work = plan([(0, 100 * PAGE_BYTES, 0)], PAGE_BYTES)
    if reads._resident_ratio(fd, work) > 0.1:
        pytest.skip("this file system keeps its pages")
    assert reads._resident_ratio(fd, work) == 0
    os.pread(fd, 100 * PAGE_BYTES, 0)
    assert reads._resident_ratio(fd, work) == 1
    os.close(fd)


def test_the_verdict_of_a_probe_is_kept_for_the_mount(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []
    monkeypatch.setattr(reads, "_faster_direct", {})
    monkeypatch.setattr(reads, "_PROBE_LEAST_BYTES", 0)
    monkeypatch.setattr(reads, "_open_direct", os.dup)
    monkeypatch.setattr(reads, "_seconds", lambda used, _: probed.append(used) or (1.0 if used != fd else 2.0))
    work = plan([(0, SIZE, 0)], PAGE_BYTES)
    assert reads._is_direct_faster(fd, work)
    assert reads._is_direct_faster(fd, work)
    assert len(probed) == 2


def test_a_small_file_is_not_probed(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "_faster_direct", {})
    assert not reads._is_direct_faster(fd, plan([(0, SIZE, 0)], PAGE_BYTES))
    assert not reads._faster_direct


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_probe_that_fails_decides_for_the_cache(code: int, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> float:
        raise OSError(code, "no")

    monkeypatch.setattr(reads, "_faster_direct", {})
    monkeypatch.setattr(reads, "_PROBE_LEAST_BYTES", 0)
    monkeypatch.setattr(reads, "_seconds", failing)
    before = len(os.listdir("/proc/self/fd"))
    assert not reads._is_direct_faster(fd, plan([(0, SIZE, 0)], PAGE_BYTES))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_real_probe_runs(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "_faster_direct", {})
    monkeypatch.setattr(reads, "_PROBE_LEAST_BYTES", 0)
    assert reads._is_direct_faster(fd, plan([(0, SIZE, 0)], PAGE_BYTES)) in {True, False}
    assert os.fstat(fd).st_dev in reads._faster_direct
