"""Checksums of large, sparse files, by chunk and in parallel.

BLAKE2b-256 of each 4 MiB chunk that holds data; holes cost nothing and count as nothing, so a file
that grew data where a hole was is found by its chunk map. Standard library only: hashlib releases the
interpreter lock, so threads add up.
"""

from __future__ import annotations

import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK_BYTES = 4 * 2**20
_THREADS = min(8, os.cpu_count() or 1)
_blake2b = functools.partial(hashlib.blake2b, digest_size=32)


def data_chunks(fd: int, size: int) -> list[int]:
    """Numbers of the chunks of an open file that hold data (not only holes), ascending."""
    chunks: list[int] = []
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: no data after this offset
            break
        end = os.lseek(fd, offset, os.SEEK_HOLE)
        first = max(offset // CHUNK_BYTES, chunks[-1] + 1 if chunks else 0)
        chunks.extend(range(first, (end - 1) // CHUNK_BYTES + 1))
        offset = end
    return chunks


def chunk_digests(path: Path) -> list[bytes]:
    """The digest of each chunk of a file, in order; empty for one that is all zeros, stored or a hole.

    Raises `OSError`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        digests = [b""] * -(-size // CHUNK_BYTES)
        with ThreadPoolExecutor(_THREADS) as pool:
            chunks = data_chunks(fd, size)
            for number, digest in zip(chunks, pool.map(lambda n: _read_digest(fd, n), chunks), strict=True):
                digests[number] = digest
        return digests
    finally:
        os.close(fd)


def file_checksum(path: Path) -> str:
    """One hex digest over a file's size and the digests of its chunks. Raises `OSError`.

    A copy that fills or digs holes still verifies.
    """
    whole = _blake2b(path.lstat().st_size.to_bytes(8, "little"))
    for number, digest in enumerate(chunk_digests(path)):
        if digest:
            whole.update(number.to_bytes(8, "little") + digest)
    return whole.hexdigest()


class Chunks:
    """`chunk_digests` of what is written to a file from its beginning, without reading it again."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._chunk, self._filled = _blake2b(), 0

    def update(self, data: memoryview) -> None:
        while data:
            part = data[: CHUNK_BYTES - self._filled]
            self._chunk.update(part)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == CHUNK_BYTES:
                self._close()

    def digests(self) -> list[bytes]:
        """Of everything; nothing can be added any more."""
        if self._filled:
            self._close()
        return self._digests

    def _close(self) -> None:
        digest = self._chunk.digest()
        self._digests.append(b"" if digest == _zeros_digest(self._filled) else digest)
        self._chunk, self._filled = _blake2b(), 0


@functools.cache
def _zeros_digest(size: int) -> bytes:
    return _blake2b(bytes(size)).digest()


def _read_digest(fd: int, number: int) -> bytes:
    data = os.pread(fd, CHUNK_BYTES, number * CHUNK_BYTES)
    return _blake2b(data).digest() if data.strip(b"\0") else b""
