"""Weights onto a GPU: everything but torch's own allocator is real, on a simulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapter.errors import GpuError
from adapter.gpu import vmm
from adapter.snapshot import weights
from tests.stubs.simulated import Simulated

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.gpu]

PRELUDE = """
import torch
from pathlib import Path
from adapter.errors import GpuError
from adapter.gpu import vmm
from adapter.snapshot import weights
from adapter.snapshot.layout import slots_of
use()

def to_torch(address, size):  # device memory; torch takes it for the processor's
    return torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)

def view(region, start, size, device):
    assert device.type == "cuda"
    made = region.view(start, size)
    [length], [address, read_only] = made.__cuda_array_interface__["shape"], made.__cuda_array_interface__["data"]
    assert not read_only
    views.append(made)  # torch keeps what it has a view of
    return to_torch(address, length)

def empty(size, device):
    own.append(size)
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    address = int(ok(cuda.cuMemAlloc(size)))
    ok(cuda.cuMemsetD8(address, 255, size))
    return to_torch(address, size)

class Stream:
    def synchronize(self):
        waited.append(self)

waited, own, views = [], [], []
weights._view, weights._empty = view, empty
torch.cuda.current_stream = lambda device: Stream()
torch.cuda.current_device = lambda: 0

def build():
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Embedding(500, 700), torch.nn.Linear(700, 900), torch.nn.Linear(700, 500, bias=False), torch.nn.BatchNorm1d(7))
    model[2].weight = torch.nn.Parameter(model[0].weight.detach())
    model[1].weight = torch.nn.Parameter(model[1].weight.detach().t().contiguous().t())
    model.register_buffer("odd", torch.arange(33, dtype=torch.int8)[1:])
    model.register_buffer("none", torch.empty(0))
    return model.eval()

def check():
    for a, b in zip(slots_of(reference), slots_of(model)):
        assert torch.equal(a.value, b.value), a.name
        assert a.value.stride() == b.value.stride(), a.name
        storage = b.value.untyped_storage()
        if storage.nbytes():
            ok(cuda.cuMemcpyDtoH(bytearray(storage.nbytes()), storage.data_ptr(), storage.nbytes()))
    assert model[0].weight.data_ptr() == model[2].weight.data_ptr()

def used():
    free, total = ok(cuda.cuMemGetInfo())
    return total - free

folder, reference = Path(sys.argv[1]), build()
weights.save(reference, folder)
with torch.device("meta"):
    model = build()
"""


def ran(simulated: Simulated, folder: Path, program: str, *arguments: str) -> list[str]:
    repository = str(Path(__file__).parents[3])
    return simulated.run(PRELUDE + program, str(folder), *arguments, PYTHONPATH=repository).splitlines()


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_weights_are_streamed_bit_for_bit_with_ties_and_strides(
    device: str, simulated: Simulated, tmp_path: Path
) -> None:
    said = ran(
        simulated, tmp_path, "weights.fill(model, folder, sys.argv[2]); check(); print(len(waited), own)", device
    )
    assert said == ["1 [0]"], "all in memory that can leave, but what has no bytes"


def test_weights_leave_and_come_back_at_the_same_addresses(simulated: Simulated, tmp_path: Path) -> None:
    program = """
weights.fill(model, folder, "cuda")
full = used()
addresses = [slot.value.data_ptr() for slot in slots_of(model)]
for _ in range(2):
    given_up = weights.release(model, folder)
    print(given_up == full > 4_000_000, used(), weights.release(model, folder))
    weights.refill(model, folder)
    check()
    print(used() == full, addresses == [slot.value.data_ptr() for slot in slots_of(model)])
model[1].weight.data_ptr()
with torch.no_grad():
    model[1].weight.zero_()
weights.refill(model, folder)
print(bool(model[1].weight.any()), "is not brought back without having been given up")
"""
    gone, back = "True 0 0", "True True"
    assert ran(simulated, tmp_path, program) == [
        *(gone, back, gone, back),
        "False is not brought back without having been given up",
    ]


def test_memory_is_given_back_with_the_model(simulated: Simulated, tmp_path: Path) -> None:
    program = """
weights.fill(model, folder, "cuda")
before = used()
del model
views.clear()
import gc; gc.collect()
print(before > 0, used(), len(weights._regions))
"""
    assert ran(simulated, tmp_path, program) == ["True 0 0"]


def test_weights_of_which_some_went_elsewhere_stay_on_the_gpu(simulated: Simulated, tmp_path: Path) -> None:
    program = """
weights.fill(model, folder, "cuda")
full = used()
model[1].bias = torch.nn.Parameter(model[1].bias.detach().clone())
weights.release(model, folder)
weights.refill(model, folder)
print(used() == full, all(torch.equal(a.value, b.value) for a, b in zip(slots_of(reference), slots_of(model))))
"""
    assert ran(simulated, tmp_path, program) == ["True True"]


def test_a_driver_without_reserved_addresses_gets_plain_memory(simulated: Simulated, tmp_path: Path) -> None:
    simulated.fault("cuMemAddressReserve 1 fail 801")  # CUDA_ERROR_NOT_SUPPORTED
    assert ran(simulated, tmp_path, 'weights.fill(model, folder, "cuda"); check(); print(len(views))') == ["0"]


def test_a_driver_that_cannot_park_such_memory_gets_plain_memory(simulated: Simulated, tmp_path: Path) -> None:
    program = 'weights.fill(model, folder, "cuda", keeps_addresses=False); check(); print(len(views), len(own) > 5)'
    assert ran(simulated, tmp_path, program) == ["0 True"]


def test_no_room_when_the_weights_come_back_is_said_so_and_can_be_tried_again(
    simulated: Simulated, tmp_path: Path
) -> None:
    simulated.fault("cuMemCreate 2 fail 2")
    program = """
weights.fill(model, folder, "cuda")
weights.release(model, folder)
try:
    weights.refill(model, folder)
except GpuError as error:
    print(error.code, used())
weights.refill(model, folder)
check()
"""
    assert ran(simulated, tmp_path, program) == ["gpu-out-of-memory 0"]


def test_a_gpu_without_room_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")

    def no_region(*_: object) -> None:
        raise GpuError("The GPU driver refused.", why="Not supported.")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    weights.save(torch.nn.Linear(3, 3), tmp_path)
    monkeypatch.setattr(weights, "_empty", full)
    monkeypatch.setattr(vmm, "Region", no_region)
    with pytest.raises(GpuError, match="no memory left") as caught:
        weights.fill(torch.nn.Linear(3, 3, device="meta"), tmp_path, "cuda")
    assert caught.value.code == "gpu-out-of-memory"
    assert "More words" not in caught.value.why


def test_the_cpus_way_imports_no_gpu(tmp_path: Path, repository: Path) -> None:
    program = """
import sys, torch
from pathlib import Path
before = set(sys.modules)  # torch may bring the bindings itself
from adapter.snapshot import weights
weights.save(torch.nn.Linear(3, 3), Path(sys.argv[1]))
weights.fill(torch.nn.Linear(3, 3, device="meta"), Path(sys.argv[1]))
print("filled", *(name for name in set(sys.modules) - before if name.startswith(("adapter.gpu", "cuda"))))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    said = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(repository)}, capture_output=True, text=True)
    assert said.stdout.split() == ["filled"], said.stderr
