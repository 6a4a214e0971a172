"""Weight snapshots: the tensors of a model as a file that is mapped or streamed, not read.

`save` writes what `load` made; `fill` gives it to what `build` made, bit for bit: tied tensors stay
tied, strides stay, non-persistent buffers are there. On the CPU the parameters are private mappings:
replicas share the page cache, and a replica that writes to one gets a page of its own. On a GPU they are
streamed (`adapter.gpu.stream`) into memory that can leave and come back at the same addresses (`adapter.gpu.vmm`).
`release` gives up the memory of a model's weights before its process is snapshotted, `refill` brings it back
after. The files are `weightsfile`'s. No pickle.
torch is imported where it is used, so that looking at a snapshot does not need it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from weakref import WeakSet

from adapter.errors import GpuError, SnapshotCorrupt, SnapshotError, SnapshotMismatch
from adapter.pagecache import ReadAhead, populate
from adapter.snapshot.layout import Slot, Tensor, cut, end_bytes, slots_of, submodules_of
from adapter.snapshot.tensorfile import Header
from adapter.snapshot.weightsfile import DATA, INDEX, Index, reading, verify, writing

if TYPE_CHECKING:
    from adapter.gpu.vmm import Region

__all__ = ["DATA", "INDEX", "fill", "read_ahead", "refill", "release", "save", "verify"]


def save(model: object, folder: Path) -> None:
    """Write the weights of every module in `model` into `folder`, which is there and empty of weights.

    Whole or not at all, and read back. Raises `SnapshotError`: no module, a kind of tensor that cannot be
    kept, a full disk.
    """
    slots = slots_of(model)
    if not slots:
        raise SnapshotError("The model has no weights to keep.", why="It holds no torch.nn.Module with tensors.")
    tensors, pieces = cut(slots)
    with writing(folder) as writer:
        writer.write(pieces)
        training = [name for name, module in submodules_of(model) if module.training]
        writer.finish(tensors, training, complete=True)


def fill(model: object, folder: Path, device: str = "cpu", *, keeps_addresses: bool = True) -> None:
    """Give the modules in `model`, on whatever device (meta is the fast one), the saved weights on `device`.

    On a GPU they come back to the same addresses after a `release`, unless `keeps_addresses` is false: for
    drivers that checkpoint no process with memory of that kind.
    Raises `SnapshotCorrupt` for files that are not what `save` writes or that the disk cannot read,
    `SnapshotMismatch` naming the tensor for a model that is not the saved one, `GpuError`.
    Contents are not checked here: see `verify`.
    """
    import torch

    slots = {slot.name: slot for slot in slots_of(model)}
    with reading(folder) as (file, header, index):
        places = _places(index, slots)
        bases = _bases(file, header, torch.device(device), keeps_addresses=keeps_addresses)
    with torch.no_grad():
        for tensor in index.tensors:
            _assign(places[tensor.names[0]], tensor, bases[tensor.piece])
    training = set(index.training)
    for name, module in submodules_of(model):
        if not index.complete:
            module.to(device)  # what the checkpoint does not have is as `build` made it
        module.training = name in training
        _check_nothing_left(name, module)


def release(model: object, folder: Path) -> int:
    """Give up the memory of the weights in `model` that `refill` can bring back from `folder`; returns the bytes.

    The tensors stay what they are, without memory: nobody may use them until then. Those that `fill` put on a
    GPU keep their addresses, which CUDA graphs have learned. What is mapped from a file stays mapped, since it
    is no memory of the process. Raises `SnapshotMismatch` with nothing given up, `GpuError`.
    """
    import torch

    with reading(folder) as (_, _, index):
        homes = _homes(index, {slot.name: slot for slot in slots_of(model)})
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    given_up, region = 0, _region_of(homes)
    if region is not None and region.is_mapped:
        region.unmap()
        given_up += region.size_bytes
    for home in homes.values():
        if home.storage.resizable():
            given_up += home.storage.nbytes()
            home.storage.resize_(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # torch would keep it for its next allocation
    return given_up


def refill(model: object, folder: Path) -> None:
    """Bring back what `release` gave up: the very same tensors, with their ties and strides, as they were saved.

    Raises `SnapshotCorrupt`, `SnapshotMismatch`, `GpuError`; the model is then of no use.
    """
    slots = {slot.name: slot for slot in slots_of(model)}
    with reading(folder) as (file, header, index):
        homes = _homes(index, slots)
        region = _region_of(homes)
        is_empty = region is not None and not region.is_mapped
        if region is not None:
            region.map()
        released = {_key(home.storage): home for home in homes.values() if is_empty or not home.storage.nbytes()}
        for home in released.values():
            if not home.storage.nbytes():
                with _gpu_memory():
                    home.storage.resize_(home.storage_bytes)
        sizes: dict[str, int] = defaultdict(int)
        for tensor in index.tensors:
            sizes[tensor.piece] = max(sizes[tensor.piece], tensor.end_bytes)
        wanted = [
            (header.data_at + header.tensors[piece].start, _bytes_of(home.storage, home.start, sizes[piece]))
            for piece, home in homes.items()
            if _key(home.storage) in released
        ]
        _read(file, wanted)


def read_ahead(folder: Path) -> ReadAhead:
    """Begin to bring the weights in `folder` into the page cache: while Python imports, or CRIU restores.

    Never fails; stop it before the process forks or is snapshotted.
    """
    return ReadAhead(folder / DATA)


def _places(index: Index, slots: dict[str, Slot]) -> dict[str, list[Slot]]:
    """The first name of each saved tensor -> the places of the model that it belongs to. Raises `SnapshotMismatch`."""
    tied: dict[int, list[Slot]] = defaultdict(list)
    for slot in slots.values():
        tied[id(slot.value)].append(slot)
    places = {}
    for tensor in index.tensors:
        for name in tensor.names:
            if name not in slots:
                raise _mismatch(name, "the model that `build` makes")
            _check_fit(slots[name], tensor)
        held = {name: slots[name] for name in tensor.names}
        if not index.complete:  # checkpoints name tied tensors once
            held |= {slot.name: slot for name in tensor.names for slot in tied[id(slots[name].value)]}
        places[tensor.names[0]] = list(held.values())
    found = {slot.name for held in places.values() for slot in held}
    for name in sorted(slots.keys() - found):
        if index.complete:
            raise _mismatch(name, "the snapshot")
        if slots[name].value.is_meta:
            raise SnapshotMismatch(
                f"{name} is not in the snapshot, and `build` gives it no data.",
                why="The snapshot was converted from a checkpoint, which does not hold everything.",
                hint="Make it on the CPU: with torch.device('cpu') around it.",
            )
    return places


def _mismatch(name: str, where: str) -> SnapshotMismatch:
    return SnapshotMismatch(f"{name} is not in {where}.", why="The weights are of another model.")


def _check_fit(slot: Slot, tensor: Tensor) -> None:
    found = slot.value
    if tuple(found.shape) != tensor.shape:
        raise SnapshotMismatch(f"{slot.name} has the shape {list(found.shape)}, the snapshot {list(tensor.shape)}.")
    if found.dtype != tensor.torch_dtype():
        raise SnapshotMismatch(
            f"{slot.name} is {found.dtype} where `build` makes it, and torch.{tensor.dtype} in the snapshot.",
            hint="Let `build` use the data type that `load` does.",
        )


def _bases(file: IO[bytes], header: Header, device: Any, *, keeps_addresses: bool) -> dict[str, Any]:
    """The bytes of each stored tensor as a uint8 tensor with a storage of its own on `device`."""
    import torch

    stored = header.tensors.values()
    if device.type == "cuda":
        region = _mapped_region(header, device) if keeps_addresses else None
        bases = _on_gpu(header, device, region)
        _stream(file, [(header.data_at + item.start, bases[item.name]) for item in stored], device)
        return bases
    whole = _mapped(file)
    bases = {}
    for item in stored:
        at, size = header.data_at + item.start, item.size_bytes
        base = (
            torch.frombuffer(whole, dtype=torch.uint8, count=size, offset=at)
            if size
            else torch.empty(0, dtype=torch.uint8)
        )
        bases[item.name] = base.to(device)
    return bases


def _mapped_region(header: Header, device: Any) -> Region | None:
    """Reserved addresses with memory for all of them; None where the driver has none (some virtual GPUs)."""
    from adapter.gpu.vmm import Region

    size = max((item.start + item.size_bytes for item in header.tensors.values()), default=0)
    try:
        region = Region(max(size, 1), _number(device))
        region.map()
    except GpuError as error:
        if error.code == "gpu-out-of-memory":
            raise
        return None
    _regions.add(region)
    return region


def _on_gpu(header: Header, device: Any, region: Region | None) -> dict[str, Any]:
    """Memory for each stored tensor, in the region or of torch's own."""
    with _gpu_memory():
        return {
            item.name: _view(region, item.start, item.size_bytes, device)
            if region is not None and item.size_bytes
            else _empty(item.size_bytes, device)
            for item in header.tensors.values()
        }


