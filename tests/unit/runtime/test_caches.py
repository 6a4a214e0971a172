"""A replica's compile caches: nothing that is wrong with the kept ones fails a start, or is half used."""

import os
import resource
import tarfile
from types import SimpleNamespace

import pytest

from adapter.errors import NotFound, SnapshotCorrupt
from adapter.runtime.caches import Caches
from adapter.snapshot.compile_caches import BUNDLE, is_used, pack


class Wanted:
    """Stands for a function whose kept caches are in `folder`; or `error` is what looking for them ends with."""

    keeps_compile_caches = True

    def __init__(self, folder=None, error=None):
        self._folder, self._error = folder, error

    def find(self, kind):
        assert kind == "compile"
        if self._error is not None:
            raise self._error
        return SimpleNamespace(path=self._folder)


@pytest.fixture
def caches(tmp_path):
    return Caches(tmp_path / "runtime")


def compiled(folder, data=b"code"):
    (folder / "inductor").mkdir(parents=True)
    (folder / "inductor" / "kernel.so").write_bytes(data)
    return folder


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_store_that_cannot_be_written_fails_no_start(caches, capsys, error):
    caches.bring(Wanted(error=error))
    assert error.strerror in capsys.readouterr().err
    compiled(caches.folder)
    assert not caches.are_new(Wanted(error=error))


def test_caches_are_new_where_none_are_kept_or_those_are_damaged(caches):
    assert not caches.are_new(Wanted(error=NotFound("No snapshot yet.")))
    compiled(caches.folder)
    assert caches.are_new(Wanted(error=NotFound("No snapshot yet.")))
    assert caches.are_new(Wanted(error=SnapshotCorrupt("Damaged.")))
    assert not caches.are_new(Wanted(caches.folder))


def test_no_kept_caches_are_nothing_to_speak_of(caches, capsys):
    caches.bring(Wanted(error=NotFound("No snapshot yet.")))
    assert capsys.readouterr().err == ""


def test_headers_chained_without_end_fail_no_start(caches, tmp_path, capsys):
    chained = tarfile.TarInfo("x")
    chained.type, chained.size = tarfile.GNUTYPE_LONGNAME, 11
    header = chained.tobuf(tarfile.GNU_FORMAT) + b"inductor/a\0".ljust(tarfile.BLOCKSIZE, b"\0")
    last = tarfile.TarInfo("inductor/a").tobuf() + bytes(2 * tarfile.BLOCKSIZE)
    (tmp_path / BUNDLE).write_bytes(header * 3000 + last)
    caches.bring(Wanted(tmp_path))
    assert "compile caches are not used" in capsys.readouterr().err
    assert not is_used(caches.folder)


def test_a_disk_that_is_full_half_way_leaves_nothing_that_counts_as_a_cache(caches, tmp_path, capsys):
    pack(compiled(tmp_path / "live", os.urandom(300_000)), tmp_path / BUNDLE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        caches.bring(Wanted(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert not is_used(caches.folder)
