"""A process that uses a GPU as a test tells it to: JSON lines on standard input, an answer each on output.

Plain bindings, no torch: the same against the stub driver and a real one. Holds nothing but its pipes.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from typing import Any

from cuda.bindings import driver

MIB = 1 << 20


def ok(answer: tuple[Any, ...]) -> Any:
    if int(answer[0]) != 0:
        raise RuntimeError(answer[0].name)
    return answer[1] if len(answer) == 2 else answer[1:]


class Program:
    def __init__(self) -> None:
        self.blocks: list[tuple[int, int, int]] = []  # address, bytes, seed of their pattern
        self.calls: list[threading.Event] = []
        self.kernel_may_end = threading.Event()
        self.kept: list[Any] = []

    def init(self, device: int = 0) -> None:
        ok(driver.cuInit(0))
        self.device = device
        ok(driver.cuCtxSetCurrent(ok(driver.cuDevicePrimaryCtxRetain(device))))

    def allocate(self, kind: str, size: int, seed: int) -> int:
        address = {"plain": self._plain, "virtual": self._virtual, "managed": self._managed}[kind](size)
        data = pattern(seed, size)
        ok(driver.cuMemcpyHtoD(address, data, size))
        self.blocks.append((address, size, seed))
        return address

    def _plain(self, size: int) -> int:
        return int(ok(driver.cuMemAlloc(size)))

    def _managed(self, size: int) -> int:
        return int(ok(driver.cuMemAllocManaged(size, driver.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL.value)))

    def _virtual(self, size: int) -> int:
        wanted = driver.CUmemAllocationProp()
        wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        wanted.location.id = self.device
        access = driver.CUmemAccessDesc()
        access.location = wanted.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        address = ok(driver.cuMemAddressReserve(size, 0, 0, 0))
        handle = ok(driver.cuMemCreate(size, wanted, 0))
        ok(driver.cuMemMap(address, size, 0, handle, 0))
        ok(driver.cuMemSetAccess(address, size, [access], 1))
        return int(address)

    def check(self) -> bool:
        """Are all the bytes where they were put?"""
        for address, size, seed in self.blocks:
            back = bytearray(size)
            ok(driver.cuMemcpyDtoH(back, address, size))
            if back != pattern(seed, size):
                return False
        return True

    def call(self) -> int:
        """Have the driver give and take memory, in a thread; returns the call's number for `is_done`."""
        done = threading.Event()

        def work() -> None:
            ok(driver.cuCtxSetCurrent(ok(driver.cuDevicePrimaryCtxRetain(self.device))))
            ok(driver.cuMemFree(ok(driver.cuMemAlloc(MIB))))
            done.set()

        threading.Thread(target=work, daemon=True).start()
        self.calls.append(done)
        return len(self.calls) - 1

    def is_done(self, number: int, within_s: float) -> bool:
        return self.calls[number].wait(within_s)

    def begin_kernel(self) -> None:
        """GPU work that ends when it is told to (a host function in a stream is work like any other)."""
        begun = threading.Event()

        def host_function(_: object) -> None:
            begun.set()
            self.kernel_may_end.wait()

        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(host_function)
        stream = ok(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value))
        self.kept += [function, stream]
        pointer = ctypes.cast(function, ctypes.c_void_p).value
        ok(driver.cuLaunchHostFunc(stream, driver.CUhostFn(pointer), 0))
        begun.wait()

    def end_kernel(self) -> None:
        self.kernel_may_end.set()

    def gpu(self) -> str:
        """UUID of the GPU it is on, as bytes in hexadecimal."""
        return bytes(ok(driver.cuDeviceGetUuid(self.device)).bytes).hex()

    def gpus(self) -> int:
        ok(driver.cuInit(0))
        return int(ok(driver.cuDeviceGetCount()))

    def resident_bytes(self) -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def pattern(seed: int, size: int) -> bytes:
    """Different in each block, page and byte; `size` in whole MiB."""
    page = bytes((seed * 31 + index * 7) % 251 for index in range(251)) * 17
    return b"".join(part.to_bytes(8, "little") + page[:4088] for part in range(size // 4096))


def main() -> None:
    program = Program()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": getattr(program, name)(*arguments)}
        except RuntimeError as exc:
            answer = {"error": str(exc)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
