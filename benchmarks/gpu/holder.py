"""A process that holds GPU memory with a pattern in it, and says whether that is still there.

    python -m benchmarks.gpu.holder BYTES

Prints ``ready``, then at each line of input ``whole`` or ``broken``; ends with its input.
"""

from __future__ import annotations

import os
import sys

from adapter.gpu.memory import call, context

_BLOCK_BYTES = 16 * 2**20
_LOOK_BYTES = 4096
"""Of each block, at its start and at its end."""


def fill(address: int, size: int) -> None:
    for number, at in enumerate(range(0, size, _BLOCK_BYTES)):
        call("cuMemsetD8", address + at, _byte(number), min(_BLOCK_BYTES, size - at))
    call("cuCtxSynchronize")


def is_whole(address: int, size: int) -> bool:
    for number, at in enumerate(range(0, size, _BLOCK_BYTES)):
        end = min(at + _BLOCK_BYTES, size)
        for place in (at, end - _LOOK_BYTES):
            back = bytearray(_LOOK_BYTES)
            call("cuMemcpyDtoH", back, address + place, _LOOK_BYTES)
            if back != bytes([_byte(number)]) * _LOOK_BYTES:
                return False
    return True


def _byte(number: int) -> int:
    """Another one in neighbouring blocks, and never zero."""
    return 1 + number * 7 % 251


def main() -> None:
    size = int(sys.argv[1])
    with context(0):
        address = int(call("cuMemAlloc", size))
        fill(address, size)
        print("ready", flush=True)
        for _ in sys.stdin:
            print("whole" if is_whole(address, size) else "broken", flush=True)
        os._exit(0)  # where it is parked the driver would let no call go on, not even the last ones


if __name__ == "__main__":
    main()
