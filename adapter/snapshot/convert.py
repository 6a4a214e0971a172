"""Checkpoints of others made into one weight snapshot, tensor by tensor in bounded memory.

    safetensors     one file, or shards with their ``model.safetensors.index.json``: the bytes as they are
    PyTorch         ``.bin`` ``.pt`` ``.pth``, one or shards with their index; read with ``weights_only=True`` and mapped,
                    so a file that asks for code is refused by name, and ties and strides are kept
    GGUF            one file; dequantised, since nothing in torch computes with its blocks, and named as the model does

What comes out has the tensors of a `state_dict`: `weights.fill` leaves what it does not name (non-persistent
buffers, ties that were written once) to `build`. Checkpoints are input by strangers: they are read with distrust.

    python -m adapter.snapshot.convert SOURCE FOLDER [--names FILE] [--dtype TYPE]
                    for builders, in an interpreter that has torch; one JSON line on stdout: the result or the error
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import stat
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError, ConfigError, SnapshotCorrupt, SnapshotError
from adapter.snapshot.layout import TORCH_TYPES, Slot, Tensor, cut
from adapter.snapshot.tensorfile import ITEM_BYTES, read_header, size_bytes, without_repetition
from adapter.snapshot.weightsfile import Part, writing

_FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""What a checkpoint's folder is read from: the first that is there, else its only GGUF file."""

