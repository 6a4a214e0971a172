"""Any tensors, however they lie in memory, come back bit for bit and lie there alike."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from adapter.snapshot import weights

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.complex128]

views = st.tuples(
    st.sampled_from(TYPES),
    st.integers(0, 5),  # offset in items
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=3),  # size and stride of each dimension
    st.booleans(),  # a parameter, where the type allows it
)


class Holder(torch.nn.Module):
    """Views of one block of memory, or of a block each."""

    def __init__(self, described: list, *, shared: bool, device: str) -> None:
        super().__init__()
        blocks = [torch.randint(0, 256, (2048,), dtype=torch.uint8, device=device) for _ in described]
        for number, (dtype, offset, dimensions, is_parameter) in enumerate(described):
            block = blocks[0 if shared else number].view(dtype)
            sizes, strides = [size for size, _ in dimensions], [stride for _, stride in dimensions]
            value = block.as_strided(sizes, strides, offset)
            if is_parameter:
                value = torch.nn.Parameter(value, requires_grad=dtype.is_floating_point or dtype.is_complex)
                self.register_parameter(f"t{number}", value)
            else:
                self.register_buffer(f"t{number}", value, persistent=bool(number % 2))


def raw(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist())


@settings(max_examples=150, deadline=None)
@given(st.lists(views, min_size=1, max_size=5), st.booleans())
def test_round_trip(described: list, shared: bool) -> None:
    model, copy = Holder(described, shared=shared, device="cpu"), Holder(described, shared=shared, device="meta")
    with tempfile.TemporaryDirectory() as folder:
        weights.save(model, Path(folder))
        weights.verify(Path(folder))
        weights.fill(copy, Path(folder))
    for number in range(len(described)):
        before, after = getattr(model, f"t{number}"), getattr(copy, f"t{number}")
        assert (after.dtype, after.shape, after.stride()) == (before.dtype, before.shape, before.stride())
        assert raw(after) == raw(before)
