"""The safetensors format, read as hostile input and written so that its data can be mapped.

Eight bytes of header length (little endian), a JSON header, then the tensors' bytes without holes:
https://github.com/huggingface/safetensors#format. Ours pad the header with spaces, which the format
allows, so that the data begins on a page. Standard library only; knows nothing of torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapter.errors import SnapshotCorrupt

PAGE_BYTES = 4096
CACHE_LINE_BYTES = 64
"""torch aligns what it allocates to this; math libraries may round differently on data that is not."""

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
"""Bytes of one item of each data type that the format names and we write."""

_LENGTH_BYTES = 8
_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the format's own library
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: `start` and `end` count bytes from the beginning of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself; `data_at` is the file offset where its data begins."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    data_at: int


def size_bytes(dtype: str, shape: Iterable[int]) -> int:
    return ITEM_BYTES[dtype] * math.prod(shape)


def arrange(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> list[Stored]:
    """Places for tensors given as (name, dtype, shape, alignment in bytes), in the order of the file.

    Whole cache lines come first, and then the larger alignment: so each tensor is aligned although the
    format forbids holes, and those that matter are aligned as in memory.
    """

    def order(tensor: tuple[str, str, tuple[int, ...], int]) -> tuple[bool, int, str]:
        name, dtype, shape, alignment = tensor
        return size_bytes(dtype, shape) % CACHE_LINE_BYTES != 0, -alignment, name

    placed, at = [], 0
    for name, dtype, shape, alignment in sorted(tensors, key=order):
        if at % alignment:
            raise AssertionError(f"{name} would not be aligned")
        placed.append(Stored(name, dtype, shape, at, at + size_bytes(dtype, shape)))
        at = placed[-1].end
    return placed


def header_bytes(tensors: Iterable[Stored], metadata: Mapping[str, str]) -> bytes:
    """The file's beginning, padded so that the data after it begins on a page."""
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % PAGE_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(fd: int) -> Header:
    """The header of an open file, checked in full. Raises `SnapshotCorrupt` naming the tensor at fault."""
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, 0), "little")
    data_at = _LENGTH_BYTES + length
    if size < _LENGTH_BYTES or data_at > size or length > _HEADER_LIMIT_BYTES:
        raise _corrupt(f"Its header would be {length} bytes long, the file has {size}")
    try:
        data = json.loads(os.pread(fd, length, _LENGTH_BYTES), object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as exc:
        raise _corrupt(f"Its header is not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise _corrupt("Its header is no object")
    metadata = data.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt("Its metadata are not texts")
    tensors = {name: _tensor(name, entry) for name, entry in data.items()}
    _check_cover(tensors.values(), size - data_at)
    return Header(tensors, metadata, data_at)


def _tensor(name: str, entry: Any) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _corrupt(f"{name} has the unknown dtype {dtype!r}")
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        raise _corrupt(f"{name} has sizes that are no whole numbers")
    if offsets[1] - offsets[0] != size_bytes(dtype, shape):
        raise _corrupt(f"{name} has offsets that do not fit its shape and dtype")
    return Stored(name, dtype, tuple(shape), offsets[0], offsets[1])


def _check_cover(tensors: Iterable[Stored], size: int) -> None:
    """Every byte of the data belongs to one tensor, as the format demands: no overlap, no hole, no end missing."""
    at = 0
    for tensor in sorted(tensors, key=lambda t: (t.start, t.end)):
        if tensor.start != at:
            raise _corrupt(
                f"{tensor.name} {'overlaps' if tensor.start < at else 'leaves a hole after'} what is before it"
            )
        if tensor.end > size:
            raise _corrupt(f"{tensor.name} ends after the end of the file")
        at = tensor.end
    if at != size:
        raise _corrupt(f"{size - at} bytes after its last tensor belong to none")


def is_sizes(value: Any) -> bool:
    """A JSON list of whole numbers of zero or more."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`. Raises `ValueError` where a key comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _corrupt(why: str) -> SnapshotCorrupt:
    return SnapshotCorrupt("The weights file cannot be used.", why=f"{why}.")