_PICKLED = {".bin", ".pt", ".pth"}
_INDEX_LIMIT_BYTES = 2**26
_SHARD_LIMIT = 1000
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,255}")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Where training scripts put the tensors when they save more than them."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written; `left_out` are entries of the checkpoint that it is not: no tensors, or not asked for."""

    tensors: int
    bytes: int
    left_out: tuple[str, ...]


def convert(source: Path, folder: Path, *, names: Collection[str] = (), dtype: str = "float32") -> Converted:
    """Write the checkpoint `source`, a file or a folder of them, as the weight snapshot in `folder`.

    Only for GGUF: `names` are those of the model's tensors (``model.state_dict()``), `dtype` is torch's name
    of the type they get. Raises `SnapshotError` (code ``bad-checkpoint``, ``unsafe-checkpoint``) naming the
    file or tensor at fault, with nothing written.
    """
    path = _file_of(source)
    with ExitStack() as files:
        if path.suffix == ".gguf":
            checkpoint = _gguf(path, names, dtype)
        else:
            shards = _shards(path)
            kinds = {shard.suffix for shard in shards}
            if kinds == {".safetensors"}:
                checkpoint = _safetensors(shards, files)
            elif kinds <= _PICKLED:
                checkpoint = _pickled(shards)
            else:
                raise _bad(path, "It is of no kind that is known: safetensors, GGUF, PyTorch")
            _check_names(path, shards, checkpoint)
        if not checkpoint.tensors:
            raise _bad(path, "It holds no tensors")
        with writing(folder) as writer:
            writer.write(checkpoint.parts)
            writer.finish(checkpoint.tensors, [], complete=False)
    size = sum(size_bytes(part.dtype, part.shape) for part in checkpoint.parts)
    return Converted(len(checkpoint.tensors), size, tuple(sorted(checkpoint.left_out)))


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """What there is to write; parts are read when they are written."""

    tensors: list[Tensor]
    parts: Sequence[Part]
    left_out: list[str]

    @classmethod
    def plain(cls, parts: Sequence[Part], left_out: list[str]) -> _Checkpoint:
        """Each part is one contiguous tensor."""
        return cls([_whole(part) for part in parts], parts, left_out)


def _whole(part: Part) -> Tensor:
    strides: list[int] = []
    step = 1
    for size in reversed(part.shape):
        strides.insert(0, step)
        step *= max(1, size)
    return Tensor((part.name,), part.name, TORCH_TYPES[part.dtype], part.shape, tuple(strides), 0, None)


# Files ----------------------------------------------------------------------------------------------------------


def _file_of(source: Path) -> Path:
    if not source.is_dir():
        return source
    for name in _FOLDER_FILES:
        if (source / name).exists():
            return source / name
    found = sorted(source.glob("*.gguf"))
    if len(found) != 1:
        many = f"It has several GGUF files: {', '.join(path.name for path in found[:4])}" if found else ""
        raise _bad(source, many or f"It has none of {', '.join(_FOLDER_FILES)} and *.gguf")
    return found[0]


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint -> the tensors that its index wants of each; None: all that are there."""
    if path.suffix != ".json":
        return {path: None}
    with _opened(path) as fd:
        text = os.pread(fd, _INDEX_LIMIT_BYTES + 1, 0)
    try:
        if len(text) > _INDEX_LIMIT_BYTES:
            raise ValueError("it is too large")
        places = json.loads(text, object_pairs_hook=without_repetition)["weight_map"]
        shards: dict[Path, set[str] | None] = {}
        for name, file in places.items():
            if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
                raise ValueError(f"{name} is in a file named {file!r}")
            wanted = shards.setdefault(path.parent / file, set())
            assert wanted is not None
            wanted.add(name)
        if len(shards) > _SHARD_LIMIT:
            raise ValueError("it names too many files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise _bad(path, f"It is no index of a sharded checkpoint: {exc}") from exc
    return shards


def _check_names(path: Path, shards: Mapping[Path, set[str] | None], checkpoint: _Checkpoint) -> None:
    """Every tensor that the index names was found where it says."""
    named = {name for wanted in shards.values() for name in wanted or ()}
    missing = named - {name for tensor in checkpoint.tensors for name in tensor.names}
    if missing:
        raise _bad(path, f"It names {min(missing)}, which its file does not hold")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A regular file, also behind a link: model hubs' folders are full of them."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise _bad(path, f"{exc.strerror}") from exc
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _bad(path, "It is not a file")
        yield fd
    finally:
        os.close(fd)


def _bad(path: Path, why: str) -> SnapshotError:
    return SnapshotError(f"{path.name} cannot be converted.", why=f"{why}.", code="bad-checkpoint")


# safetensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Range:
    """A tensor as it lies in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    fd: int
    at: int
    size: int

    @property
    def alignment(self) -> int:
        return ITEM_BYTES[self.dtype]

    def chunks(self, limit_bytes: int) -> Iterator[memoryview]:
        done = 0
        while done < self.size:
            try:
                chunk = os.pread(self.fd, min(limit_bytes, self.size - done), self.at + done)
            except OSError as exc:
                raise _bad(self.path, f"{self.name}: {exc.strerror}") from exc
            if not chunk:
                raise _bad(self.path, f"It has become shorter while {self.name} was read")
            yield memoryview(chunk)
            done += len(chunk)


def _safetensors(shards: Mapping[Path, set[str] | None], files: ExitStack) -> _Checkpoint:
    parts: list[Part] = []
    left_out: list[str] = []
    for path, wanted in shards.items():
        fd = files.enter_context(_opened(path))
        try:
            header = read_header(fd)
        except SnapshotCorrupt as exc:
            raise _bad(path, exc.why.rstrip(".")) from exc
        for item in header.tensors.values():
            if wanted is not None and item.name not in wanted:
                left_out.append(item.name)
                continue
            at = header.data_at + item.start
            parts.append(_Range(item.name, item.dtype, item.shape, path, fd, at, item.size_bytes))
    return _Checkpoint.plain(parts, left_out)


# PyTorch --------------------------------------------------------------------------------------------------------


def _pickled(shards: Mapping[Path, set[str] | None]) -> _Checkpoint:
    import torch

    slots: dict[str, Slot] = {}
    left_out: list[str] = []
    seen: dict[tuple[object, ...], Any] = {}
    for path, wanted in shards.items():
        contents = _load_pickled(path)
        for name, value in contents.items():
            if not isinstance(value, torch.Tensor) or (wanted is not None and name not in wanted):
                left_out.append(str(name))
                continue
            same = seen.setdefault(_view_of(value), value)  # tied: one tensor again
            slots[str(name)] = Slot(str(name), None, str(name), same, is_parameter=True)
    tensors, parts = cut(slots.values())
    return _Checkpoint([replace(tensor, requires_grad=None) for tensor in tensors], parts, left_out)


def _view_of(value: Any) -> tuple[object, ...]:
    """Alike for tensors that are the same view of the same memory."""
    import torch

    if value.layout != torch.strided or not value.numel():
        return (id(value),)
    storage = value.untyped_storage()
    return storage.data_ptr(), value.storage_offset(), value.dtype, tuple(value.shape), value.stride()


def _load_pickled(path: Path) -> Mapping[Any, Any]:
    """The file's tensors, mapped, without running anything of it."""
    import torch

    with _opened(path):
        pass
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as exc:  # a hostile file may raise anything in torch's reader
        asked = re.search(r"GLOBAL ([\w.]+)", str(exc))
        if asked:
            raise SnapshotError(
                f"{path.name} holds more than tensors.",
                why=f"To read it, {asked[1]} would have to run.",
                hint="Save only the tensors: torch.save(model.state_dict(), …), or as safetensors.",
                code="unsafe-checkpoint",
            ) from exc
        if not zipfile.is_zipfile(path):
            raise _bad(path, "It is no file of torch.save, or in its form before torch 1.6; save it anew") from exc
        raise _bad(path, f"torch cannot read it: {str(exc).partition(chr(10))[0]}") from exc
    while isinstance(contents, Mapping) and not any(isinstance(value, torch.Tensor) for value in contents.values()):
        inner = [contents[name] for name in _WRAPPERS if isinstance(contents.get(name), Mapping)]
        if not inner:
            break
        contents = inner[0]
    if not isinstance(contents, Mapping):
        raise _bad(path, f"It holds a {type(contents).__name__}, not tensors by name")
    return contents


# GGUF -----------------------------------------------------------------------------------------------------------

_AS_IN_THE_MODEL = {"qwen2", "qwen3", "phi3", "starcoder2"}
_ROWS_OF_HEADS_APART = {"llama"}
"""Architectures whose tensors GGUF keeps as the model has them; and one that needs its heads' rows put back in order,
because GGUF has the two halves of each head's rotation interleaved. Others change values in ways of their own."""

_ROTATED = re.compile(r"blk\.\d+\.attn_(q|k)\.(weight|bias)")
_GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A tensor of a GGUF file, dequantised while it is written, `order` being that of its rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: Any
    kind: Any
    order: Any

    @property
    def alignment(self) -> int:
        return ITEM_BYTES[self.dtype]

    def chunks(self, limit_bytes: int) -> Iterator[memoryview]:
        import gguf
        import torch

        step = max(1, limit_bytes // (4 * (math.prod(self.shape) // len(self.rows))))  # float32 in between
        for at in range(0, len(self.rows), step):
            rows = self.rows[at : at + step] if self.order is None else self.rows[self.order[at : at + step]]
            values = torch.from_numpy(gguf.dequantize(rows, self.kind).copy()).to(
                getattr(torch, TORCH_TYPES[self.dtype])
            )
            yield memoryview(values.view(torch.uint8).reshape(-1).numpy()).cast("B")


def _gguf(path: Path, names: Collection[str], dtype: str) -> _Checkpoint:
    if dtype not in _GGUF_TYPES:
        raise ConfigError(f"{dtype} is no type for dequantised weights.", hint=f"Use one of {', '.join(_GGUF_TYPES)}.")
    if not names:
        raise ConfigError(
            "GGUF names tensors in a way of its own.", hint="Give the names of the model's: model.state_dict()."
        )
    reader = _read_gguf(path)
    architecture = str(_field(path, reader, "general.architecture", str))
    if architecture not in _AS_IN_THE_MODEL | _ROWS_OF_HEADS_APART:
        raise _bad(path, f"How GGUF keeps the tensors of {architecture!r} models is not known here")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    parts: list[Part] = []
    left_out = set(stored)
    for name, theirs in _gguf_names(path, reader, architecture, names).items():
        tensor = stored.get(theirs)
        if tensor is not None:
            order = None
            if architecture in _ROWS_OF_HEADS_APART and _ROTATED.fullmatch(theirs):
                order = _row_order(path, reader, architecture, tensor)
            parts.append(_blocks(path, name, tensor, _GGUF_TYPES[dtype], order))
            left_out.discard(theirs)
    return _Checkpoint.plain(parts, list(left_out))


def _read_gguf(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as exc:
        raise SnapshotError(
            f"{path.name} cannot be converted.",
            why="The package gguf is not installed.",
            hint="Install: gpufn[convert]",
            code="no-gguf",
        ) from exc
    with _opened(path):
        pass
    try:
        return GGUFReader(path)
    except Exception as exc:  # a hostile file may raise anything in a foreign reader
        raise _bad(path, f"It is no GGUF file that can be read: {str(exc) or type(exc).__name__}") from exc


def _field(path: Path, reader: Any, name: str, kind: type) -> Any:
    field = reader.get_field(name)
    try:
        value = None if field is None else field.contents()
    except Exception as exc:
        raise _bad(path, f"Its {name} cannot be read") from exc
    if not isinstance(value, kind):
        raise _bad(path, f"Its {name} is {value!r}")
    return value


def _gguf_names(path: Path, reader: Any, architecture: str, names: Iterable[str]) -> dict[str, str]:
    """The model's name of a tensor -> GGUF's."""
    import gguf

    layers = _field(path, reader, f"{architecture}.block_count", int)
    if not 0 <= layers <= len(reader.tensors):
        raise _bad(path, f"It would have {layers} layers")
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(number, layers)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    return {name: theirs for name, theirs in found.items() if theirs is not None}


def _row_order(path: Path, reader: Any, architecture: str, tensor: Any) -> Any:
    """Where the rows of a query or key tensor, as the model has them, are in the file.

    GGUF has (head, place in the half, half) where the model has (head, half, place in the half).
    """
    import numpy as np

    heads = _field(path, reader, f"{architecture}.attention.head_count", int)
    if ".attn_k." in tensor.name and reader.get_field(f"{architecture}.attention.head_count_kv") is not None:
        heads = _field(path, reader, f"{architecture}.attention.head_count_kv", int)
    rows = int(tensor.shape[-1])
    if heads <= 0 or rows % (2 * heads):
        raise _bad(path, f"{tensor.name} has {rows} rows for {heads} heads")
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _blocks(path: Path, name: str, tensor: Any, dtype: str, order: Any) -> _Blocks:
    import gguf
    import numpy as np

    shape = tuple(int(size) for size in reversed(tensor.shape))
    if not shape or 0 in shape:
        raise _bad(path, f"{tensor.name} has the shape {list(shape)}")
    data = np.asarray(tensor.data)
    rows = data.reshape(-1, 1) if order is not None and len(shape) == 1 else data.reshape(-1, data.shape[-1])
    try:
        gguf.dequantize(rows[:1], tensor.tensor_type)
    except Exception as exc:
        raise _bad(
            path, f"{tensor.name} is of the type {tensor.tensor_type.name}, which cannot be dequantised"
        ) from exc
    return _Blocks(name, dtype, shape, rows, tensor.tensor_type, order)


# Command --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 with ``{"tensors", "bytes", "left_out"}``, 1 with ``{"error": …}`` as `AdapterError.to_json` has it."""
    parser = argparse.ArgumentParser(prog="python -m adapter.snapshot.convert")
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--names", type=Path, help="file with a JSON list of the model's tensors (GGUF)")
    parser.add_argument("--dtype", default="float32", help="what GGUF is dequantised to")
    wanted = parser.parse_args(arguments)
    try:
        names = json.loads(wanted.names.read_bytes()) if wanted.names else ()
        result: dict[str, object] = asdict(convert(wanted.source, wanted.folder, names=names, dtype=wanted.dtype))
        failed = False
    except AdapterError as error:
        result, failed = error.to_json(), True
    except ImportError as error:
        missing = SnapshotError(
            f"{wanted.source.name} cannot be converted.",
            why=f"{error.name or error} is not installed in {sys.executable}.",
            hint="Name it in the function's requirements, or bring the weights as safetensors, which need nothing.",
            code="convert-needs",
        )
        result, failed = missing.to_json(), True
    sys.stdout.write(json.dumps(result) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
