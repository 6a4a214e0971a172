"""The weights of `weights.py` loaded by one library, in a process of its own.

    python -m benchmarks.loaders make FOLDER COPIES            write the model in every library's format
    python -m benchmarks.loaders load FOLDER NAME DEVICE HEAT  load it: {"seconds": […], "bytes", "sum"}
    python -m benchmarks.loaders hold FOLDER                   be a replica: fill at the first line of input, end with it
    python -m benchmarks.loaders stream FOLDER                 stream it to a GPU: {"host_bytes", "seconds", "mode"}

Cold: once, with none of the file's pages in the page cache. They leave it right before the clock starts: some
virtual machines give back to their host what has been free for a moment, and the memory to read into comes slowly
then, whoever reads. Warm: several times, with the pages as they are.

All end alike: the tensors are in the model, on the device, and every byte of them has been read once. What is not
measured is the same for all too: imports, the device's context, and the making of the model on the meta device.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapter.pagecache import resident_ratio
from adapter.snapshot import weights
from adapter.snapshot.tensorfile import read_header

HIDDEN, INNER, GROUPED, WORDS = 2048, 5632, 512, 64_000
LAYERS, SMALL_LAYERS = 12, 8

COPIES = "copies"
"""The file that says how many times the model has its layers."""

FILES = {
    "gpufn": weights.DATA,
    "safetensors": "model.safetensors",
    "safetensors_pread": "model.safetensors",
    "torch_mmap": "model.pt",
    "tensorizer": "model.tensors",
    "fastsafetensors": "model.safetensors",
    "runai": "model.safetensors",
}
"""Loader -> the file that it reads."""


WARM_LOADS = 5


def shapes(copies: int = 1) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each tensor of a language model of 2 GB, a third of its layers quantised.

    Each further copy of the layers adds 1.5 GB.
    """
    yield "embedding.weight", "bfloat16", (WORDS, HIDDEN)
    for number in range(copies * (LAYERS + SMALL_LAYERS)):
        small = number >= copies * LAYERS
        for name, rows, columns in (
            ("attention.q", HIDDEN, HIDDEN),
            ("attention.k", GROUPED, HIDDEN),
            ("attention.v", GROUPED, HIDDEN),
            ("attention.o", HIDDEN, HIDDEN),
            ("mlp.gate", INNER, HIDDEN),
            ("mlp.up", INNER, HIDDEN),
            ("mlp.down", HIDDEN, INNER),
        ):
            yield f"layers.{number}.{name}.weight", "int8" if small else "bfloat16", (rows, columns)
            if small:
                yield f"layers.{number}.{name}.scale", "float16", (rows,)
        yield f"layers.{number}.norm_in.weight", "float32", (HIDDEN,)
        yield f"layers.{number}.norm_out.weight", "float32", (HIDDEN,)
    yield "norm.weight", "float32", (HIDDEN,)
    yield "head.weight", "float16", (WORDS, HIDDEN)


def build(device: str, copies: int = 1) -> Any:
    """A module with these tensors, of any content."""
    import torch

    root = torch.nn.Module()
    for name, dtype, shape in shapes(copies):
        *path, attribute = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:  # noqa: SLF001
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]  # noqa: SLF001
        value = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if value.is_floating_point():
            owner.register_parameter(attribute, torch.nn.Parameter(value))
        else:
            owner.register_buffer(attribute, value)
    return root.eval()


def make(folder: Path, copies: int) -> None:
    """The same random weights for everyone, in each format whose library is here."""
    import torch

    (folder / COPIES).write_text(str(copies), encoding="ascii")
    model = build("cpu", copies)
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    for number, value in enumerate(tensors.values()):
        noise = torch.Generator().manual_seed(number)
        value.view(torch.uint8).random_(0, 256, generator=noise)
    weights.save(model, folder)
    torch.save(tensors, folder / FILES["torch_mmap"])
    _if_installed(_write_safetensors, tensors, folder / FILES["safetensors"])
    _if_installed(_write_tensorizer, tensors, folder / FILES["tensorizer"])
    for name in set(FILES.values()):
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())


def _if_installed(write: Callable[[Any, Path], None], tensors: Any, path: Path) -> None:
    try:
        write(tensors, path)
    except ImportError:
        return


def _write_safetensors(tensors: Any, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt"})


def _write_tensorizer(tensors: Any, path: Path) -> None:
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(path))
    serializer.write_state_dict(tensors)
    serializer.close()


# Each library as its documentation says; what it imports is imported before the clock starts. --------------------


def _gpufn(folder: Path, device: str) -> Callable[[Any], None]:
    return lambda model: weights.fill(model, folder, device)


def _safetensors(folder: Path, device: str, backend: str = "mmap") -> Callable[[Any], None]:
    from safetensors.torch import load_file

    def load(model: Any) -> None:
        tensors = load_file(folder / FILES["safetensors"], device, backend=backend)
        model.load_state_dict(tensors, assign=True)

    return load


def _torch_mmap(folder: Path, device: str) -> Callable[[Any], None]:
    import torch

    def load(model: Any) -> None:
        tensors = torch.load(folder / FILES["torch_mmap"], map_location=device, mmap=True, weights_only=True)
        model.load_state_dict(tensors, assign=True)

    return load