_regions: WeakSet[Region] = WeakSet()
"""Where weights are on GPUs, for as long as tensors are there."""


def _region_of(homes: Mapping[str, _Home]) -> Region | None:
    """The region in which all of them lie, with memory behind it or without. None: not all of them lie in one."""
    addresses = [home.storage.data_ptr() for home in homes.values() if home.storage.nbytes()]
    for region in _regions:
        end = region.address + region.size_bytes
        if addresses and all(region.address <= address < end for address in addresses):
            return region
    return None


def _view(region: Region, start: int, size: int, device: Any) -> Any:
    import torch

    return torch.as_tensor(region.view(start, size), device=device)


def _mapped(file: IO[bytes]) -> mmap.mmap:
    """The whole file as private memory, every page there."""
    whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        populate(whole)
    except OSError as exc:
        raise _unreadable(exc) from exc
    return whole


def _empty(size: int, device: Any) -> Any:
    import torch

    return torch.empty(size, dtype=torch.uint8, device=device)


def _read(file: IO[bytes], wanted: list[tuple[int, Any]]) -> None:
    """Copy the bytes of the file from each offset on into a uint8 tensor, on whatever device that is."""
    by_device: dict[Any, list[tuple[int, Any]]] = defaultdict(list)
    for at, target in wanted:
        by_device[target.device].append((at, target))
    for device, targets in by_device.items():
        if device.type == "cuda":
            _stream(file, targets, device)
            continue
        for at, target in targets:
            size, address = target.numel(), target.data_ptr()
            _read_into(file, at, memoryview((ctypes.c_char * size).from_address(address)))


