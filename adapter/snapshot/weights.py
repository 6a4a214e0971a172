"""Weight snapshots: the tensors of a model as a file that is mapped, not read.

    weights.safetensors    the bytes, page-aligned; any safetensors reader opens it
    weights.json           which module's tensor is which part of them, ties and strides; written last

`save` writes what `load` made; `fill` gives it to what `build` made, bit for bit: tied tensors stay
tied, strides stay, non-persistent buffers are there. On the CPU the parameters are private mappings:
replicas share the page cache, and a replica that writes to one gets a page of its own. No pickle.
torch is imported where it is used, so that looking at a snapshot does not need it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from adapter.errors import SnapshotCorrupt, SnapshotError, SnapshotMismatch
from adapter.snapshot.checksum import file_checksum
from adapter.snapshot.layout import Piece, Slot, Tensor, cut, is_names, slots_of, submodules_of
from adapter.snapshot.tensorfile import Header, arrange, header_bytes, read_header

DATA = "weights.safetensors"
INDEX = "weights.json"
FORMAT = 1

_INDEX_LIMIT_BYTES = 2**26
_COPY_BYTES = 64 * 2**20
"""Tensors leave a GPU in pieces of this size: host memory stays bounded whatever the model's size."""


def save(model: object, folder: Path) -> None:
    """Write the weights of every module in `model` into `folder`, which is there and empty of weights.

    Whole or not at all. Raises `SnapshotError`: no module, a kind of tensor that cannot be kept, a full disk.
    """
    slots = slots_of(model)
    if not slots:
        raise SnapshotError("The model has no weights to keep.", why="It holds no torch.nn.Module with tensors.")
    if (folder / INDEX).exists():
        raise SnapshotError(f"{folder} holds weights already.")
    tensors, pieces = cut(slots)
    data, index = folder / f"{DATA}.part", folder / f"{INDEX}.part"
    try:
        with _created(data) as file:
            _write_pieces(file, pieces)
        training = [name for name, module in submodules_of(model) if module.training]
        with _created(index) as file:
            file.write(_Index(file_checksum(data), tensors, training).to_bytes())
        os.rename(data, folder / DATA)
        os.rename(index, folder / INDEX)
    except OSError as exc:
        raise SnapshotError(
            "The weights cannot be written.", why=f"{exc.strerror or exc}.", code="write-failed"
        ) from exc
    finally:
        for path in (data, index):
            path.unlink(missing_ok=True)


def fill(model: object, folder: Path, device: str = "cpu") -> None:
    """Give the modules in `model`, on whatever device (meta is the fast one), the saved weights on `device`.

    Raises `SnapshotCorrupt` for files that are not what `save` writes, `SnapshotMismatch` naming the
    tensor for a model that is not the saved one. Contents are not checked here: see `verify`.
    """
    import torch

    slots = {slot.name: slot for slot in slots_of(model)}
    index = _read_index(folder)
    with _opened(folder / DATA) as file:
        header = read_header(file.fileno())
        _check_parts(index.tensors, header)
        _check_fit(index.tensors, slots)
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    whole.madvise(mmap.MADV_WILLNEED)  # one long read from a cold disk instead of a fault a page
    with torch.no_grad():
        bases = {
            stored.name: _base(whole, header.data_at + stored.start, stored.size_bytes, device)
            for stored in header.tensors.values()
        }
        for tensor in index.tensors:
            _assign([slots[name] for name in tensor.names], tensor, bases[tensor.piece])
    training = set(index.training)
    for name, module in submodules_of(model):
        module.training = name in training
        _check_nothing_left(name, module)


def verify(folder: Path) -> None:
    """Make sure that both files are whole and what `save` wrote. Raises `SnapshotCorrupt`."""
    index = _read_index(folder)
    with _opened(folder / DATA) as file:
        _check_parts(index.tensors, read_header(file.fileno()))
    if file_checksum(folder / DATA) != index.checksum:
        raise SnapshotCorrupt(f"{DATA} is damaged.", why="Its checksum differs.")


def _write_pieces(file: IO[bytes], pieces: Iterable[Piece]) -> None:
    by_name = {piece.name: piece for piece in pieces}
    placed = arrange((piece.name, piece.dtype, piece.shape, piece.alignment) for piece in by_name.values())
    file.write(header_bytes(placed, {"format": "pt", "gpufn.weights": str(FORMAT)}))
    for stored in placed:
        for chunk in by_name[stored.name].chunks(_COPY_BYTES):
            file.write((ctypes.c_char * chunk.numel()).from_address(chunk.data_ptr()))
        file.write(bytes(by_name[stored.name].padding_bytes))


