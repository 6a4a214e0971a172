"""The tensors of a model: where they are held, which of them share memory, and how that is cut into pieces.

A model is whatever `load` returns: a module, or modules in dicts, lists and attributes of simple objects.
Each tensor gets a name from its place. Those that overlap in memory are kept in one piece, so that they
share it again when they come back. torch is imported where it is used.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from adapter.errors import SnapshotError
from adapter.snapshot.tensorfile import ITEM_BYTES, is_sizes

_DEPTH = 4
_CONTAINER_LIMIT = 1000
"""Containers with more entries hold data (a vocabulary), not modules."""

_FILE_TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip
_BYTES_ONLY = {"complex128": 16, "complex32": 4, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float4_e2m1fn_x2": 1}
"""Types of torch's that the format has no name for: kept as plain bytes, and their size."""

TORCH_TYPES = {kind: name for name, kind in _FILE_TYPES.items()}
"""The format's name of a data type -> torch's."""

_ITEM_BYTES = {**{name: ITEM_BYTES[kind] for name, kind in _FILE_TYPES.items()}, **_BYTES_ONLY}


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of a model that holds a tensor: ``owner.attribute``, under a name unique in the model."""

    name: str
    owner: Any
    attribute: str
    value: Any
    is_parameter: bool


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as a view of a piece; `offset` and `stride` count items. Tied places are several `names`.

    `requires_grad` is None where a checkpoint did not say it.
    """

    names: tuple[str, ...]
    piece: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    requires_grad: bool | None

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    @property
    def end_bytes(self) -> int:
        """Where its last item ends, counted from the beginning of its piece."""
        return 0 if 0 in self.shape else (self.offset + _span(self.shape, self.stride)) * self.item_bytes

    def torch_dtype(self) -> Any:
        import torch

        return getattr(torch, self.dtype)

    def to_json(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "piece": self.piece,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "stride": list(self.stride),
            "offset": self.offset,
            "requires_grad": self.requires_grad,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tensor:
        """Raises `ValueError`, `KeyError` or `TypeError` on anything that `to_json` does not write."""
        names, shape, stride, offset = data["names"], data["shape"], data["stride"], data["offset"]
        if not is_names(names) or not names:
            raise ValueError("a tensor has no names")
        if not is_sizes(shape) or not is_sizes(stride) or len(shape) != len(stride) or not is_sizes([offset]):
            raise ValueError(f"{names[0]} has sizes that are no whole numbers")
        if data["dtype"] not in _ITEM_BYTES or data["requires_grad"] not in {True, False, None}:
            raise ValueError(f"{names[0]} has the unknown dtype {data['dtype']!r}")
        return cls(
            tuple(names), str(data["piece"]), data["dtype"], tuple(shape), tuple(stride), offset, data["requires_grad"]
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` to `end` of one storage, kept as one tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    alignment: int
    source: Any
    start: int
    end: int

    @property
    def padding_bytes(self) -> int:
        """Zeros after its bytes that make its length a multiple of its alignment."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape) - (self.end - self.start)

    def chunks(self, limit_bytes: int) -> Iterator[memoryview]:
        """Its bytes, in order, at most `limit_bytes` of them at a time; each is gone when the next is asked for."""
        import torch

        for at in range(self.start, self.end, limit_bytes):
            size = min(limit_bytes, self.end - at)
            view = torch.empty(0, dtype=torch.uint8, device=self.source.device)
            chunk = view.set_(self.source.untyped_storage(), at, (size,), (1,)).cpu()
            yield memoryview((ctypes.c_ubyte * size).from_address(chunk.data_ptr()))
        yield memoryview(bytes(self.padding_bytes))


def is_names(value: Any) -> bool:
    """A JSON list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def modules_of(model: object) -> list[tuple[str, Any]]:
    """The outermost modules in `model` with their paths; the path of a model that is one is empty."""
    found: list[tuple[str, Any]] = []
    _collect(model, "", 0, set(), found)
    return found


def _collect(value: Any, path: str, depth: int, seen: set[int], found: list[tuple[str, Any]]) -> None:
    from torch.nn import Module

    if depth > _DEPTH or id(value) in seen or isinstance(value, (str, bytes, int, float, type(None), type)):
        return
    seen.add(id(value))
    if isinstance(value, Module):
        found.append((path, value))
        return
    for name, held in _entries(value):
        _collect(held, f"{path}.{name}" if path else name, depth + 1, seen, found)


def _entries(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, (ModuleType, FunctionType, MethodType)):
        return ()
    if isinstance(value, dict):
        entries = [(str(key), held) for key, held in value.items() if isinstance(key, (str, int))]
    elif isinstance(value, (list, tuple)):
        entries = [(str(number), held) for number, held in enumerate(value)]
    else:
        slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
        entries = [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
        entries += getattr(value, "__dict__", {}).items()
    return entries if len(entries) <= _CONTAINER_LIMIT else ()


def submodules_of(model: object) -> list[tuple[str, Any]]:
    """Every distinct module in `model`, those within others included, under its first name."""
    seen: set[Any] = set()
    return [
        (_joined(path, inner), module)
        for path, outer in modules_of(model)
        for inner, module in outer.named_modules(memo=seen)
    ]


def slots_of(model: object) -> list[Slot]:
    """Every place of `model` that holds a parameter or a buffer, persistent or not.

    Raises `SnapshotError` where two have the same name or a module is no Python object.
    """
    from torch.jit import ScriptModule

    slots: dict[str, Slot] = {}
    for owner_name, module in submodules_of(model):
        if isinstance(module, ScriptModule):
            raise SnapshotError(f"{owner_name or 'The model'} is a TorchScript module, which cannot be filled.")
        for held, is_parameter in ((module._parameters, True), (module._buffers, False)):  # noqa: SLF001
            for attribute, value in held.items():
                name = _joined(owner_name, attribute)
                if value is None:
                    continue
                if name in slots:
                    raise SnapshotError(f"Two tensors of the model are called {name}.")
                slots[name] = Slot(name, module, attribute, value, is_parameter)
    return list(slots.values())


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


@dataclass(frozen=True, slots=True)
class _Held:
    """A distinct tensor with all its places; `start` and `end` are its bytes in its storage."""

    names: tuple[str, ...]
    value: Any
    requires_grad: bool
    start: int
    end: int

    @property
    def dtype(self) -> str:
        return str(self.value.dtype).removeprefix("torch.")


def cut(slots: Iterable[Slot]) -> tuple[list[Tensor], list[Piece]]:
    """The distinct tensors in `slots`, and the pieces of memory that hold them.

    Raises `SnapshotError` naming a tensor that is no plain memory.
    """
    places: dict[int, list[Slot]] = defaultdict(list)
    for slot in slots:
        places[id(slot.value)].append(slot)
    by_storage: dict[object, list[_Held]] = defaultdict(list)
    for tied in places.values():
        held = _held(tied)
        own = (str(held.value.device), held.value.untyped_storage().data_ptr())
        by_storage[own if held.end else held.names].append(held)
    tensors, pieces = [], []
    for group in by_storage.values():
        for overlapping in _overlapping(group):
            piece, views = _piece(overlapping)
            pieces.append(piece)
            tensors.extend(views)
    return tensors, pieces


def _held(tied: list[Slot]) -> _Held:
    import torch

    slot, value = tied[0], tied[0].value
    if torch.nn.parameter.is_lazy(value):
        raise SnapshotError(
            f"{slot.name} has no shape yet.", why="It is lazy and was not used.", code="unsupported-tensor"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    dense = value.layout == torch.strided and not value.is_quantized
    if value.is_meta or not dense or type(value.data) is not torch.Tensor or dtype not in _ITEM_BYTES:
        what = "has no data" if value.is_meta else f"is a {type(value).__name__} of {value.dtype}, {value.layout}"
        raise SnapshotError(f"{slot.name} {what}.", why="Weights are plain dense tensors.", code="unsupported-tensor")
    plain = value.detach().resolve_conj().resolve_neg()
    names = tuple(slot.name for slot in tied)
    if not plain.numel():
        return _Held(names, plain, value.requires_grad, 0, 0)
    first = plain.storage_offset()
    return _Held(names, plain, value.requires_grad, first * plain.itemsize, end_bytes(plain))


def _overlapping(group: list[_Held]) -> Iterator[list[_Held]]:
    """The tensors of one storage, those together that have bytes in common."""
    together: list[_Held] = []
    reached = 0
    for held in sorted(group, key=lambda held: (held.start, held.end)):
        if together and held.start >= reached:
            yield together
            together = []
        together.append(held)
        reached = max(reached, held.end)
    yield together


def _piece(group: list[_Held]) -> tuple[Piece, list[Tensor]]:
    first = group[0]
    alignment = max(held.value.itemsize for held in group)
    start = min(held.start for held in group) // alignment * alignment
    end = max(held.end for held in group)
    dtypes = {held.dtype for held in group}
    dtype = _FILE_TYPES.get(first.dtype, "U8") if len(dtypes) == 1 else "U8"
    shape: tuple[int, ...] = (-(-(end - start) // alignment) * alignment // ITEM_BYTES[dtype],)
    if len(group) == 1 and first.value.is_contiguous() and dtype != "U8":
        shape = tuple(first.value.shape)
    piece = Piece(first.names[0], dtype, shape, alignment, first.value, start, end)
    tensors = [
        Tensor(
            names=held.names,
            piece=piece.name,
            dtype=held.dtype,
            shape=tuple(held.value.shape),
            stride=held.value.stride(),
            offset=max(0, held.start - start) // held.value.itemsize,
            requires_grad=held.requires_grad,
        )
        for held in group
    ]
    return piece, tensors


def end_bytes(value: Any) -> int:
    """Where the last item of a tensor ends, counted from the beginning of its storage."""
    if not value.numel():
        return 0
    return int((value.storage_offset() + _span(tuple(value.shape), value.stride())) * value.itemsize)


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Items from a tensor's first to behind its last, those between that are not its own included."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
