import os
import tempfile
from pathlib import Path

from hypothesis import given, strategies as st

from adapter.snapshot.checksum import CHUNK_BYTES, Chunks, chunk_digests, file_checksum

SIZES = st.integers(1, 3 * CHUNK_BYTES)
PIECES = st.lists(st.tuples(st.integers(0, 3 * CHUNK_BYTES), st.binary(min_size=1, max_size=64)), max_size=4)


def write(path: Path, size: int, pieces, *, holes: bool) -> None:
    with path.open("wb") as file:
        if not holes:
            file.write(b"\0" * size)
        for offset, data in pieces:
            file.seek(offset % size)
            file.write(data[: size - offset % size])
        file.truncate(size)


@given(SIZES, PIECES)
def test_sparse_and_dense_copies_agree(size, pieces):
    with tempfile.TemporaryDirectory() as folder:
        sparse, dense = Path(folder) / "sparse", Path(folder) / "dense"
        write(sparse, size, pieces, holes=True)
        write(dense, size, pieces, holes=False)
        assert file_checksum(sparse) == file_checksum(dense)


@given(SIZES, PIECES, st.integers(0, 2**40))
def test_any_flipped_bit_is_found(size, pieces, where):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write(path, size, pieces, holes=True)
        before = file_checksum(path)
        bit = where % (size * 8)
        fd = os.open(path, os.O_RDWR)
        byte = os.pread(fd, 1, bit // 8)[0]
        os.pwrite(fd, bytes([byte ^ 1 << bit % 8]), bit // 8)
        os.close(fd)
        assert file_checksum(path) != before


@given(SIZES, SIZES, PIECES)
def test_a_cut_or_grown_file_is_found(size, other, pieces):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write(path, size, pieces, holes=True)
        before = file_checksum(path)
        os.truncate(path, other)
        assert (file_checksum(path) == before) == (size == other)


@given(SIZES, PIECES, st.lists(st.integers(1, 2 * CHUNK_BYTES), max_size=5))
def test_digests_of_what_is_written_are_those_of_the_file(size, pieces, cuts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write(path, size, pieces, holes=True)
        content, chunks = memoryview(path.read_bytes()), Chunks()
        for cut in cuts:
            chunks.update(content[:cut])
            content = content[cut:]
        chunks.update(content)
        assert chunks.digests() == chunk_digests(path)