def _base(whole: mmap.mmap, offset: int, size: int, device: str) -> Any:
    """Bytes of the mapped file as a uint8 tensor with a storage of its own, copied only to leave the CPU."""
    import torch

    if not size:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.frombuffer(whole, dtype=torch.uint8, count=size, offset=offset).to(device)


def _assign(slots: list[Slot], tensor: Tensor, base: Any) -> None:
    """Put one tensor, a view of its base, into all places that shared it."""
    import torch

    value = base.view(tensor.torch_dtype()).as_strided(tensor.shape, tensor.stride, tensor.offset)
    if any(slot.is_parameter for slot in slots):
        value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
    for slot in slots:
        if slot.is_parameter:
            setattr(slot.owner, slot.attribute, value)  # not into _parameters: recurrent layers listen
        else:
            slot.owner._buffers[slot.attribute] = value  # noqa: SLF001  # a Parameter here must stay a buffer


def _check_fit(tensors: list[Tensor], slots: dict[str, Slot]) -> None:
    saved = {name: tensor for tensor in tensors for name in tensor.names}
    for name in sorted(saved.keys() ^ slots.keys()):
        where = "the model that `build` makes" if name in saved else "the snapshot"
        raise SnapshotMismatch(f"{name} is not in {where}.", why="The weights are of another model.")
    for name, tensor in saved.items():
        found = slots[name].value
        if tuple(found.shape) != tensor.shape:
            raise SnapshotMismatch(f"{name} has the shape {list(found.shape)}, the snapshot {list(tensor.shape)}.")
        if found.dtype != tensor.torch_dtype():
            raise SnapshotMismatch(
                f"{name} is {found.dtype} where `build` makes it, and torch.{tensor.dtype} in the snapshot.",
                hint="Let `build` use the data type that `load` does.",
            )


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


def _check_nothing_left(name: str, module: Any) -> None:
    """A tensor that is neither parameter nor buffer was not saved: on the meta device it would have no data."""
    import torch

    for attribute, value in vars(module).items():
        held = value if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(item, torch.Tensor) and item.is_meta for item in held):
            raise SnapshotMismatch(
                f"{'.'.join(filter(None, (name, attribute)))} has no data.",
                why="It is a plain attribute, which a weight snapshot does not keep.",
                hint="Make it a buffer: self.register_buffer(name, tensor, persistent=False).",
            )


@dataclass(frozen=True, slots=True)
class _Index:
    """What is in `INDEX`; `training` names the modules that are not in evaluation mode."""

    checksum: str
    tensors: list[Tensor]
    training: list[str]

    def to_bytes(self) -> bytes:
        contents = {
            "format": FORMAT,
            "checksum": self.checksum,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "training": self.training,
        }
        return json.dumps({**contents, "digest": _digest(contents)}).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> _Index:
        """Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` on anything else."""
        contents = json.loads(text)
        if contents.pop("digest") != _digest(contents):
            raise ValueError("its digest differs")
        if contents["format"] != FORMAT:
            raise ValueError(f"it has format {contents['format']!r}, this gpufn reads {FORMAT}")
        index = cls(
            contents["checksum"], [Tensor.from_json(entry) for entry in contents["tensors"]], contents["training"]
        )
        names = [name for tensor in index.tensors for name in tensor.names]
        if len(names) != len(set(names)):
            raise ValueError("a name comes twice")
        if not is_names(index.training):
            raise ValueError("its modules have no names")
        return index


def _digest(contents: dict[str, Any]) -> str:
    """A flipped bit in the index must not give a tensor another shape."""
    return hashlib.blake2b(json.dumps(contents, sort_keys=True).encode(), digest_size=32).hexdigest()


def _read_index(folder: Path) -> _Index:
    with _opened(folder / INDEX) as file:
        text = file.read(_INDEX_LIMIT_BYTES + 1)
    try:
        if len(text) > _INDEX_LIMIT_BYTES:
            raise ValueError("it is too large")
        return _Index.from_bytes(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise SnapshotCorrupt(f"{INDEX} cannot be used.", why=f"{exc}.") from exc


@contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    """A new private file, on the disk when the block ends."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file of the snapshot; links and anything else are refused."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        raise SnapshotCorrupt(f"{path.name} cannot be opened.", why=f"{exc.strerror}.") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SnapshotCorrupt(f"{path.name} is not a file.")
    with os.fdopen(fd, "rb") as file:
        yield file
