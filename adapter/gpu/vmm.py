"""Device memory that is given up and taken again at the same address, for those who keep addresses: CUDA graphs.

A range of addresses is reserved once; memory is put behind it, and taken away around a snapshot.
`stream` fills it like any other, and torch uses it through `View`.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

from adapter.errors import GpuError
from adapter.gpu.memory import call, context, driver


class Region:
    """`size_bytes` at `address`, what was asked for rounded up to what the device maps; `map` puts memory there.

    Its methods raise `GpuError`; a `map` that fails leaves no memory behind, and may be tried again.
    `unmap` waits for the work that uses the memory: the driver does not, and what was submitted would meet no
    memory. It keeps the device's primary context, and gives everything back when it is closed or nobody refers to
    it any more.
    """

    def __init__(self, size_bytes: int, device: int = 0) -> None:
        self.address = 0  # first: what `__del__` looks at, whatever fails below
        self._undo: ExitStack | None = None
        self._device = device
        with context(device), ExitStack() as undo:
            grain = call("cuMemGetAllocationGranularity", self._kind(), _least_granularity())
            self.size_bytes = -(-size_bytes // int(grain)) * int(grain)
            handle = call("cuDeviceGet", device)
            call("cuDevicePrimaryCtxRetain", handle)
            undo.callback(call, "cuDevicePrimaryCtxRelease", handle)
            self.address = int(call("cuMemAddressReserve", self.size_bytes, 0, 0, 0))
            undo.pop_all()  # `close` gives both back

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
            undo.callback(call, "cuCtxSynchronize")  # the first of all when it is undone
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
        address, self.address = self.address, 0
        if address:
            with context(self._device):
                call("cuMemAddressFree", address, self.size_bytes)
                call("cuDevicePrimaryCtxRelease", call("cuDeviceGet", self._device))

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(GpuError):  # a lost GPU fails each call, and has no memory to give back
            self.close()

    def view(self, start: int, size_bytes: int) -> View:
        """`size_bytes`, at least one, from byte `start` on, for `torch.as_tensor`."""
        return View(self, self.address + start, size_bytes)

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


class View:
    """Bytes of a region in the form that array libraries share GPU memory in; keeps the region while it is used.

    The form: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
    """

    def __init__(self, region: Region, address: int, size_bytes: int) -> None:
        self._region = region
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _least_granularity() -> Any:
    return driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
