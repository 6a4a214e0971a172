"""A tiny process with one kind of GPU memory, for finding out whether it survives a checkpoint.

    python -m adapter.gpu.canary plain|virtual|managed

Prints the UUID of its GPU once it is ready, then at each line of input whether its bytes are still the same.
Whoever started it ends it, by the end of its input or by a kill: it may hang with the driver.
"""

from __future__ import annotations

import sys
import uuid
from typing import Any

from cuda.bindings import driver

_BYTES = 2 << 20
"""One granule of virtual device memory on every GPU so far."""

_PATTERN = bytes(range(256)) * (_BYTES // 256)


def main() -> None:
    _ok(driver.cuInit(0))
    _ok(driver.cuCtxSetCurrent(_ok(driver.cuDevicePrimaryCtxRetain(0))))
    address = {"plain": _plain, "virtual": _virtual, "managed": _managed}[sys.argv[1]]()
    _ok(driver.cuMemcpyHtoD(address, _PATTERN, _BYTES))
    print(f"GPU-{uuid.UUID(bytes=bytes(_ok(driver.cuDeviceGetUuid(0)).bytes))}", flush=True)
    for _ in sys.stdin:
        back = bytearray(_BYTES)
        _ok(driver.cuMemcpyDtoH(back, address, _BYTES))
        print("same" if back == _PATTERN else "different", flush=True)


def _plain() -> int:
    return int(_ok(driver.cuMemAlloc(_BYTES)))


def _managed() -> int:
    return int(_ok(driver.cuMemAllocManaged(_BYTES, driver.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL.value)))


def _virtual() -> int:
    wanted = driver.CUmemAllocationProp()
    wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access = driver.CUmemAccessDesc()
    access.location = wanted.location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    address = _ok(driver.cuMemAddressReserve(_BYTES, 0, 0, 0))
    _ok(driver.cuMemMap(address, _BYTES, 0, _ok(driver.cuMemCreate(_BYTES, wanted, 0)), 0))
    _ok(driver.cuMemSetAccess(address, _BYTES, [access], 1))
    return int(address)


def _ok(answer: tuple[Any, ...]) -> Any:
    result, *values = answer
    if int(result) != 0:
        sys.exit(f"{result.name}")
    return values[0] if values else None


if __name__ == "__main__":
    main()
