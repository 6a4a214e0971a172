import errno
import os
import stat

import pytest

from adapter.files import part_of, write_whole


def test_a_file_is_written_whole_and_private(tmp_path):
    for data in (b"one", b"two"):
        write_whole(tmp_path / "a", data)
        assert (tmp_path / "a").read_bytes() == data
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_leaves_what_was_there_and_nothing_beside_it(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_the_longest_name_has_a_part_of_its_own(tmp_path):
    path = tmp_path / ("s" * 255)
    write_whole(path, b"long")
    assert path.read_bytes() == b"long"
    assert len(part_of(path).name) < 255
