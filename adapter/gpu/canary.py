"""A tiny process with one kind of GPU memory, for finding out whether it survives a checkpoint.

    python -m adapter.gpu.canary plain|virtual|managed

Prints the UUID of its GPU once it is ready, or what it failed with; then at each line of input whether its bytes
are still the same. Whoever started it ends it, by the end of its input or by a kill: it may hang with the driver.
"""

from __future__ import annotations

import sys
import uuid
from typing import Any

_BYTES = 2 << 20
"""One granule of virtual device memory on every GPU so far."""

_PATTERN = bytes(range(256)) * (_BYTES // 256)


class Canary:
    """With its memory filled. A call that fails ends the process with the result's name."""

    def __init__(self, kind: str) -> None:
        from cuda.bindings import driver

        self._api: Any = driver
        self._call("cuInit", 0)
        self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", 0))
        self._address = {"plain": self._plain, "virtual": self._virtual, "managed": self._managed}[kind]()
        self._call("cuMemcpyHtoD", self._address, _PATTERN, _BYTES)

    def gpu(self) -> str:
        return f"GPU-{uuid.UUID(bytes=bytes(self._call('cuDeviceGetUuid', 0).bytes))}"

    def is_unchanged(self) -> bool:
        back = bytearray(_BYTES)
        self._call("cuMemcpyDtoH", back, self._address, _BYTES)
        return back == _PATTERN

    def _plain(self) -> int:
        return int(self._call("cuMemAlloc", _BYTES))

    def _managed(self) -> int:
        return int(self._call("cuMemAllocManaged", _BYTES, self._api.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL.value))

    def _virtual(self) -> int:
        wanted = self._api.CUmemAllocationProp()
        wanted.type = self._api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        wanted.location.type = self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access = self._api.CUmemAccessDesc()
        access.location = wanted.location
        access.flags = self._api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        address = self._call("cuMemAddressReserve", _BYTES, 0, 0, 0)
        self._call("cuMemMap", address, _BYTES, 0, self._call("cuMemCreate", _BYTES, wanted, 0), 0)
        self._call("cuMemSetAccess", address, _BYTES, [access], 1)
        return int(address)

    def _call(self, name: str, *arguments: object) -> Any:
        result, *values = getattr(self._api, name)(*arguments)
        if int(result) != 0:
            sys.exit(f"{result.name} of {name}")
        return values[0] if values else None


def main() -> None:
    try:
        canary = Canary(sys.argv[1])
    except (ImportError, RuntimeError, ValueError) as exc:  # no bindings, no driver, an unknown result
        sys.exit(str(exc))
    print(canary.gpu(), flush=True)
    for _ in sys.stdin:
        print("same" if canary.is_unchanged() else "different", flush=True)


if __name__ == "__main__":
    main()
