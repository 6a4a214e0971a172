"""Weights onto a GPU: everything but torch's own allocator is real, on a simulated device. Has not run on a real one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from adapter.errors import GpuError
from adapter.snapshot import weights
from tests.stubs.simulated import Simulated

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.gpu]

PROGRAM = """
import torch
from pathlib import Path
from adapter.snapshot import weights
from adapter.snapshot.layout import slots_of
use()

def empty(size, device):
    assert device.type == "cuda"
    address = int(ok(cuda.cuMemAlloc(size)))
    ok(cuda.cuMemsetD8(address, 255, size))
    return torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)  # device memory, to torch: the CPU's

class Stream:
    def synchronize(self):
        waited.append(self)

waited = []
weights._empty = empty
torch.cuda.current_stream = lambda device: Stream()
torch.cuda.current_device = lambda: 0

def build():
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Embedding(500, 700), torch.nn.Linear(700, 900), torch.nn.Linear(700, 500, bias=False), torch.nn.BatchNorm1d(7))
    model[2].weight = torch.nn.Parameter(model[0].weight.detach())
    model[1].weight = torch.nn.Parameter(model[1].weight.detach().t().contiguous().t())
    model.register_buffer("odd", torch.arange(33, dtype=torch.int8)[1:])
    return model.eval()

folder, reference = Path(sys.argv[1]), build()
weights.save(reference, folder)
with torch.device("meta"):
    model = build()
weights.fill(model, folder, sys.argv[2])
for a, b in zip(slots_of(reference), slots_of(model)):
    assert torch.equal(a.value, b.value), a.name
    assert a.value.stride() == b.value.stride(), a.name
    back = bytearray(b.value.untyped_storage().nbytes())
    ok(cuda.cuMemcpyDtoH(back, b.value.untyped_storage().data_ptr(), len(back)))
assert model[0].weight.data_ptr() == model[2].weight.data_ptr()
print(len(waited))
"""


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_weights_are_streamed_bit_for_bit_with_ties_and_strides(
    device: str, simulated: Simulated, tmp_path: Path, repository: Path
) -> None:
    assert simulated.run(PROGRAM, str(tmp_path), device, PYTHONPATH=str(repository)) == "1"


def test_a_gpu_without_room_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")

    weights.save(torch.nn.Linear(3, 3), tmp_path)
    monkeypatch.setattr(weights, "_empty", full)
    with pytest.raises(GpuError, match="no memory left") as caught:
        weights.fill(torch.nn.Linear(3, 3, device="meta"), tmp_path, "cuda")
    assert caught.value.code == "gpu-out-of-memory"
    assert "More words" not in caught.value.why


def test_the_cpus_way_imports_no_gpu(tmp_path: Path) -> None:
    before = set(sys.modules)
    weights.save(torch.nn.Linear(3, 3), tmp_path)
    weights.fill(torch.nn.Linear(3, 3, device="meta"), tmp_path)
    assert not {name for name in set(sys.modules) - before if name.startswith(("adapter.gpu", "cuda"))}