def _stream(file: IO[bytes], targets: list[tuple[int, Any]], device: Any) -> None:
    import torch

    from adapter.gpu.stream import stream

    torch.cuda.current_stream(device).synchronize()  # it may still work on memory that torch hands out again
    wanted = [(at, target.numel(), target.data_ptr()) for at, target in targets]
    stream(file.fileno(), wanted, device=_number(device))


def _number(device: Any) -> int:
    import torch

    return int(torch.cuda.current_device() if device.index is None else device.index)


def _read_into(file: IO[bytes], at: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(file.fileno(), [target[done:]], at + done)
        except OSError as exc:
            raise _unreadable(exc) from exc
        if not count:
            raise SnapshotCorrupt(f"{DATA} ends early.", why="It has become shorter while it was read.")
        done += count


def _unreadable(exc: OSError) -> SnapshotCorrupt:
    return SnapshotCorrupt(
        f"{DATA} cannot be read.", why=f"{exc.strerror}: the disk is at fault, or the file has become shorter."
    )


@contextmanager
def _gpu_memory() -> Iterator[None]:
    """Torch's word for a full GPU, in ours."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise GpuError(
            "The GPU has no memory left for the weights.",
            why=f"{exc}.".splitlines()[0],
            hint="Give the function a larger GPU, or a smaller share to the others.",
            code="gpu-out-of-memory",
        ) from exc


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a piece lies in a model that has it: from byte `start` of a storage of `storage_bytes`."""

    storage: Any
    start: int
    storage_bytes: int


def _homes(index: Index, slots: dict[str, Slot]) -> dict[str, _Home]:
    """The home of each piece. Raises `SnapshotMismatch` where the model's tensors do not lie as the saved ones did."""
    places = _places(index, slots)
    found: dict[str, tuple[Any, int]] = {}
    reach: dict[int, int] = defaultdict(int)
    for slot in slots.values():
        key = _key(slot.value.untyped_storage())
        reach[key] = max(reach[key], end_bytes(slot.value))
    for tensor in index.tensors:
        for slot in places[tensor.names[0]]:
            if not slot.value.numel():
                continue
            home = (slot.value.untyped_storage(), (slot.value.storage_offset() - tensor.offset) * tensor.item_bytes)
            known = found.setdefault(tensor.piece, home)
            if not _lies_alike(slot.value, tensor) or (_key(known[0]), known[1]) != (_key(home[0]), home[1]):
                raise SnapshotMismatch(f"{slot.name} lies in memory otherwise than the saved one.")
    homes = {piece: _Home(storage, start, reach[_key(storage)]) for piece, (storage, start) in found.items()}
    shared = {_key(home.storage) for home in homes.values()}
    for name in sorted(slots.keys() - {slot.name for held in places.values() for slot in held}):
        if _key(slots[name].value.untyped_storage()) in shared:
            raise SnapshotMismatch(f"{name} is not in the snapshot, and lies in the memory of a tensor that is.")
    return homes


def _lies_alike(value: Any, tensor: Tensor) -> bool:
    return value.stride() == tensor.stride and not value.is_conj() and not value.is_neg()


def _key(storage: Any) -> int:
    """What tells storages apart; a released one has no address."""
    return int(storage._cdata)  # noqa: SLF001


def _bytes_of(storage: Any, start: int, size: int) -> Any:
    import torch

    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, start, (size,), (1,))


