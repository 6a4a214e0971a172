import os

import pytest

from adapter.snapshot.checksum import CHUNK_BYTES, data_chunks, file_checksum


def sparse(path, size: int, pieces: dict[int, bytes]):
    """A file of `size` bytes, holes except for `pieces` at their offsets."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
    return path


def dense(path, source):
    path.write_bytes(source.read_bytes())
    return path


def test_a_hole_and_stored_zeros_are_the_same(tmp_path):
    a = sparse(tmp_path / "a", 3 * CHUNK_BYTES + 17, {CHUNK_BYTES + 5: b"data", 3 * CHUNK_BYTES: b"end"})
    assert file_checksum(a) == file_checksum(dense(tmp_path / "b", a))


def test_size_counts(tmp_path):
    assert file_checksum(sparse(tmp_path / "a", 100, {})) != file_checksum(sparse(tmp_path / "b", 101, {}))


def test_a_chunk_that_moved_is_found(tmp_path):
    size = 4 * CHUNK_BYTES
    a = sparse(tmp_path / "a", size, {0: b"x"})
    b = sparse(tmp_path / "b", size, {CHUNK_BYTES: b"x"})
    assert file_checksum(a) != file_checksum(b)


def test_data_in_a_former_hole_is_found(tmp_path):
    a = sparse(tmp_path / "a", 4 * CHUNK_BYTES, {0: b"x"})
    before = file_checksum(a)
    with a.open("r+b") as file:
        file.seek(3 * CHUNK_BYTES)
        file.write(b"intruder")
    assert file_checksum(a) != before


def test_an_empty_file_has_a_checksum(tmp_path):
    (tmp_path / "a").touch()
    assert len(file_checksum(tmp_path / "a")) == 64


def test_a_link_is_refused(tmp_path):
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match="link"):
        file_checksum(tmp_path / "link")


def test_no_descriptor_is_left_open(tmp_path):
    path = sparse(tmp_path / "a", 10, {0: b"x"})
    before = len(os.listdir("/proc/self/fd"))
    file_checksum(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_chunks_are_ascending_and_once_each(tmp_path):
    pieces = {0: b"a", 4096 * 3: b"b", CHUNK_BYTES - 1: b"cc", 5 * CHUNK_BYTES: b"d"}
    path = sparse(tmp_path / "a", 6 * CHUNK_BYTES, pieces)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert data_chunks(fd, path.stat().st_size) == [0, 1, 5]
    finally:
        os.close(fd)