def _tensorizer(folder: Path, device: str) -> Callable[[Any], None]:
    from tensorizer import TensorDeserializer

    def load(model: Any) -> None:
        with TensorDeserializer(str(folder / FILES["tensorizer"]), device=device) as tensors:
            model.load_state_dict(dict(tensors), assign=True)

    return load


def _fastsafetensors(folder: Path, device: str) -> Callable[[Any], None]:
    from fastsafetensors import fastsafe_open

    def load(model: Any) -> None:
        with fastsafe_open(str(folder / FILES["fastsafetensors"]), device=device, nogds=True) as tensors:
            model.load_state_dict({name: tensors.get_tensor(name) for name in tensors.keys()}, assign=True)  # noqa: SIM118

    return load


def _runai(folder: Path, device: str) -> Callable[[Any], None]:
    from runai_model_streamer import SafetensorsStreamer

    def load(model: Any) -> None:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(str(folder / FILES["runai"]))
            tensors = {name: tensor.to(device) for name, tensor in streamer.get_tensors()}  # comes on the CPU
            model.load_state_dict(tensors, assign=True)

    return load


LOADERS: Mapping[str, Callable[[Path, str], Callable[[Any], None]]] = {
    "gpufn": _gpufn,
    "safetensors": _safetensors,
    "safetensors_pread": lambda folder, device: _safetensors(folder, device, "pread"),
    "torch_mmap": _torch_mmap,
    "tensorizer": _tensorizer,
    "fastsafetensors": _fastsafetensors,
    "runai": _runai,
}


def load(folder: Path, name: str, device: str, heat: str) -> dict[str, Any]:
    """Seconds from the files to the last byte read, of each load. The sum tells whether they were the right bytes."""
    import torch

    loader, copies = LOADERS[name](folder, device), int((folder / COPIES).read_text(encoding="ascii"))
    torch.zeros(8, dtype=torch.int64, device=device).sum().item()  # a device's context and the kernel of `touch`
    seconds, sums, size = [], set(), 0
    for _ in range(WARM_LOADS if heat == "warm" else 1):
        model = build("meta", copies)
        if heat == "cold":
            read_through(folder / FILES[name])
            drop(folder / FILES[name])
        began = time.perf_counter()
        loader(model)
        sums.add(touch(model))
        seconds.append(time.perf_counter() - began)
        size = sum(value.nbytes for value in model.state_dict().values())
        del model
        gc.collect()
    [total] = sums
    return {"seconds": seconds, "bytes": size, "sum": total}


def drop(path: Path) -> None:
    """No page of the file is in the page cache. Raises `RuntimeError` where the file system keeps some."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) > 0:
        raise RuntimeError(f"pages of {path} stay in the page cache: nothing cold can be measured here")


def read_through(path: Path) -> None:
    """The whole file is in the page cache, read as `cat` does."""
    buffer = bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    if resident(path) < 1:
        raise RuntimeError(f"{path} does not stay in the page cache: there is too little memory")


def resident(path: Path) -> float:
    with path.open("rb") as file:
        return resident_ratio(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def touch(model: Any) -> int:
    """Read every byte once, in this thread alone: several would wait for each other at each tensor's end."""
    import torch

    threads, total = torch.get_num_threads(), 0
    torch.set_num_threads(1)
    for value in model.state_dict().values():
        total += int(value.detach().view(-1).view(torch.int64).sum())
    torch.set_num_threads(threads)
    return total % 2**64


def hold(folder: Path) -> None:
    model = build("meta")
    print("ready", flush=True)
    sys.stdin.readline()
    weights.fill(model, folder)
    touch(model)
    print("filled", flush=True)
    sys.stdin.read()


def stream(folder: Path) -> dict[str, Any]:
    """Host memory that streaming adds: the process's peak above what it has once the device's memory is there.

    A simulated device keeps its memory in the process; it is written to before, and so part of the base.
    """
    from adapter.gpu.memory import call, context
    from adapter.gpu.stream import stream

    with (folder / weights.DATA).open("rb") as file, context(0):
        header = read_header(file.fileno())
        size = os.fstat(file.fileno()).st_size - header.data_at
        memory = int(call("cuMemAlloc", size))
        call("cuMemsetD8", memory, 0, size)
        call("cuCtxSynchronize")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        base = _status_bytes("VmRSS")
        ranges = [
            (header.data_at + item.start, item.size_bytes, memory + item.start) for item in header.tensors.values()
        ]
        done = stream(file.fileno(), ranges)
        return {"host_bytes": _status_bytes("VmHWM") - base, "seconds": done.seconds, "mode": done.mode.value}


def _status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) * 1024


def main() -> None:
    what, folder, *arguments = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
    if what == "make":
        make(folder, int(arguments[0]))
    elif what == "load":
        print(json.dumps(load(folder, *arguments)))
    elif what == "hold":
        hold(folder)
    elif what == "stream":
        print(json.dumps(stream(folder)))


if __name__ == "__main__":
    main()