def _assign(slots: list[Slot], tensor: Tensor, base: Any) -> None:
    """Put one tensor, a view of its base, into all places that shared it."""
    import torch

    value = base.view(tensor.torch_dtype()).as_strided(tensor.shape, tensor.stride, tensor.offset)
    if any(slot.is_parameter for slot in slots):
        wanted = slots[0].value.requires_grad if tensor.requires_grad is None else tensor.requires_grad
        value = torch.nn.Parameter(value, requires_grad=wanted)
    for slot in slots:
        if slot.is_parameter:
            setattr(slot.owner, slot.attribute, value)  # not into _parameters: recurrent layers listen
        else:
            slot.owner._buffers[slot.attribute] = value  # noqa: SLF001  # a Parameter here must stay a buffer


def _check_nothing_left(name: str, module: Any) -> None:
    """A tensor that is neither parameter nor buffer was not saved: on the meta device it would have no data."""
    import torch

    for attribute, value in vars(module).items():
        if not isinstance(value, (torch.Tensor, list, tuple)):
            continue
        held = (value,) if isinstance(value, torch.Tensor) else value
        if any(isinstance(item, torch.Tensor) and item.is_meta for item in held):
            raise SnapshotMismatch(
                f"{'.'.join(filter(None, (name, attribute)))} has no data.",
                why="It is a plain attribute, which a weight snapshot does not keep.",
                hint="Make it a buffer: self.register_buffer(name, tensor, persistent=False).",
            )
