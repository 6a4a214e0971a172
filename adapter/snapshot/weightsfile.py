"""The two files of a weight snapshot: written whole or not at all, read with distrust.

    weights.safetensors    the bytes, page-aligned; any safetensors reader opens it
    weights.json           the index: which tensor is which part of them, ties and strides, checksums; written last.
                           Two lines of JSON: a digest of the second, and the contents

Knows neither models nor torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from adapter.errors import SnapshotCorrupt, SnapshotError
from adapter.snapshot.checksum import CHUNK_BYTES, Chunks, chunk_digests
from adapter.snapshot.layout import Tensor, is_names
from adapter.snapshot.tensorfile import Header, arrange, header_bytes, read_header

DATA = "weights.safetensors"
INDEX = "weights.json"
FORMAT = 2

_INDEX_LIMIT_BYTES = 2**27
"""A checksum takes 67 bytes for each 4 MiB of weights: 1 TB of them is 16 MB of index."""


_COPY_BYTES = 64 * 2**20
"""Tensors leave a GPU, or are converted, in pieces of this size."""


@dataclass(frozen=True, slots=True)
class Index:
    """What `INDEX` says. `chunks` are the digests of `DATA`, see `checksum.chunk_digests`.

    `complete`: it holds every tensor of the model that was saved; a checkpoint that was converted may not.
    `training` names the modules that are not in evaluation mode.
    """

    tensors: list[Tensor]
    training: list[str]
    complete: bool
    chunks: list[bytes]

    def to_bytes(self) -> bytes:
        contents = {
            "format": FORMAT,
            "complete": self.complete,
            "training": self.training,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "chunks": [digest.hex() for digest in self.chunks],
        }
        text = json.dumps(contents).encode()
        return json.dumps({"digest": _digest(text)}).encode() + b"\n" + text

    @classmethod
    def from_bytes(cls, text: bytes) -> Index:
        """Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` on anything else."""
        head, _, text = text.partition(b"\n")
        if json.loads(head)["digest"] != _digest(text):
            raise ValueError("its digest differs")
        contents = json.loads(text)
        if contents["format"] != FORMAT:
            raise ValueError(f"it has format {contents['format']!r}, this gpufn reads {FORMAT}")
        index = cls(
            [Tensor.from_json(entry) for entry in contents["tensors"]],
            contents["training"],
            contents["complete"],
            [bytes.fromhex(digest) for digest in contents["chunks"]],
        )
        names = [name for tensor in index.tensors for name in tensor.names]
        if len(names) != len(set(names)):
            raise ValueError("a name comes twice")
        if not is_names(index.training) or not isinstance(index.complete, bool):
            raise ValueError("its modules have no names")
        return index


def _digest(text: bytes) -> str:
    """A flipped bit in the index must not give a tensor another shape."""
    return hashlib.blake2b(text, digest_size=32).hexdigest()


class Part(Protocol):
    """One tensor of `DATA` to be written. `chunks` are its bytes; together they are as many as its shape says."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def alignment(self) -> int: ...
    def chunks(self, limit_bytes: int) -> Iterator[memoryview]: ...


class Writer:
    """`DATA` being written: all its parts, then `finish`."""

    def __init__(self, folder: Path, file: IO[bytes]) -> None:
        self._folder = folder
        self._file = file
        self._chunks = Chunks()

    def write(self, parts: Iterable[Part]) -> None:
        """Header and bytes. Host memory stays bounded whatever their size."""
        by_name = {part.name: part for part in parts}
        placed = arrange((part.name, part.dtype, part.shape, part.alignment) for part in by_name.values())
        self._write(memoryview(header_bytes(placed, {"format": "pt", "gpufn.weights": str(FORMAT)})))
        for stored in placed:
            written = sum(self._write(chunk) for chunk in by_name[stored.name].chunks(_COPY_BYTES))
            if written != stored.size_bytes:
                raise SnapshotError(f"{stored.name} has {written} bytes instead of {stored.size_bytes}.")

    def _write(self, chunk: memoryview) -> int:
        self._file.write(chunk)
        self._chunks.update(chunk)
        return chunk.nbytes

    def finish(self, tensors: list[Tensor], training: list[str], *, complete: bool) -> None:
        """Bring both files to the disk under their names, and read them back. Nothing can be written after it."""
        _sync(self._file)
        with _created(self._folder / f"{INDEX}.part") as index:
            index.write(Index(tensors, training, complete, self._chunks.digests()).to_bytes())
            _sync(index)
        for name in (DATA, INDEX):
            os.rename(self._folder / f"{name}.part", self._folder / name)
        try:
            verify(self._folder)
        except SnapshotCorrupt:
            (self._folder / INDEX).unlink()
            raise


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """A weight snapshot in the making, in a folder that holds none; what is not finished is removed.

    Raises `SnapshotError`: it holds one, the disk is full, or does not give back what was written.
    """
    if (folder / INDEX).exists():
        raise SnapshotError(f"{folder} holds weights already.")
    try:
        with _created(folder / f"{DATA}.part") as file:
            yield Writer(folder, file)
    except OSError as exc:
        raise SnapshotError(
            "The weights cannot be written.", why=f"{exc.strerror or exc}.", code="write-failed"
        ) from exc
    finally:
        for name in (DATA, INDEX):
            (folder / f"{name}.part").unlink(missing_ok=True)


@contextmanager
def reading(folder: Path) -> Iterator[tuple[IO[bytes], Header, Index]]:
    """The open `DATA` of a snapshot, what it says about itself, and the index, which fits it.

    Raises `SnapshotCorrupt`. Contents are not checked: see `verify`.
    """
    with opened(folder / INDEX) as file:
        text = file.read(_INDEX_LIMIT_BYTES + 1)
    try:
        if len(text) > _INDEX_LIMIT_BYTES:
            raise ValueError("it is too large")
        index = Index.from_bytes(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise SnapshotCorrupt(f"{INDEX} cannot be used.", why=f"{exc}.") from exc
    with opened(folder / DATA) as file:
        header = read_header(file.fileno())
        _check_parts(index.tensors, header)
        yield file, header, index


def verify(folder: Path) -> None:
    """Make sure that both files are whole and what was written.

    Raises `SnapshotCorrupt` naming the first damaged chunk and the tensors in it.
    """
    with reading(folder) as (_, header, index):
        found = chunk_digests(folder / DATA)
        if len(found) != len(index.chunks):
            raise SnapshotCorrupt(f"{DATA} has another length than {INDEX} says.")
        for number, (is_now, was) in enumerate(zip(found, index.chunks, strict=True)):
            if is_now != was:
                raise SnapshotCorrupt(
                    f"{DATA} is damaged in chunk {number} of {len(found)}, which holds {_held(header, number)}.",
                    why="Its checksum differs.",
                    hint="Remove the snapshot; the next start makes it anew.",
                )


def _held(header: Header, number: int) -> str:
    """What a chunk of the file holds, for people: the first of its tensors by name."""
    start = number * CHUNK_BYTES - header.data_at
    inside = [t for t in header.tensors.values() if t.start < start + CHUNK_BYTES and t.end > max(start, t.start)]
    names = ["the header"] if start < 0 else []
    names += [tensor.name for tensor in sorted(inside, key=lambda tensor: tensor.start)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_parts(tensors: list[Tensor], header: Header) -> None:
    for tensor in tensors:
        stored = header.tensors.get(tensor.piece)
        if stored is None:
            raise SnapshotCorrupt(
                f"The weights of {tensor.names[0]} are missing.", why=f"{DATA} has no {tensor.piece}."
            )
        if tensor.end_bytes > stored.size_bytes:
            raise SnapshotCorrupt(f"The weights of {tensor.names[0]} end outside of {tensor.piece}.")
        if (header.data_at + stored.start) % tensor.item_bytes or stored.size_bytes % tensor.item_bytes:
            raise SnapshotCorrupt(f"The weights of {tensor.names[0]} are not aligned in {DATA}.")
    unused = header.tensors.keys() - {tensor.piece for tensor in tensors}
    if unused:
        raise SnapshotCorrupt(f"{DATA} holds {min(unused)}, which {INDEX} does not name.")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file; links and anything else are refused. Raises `SnapshotCorrupt`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        raise SnapshotCorrupt(f"{path.name} cannot be opened.", why=f"{exc.strerror}.") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SnapshotCorrupt(f"{path.name} is not a file.")
    with os.fdopen(fd, "rb") as file:
        yield file


def _created(path: Path) -> IO[bytes]:
    """A new private file."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "wb")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
