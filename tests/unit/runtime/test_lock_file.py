"""The file that exec probes look for."""

import pytest

from adapter.runtime.lock_file import LockFile


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_it_is_there_from_write_to_remove(folder):
    lock = LockFile(wanted=True)
    assert list(folder.iterdir()) == []
    lock.write()
    assert (folder / ".lock").read_bytes() == b""
    lock.remove()
    lock.remove()
    assert list(folder.iterdir()) == []


def test_unwanted_it_never_is(folder):
    (folder / ".lock").write_text("another's")
    lock = LockFile(wanted=False)
    lock.write()
    lock.remove()
    assert (folder / ".lock").read_text() == "another's"


def test_a_folder_that_cannot_be_written_is_said(folder, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(folder / "missing"))
    LockFile(wanted=True).write()
    assert "suppress_lock" in capsys.readouterr().err
