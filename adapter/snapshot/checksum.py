"""Checksums of large, sparse files, by chunk and in parallel.

BLAKE2b-256 of each 4 MiB chunk that holds data; holes cost nothing and count as nothing, so a file
that grew data where a hole was is found by its chunk map. Standard library only: hashlib releases the
interpreter lock, so threads add up.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK_BYTES = 4 * 2**20
_THREADS = min(8, os.cpu_count() or 1)


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


def file_checksum(path: Path) -> str:
    """One hex digest over a file's size and the digests of its data chunks. Raises `OSError`.

    A chunk of zeros digests alike whether it is stored or a hole, so a copy that fills or digs holes
    still verifies.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        whole = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=32)
        with ThreadPoolExecutor(_THREADS) as pool:
            chunks = data_chunks(fd, size)
            for number, digest in zip(chunks, pool.map(lambda n: _chunk_digest(fd, n), chunks), strict=True):
                if digest:
                    whole.update(number.to_bytes(8, "little") + digest)
        return whole.hexdigest()
    finally:
        os.close(fd)


def _chunk_digest(fd: int, number: int) -> bytes:
    data = os.pread(fd, CHUNK_BYTES, number * CHUNK_BYTES)
    if not data.strip(b"\0"):
        return b""
    return hashlib.blake2b(data, digest_size=32).digest()
