"""Device memory that is given up and taken again at the same address, for those who keep addresses: CUDA graphs.

A range of addresses is reserved once; memory is put behind it, and taken away around a snapshot.
`stream` fills it like any other. Has not run on a real GPU.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from adapter.gpu.memory import call, context, driver


class Region:
    """`size_bytes` at `address`, what was asked for rounded up to what the device maps; `map` puts memory there.

    Its methods raise `GpuError`; a `map` that fails leaves no memory behind, and may be tried again.
    Whoever uses the memory has finished before `unmap`.
    """

    def __init__(self, size_bytes: int, device: int = 0) -> None:
        self._device = device
        self._undo: ExitStack | None = None
        with context(device):
            grain = call("cuMemGetAllocationGranularity", self._kind(), _least_granularity())
            self.size_bytes = -(-size_bytes // int(grain)) * int(grain)
            self.address = int(call("cuMemAddressReserve", self.size_bytes, 0, 0, 0))

    @property
    def is_mapped(self) -> bool:
        return self._undo is not None

    def map(self) -> None:
        """Put memory behind the addresses, with any content. Nothing to do where there is some."""
        if self._undo is not None:
            return
        with context(self._device), ExitStack() as undo:
            memory = call("cuMemCreate", self.size_bytes, self._kind(), 0)
            undo.callback(call, "cuMemRelease", memory)
            call("cuMemMap", self.address, self.size_bytes, 0, memory, 0)
            undo.callback(call, "cuMemUnmap", self.address, self.size_bytes)
            call("cuMemSetAccess", self.address, self.size_bytes, [self._access()], 1)
            self._undo = undo.pop_all()

    def unmap(self) -> None:
        """Give the memory back; the addresses stay reserved."""
        undo, self._undo = self._undo, None
        if undo is not None:
            with context(self._device):
                undo.close()

    def close(self) -> None:
        """Give back the addresses too."""
        self.unmap()
        if self.address:
            with context(self._device):
                call("cuMemAddressFree", self.address, self.size_bytes)
            self.address = 0

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kind(self) -> Any:
        kind = driver().CUmemAllocationProp()
        kind.type = driver().CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        kind.location.type = driver().CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        kind.location.id = self._device
        return kind

    def _access(self) -> Any:
        access = driver().CUmemAccessDesc()
        access.location = self._kind().location
        access.flags = driver().CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return access


def _least_granularity() -> Any:
    return driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
