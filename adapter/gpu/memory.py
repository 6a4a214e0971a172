"""Device memory, pinned memory, streams and events through the driver, and its refusals in our words.

The only module that imports cuda.bindings for them. Knows nothing of torch, with which it shares the
primary context of a device: addresses of torch's tensors can be copied to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from adapter.errors import GpuError

_PORTABLE = 1
"""CU_MEMHOSTALLOC_PORTABLE: pinned for every context of the process."""
_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: the default stream, on which others work, does not wait for it, nor it for that one."""
_DISABLE_TIMING, _BLOCKING_SYNC = 2, 1
"""CU_EVENT_…: cheaper; and who waits for it sleeps, because the processor has reads to do."""

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"


def call(name: str, *arguments: Any) -> Any:
    """The results of one driver call: none, one, or a tuple. Raises `GpuError`."""
    bindings = driver()
    try:
        result, *answer = getattr(bindings, name)(*arguments)
    except RuntimeError as exc:  # the bindings' word for a library or a function that is not there
        raise GpuError(
            "The NVIDIA driver cannot be called.", why=f"{exc}.", hint="Run `nvidia-smi`.", code="no-driver"
        ) from exc
    if result != bindings.CUresult.CUDA_SUCCESS:
        raise _refusal(name, result)
    return answer[0] if len(answer) == 1 else tuple(answer) or None


def driver() -> Any:
    """The bindings' driver module, for its types. Raises `GpuError` where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as exc:
        raise GpuError(
            "The NVIDIA driver cannot be called.",
            why="cuda-bindings is not installed.",
            hint="Install: gpufn[park]; CUDA builds of torch bring it.",
            code="no-cuda-bindings",
        ) from exc
    return driver


def _refusal(call_name: str, result: Any) -> GpuError:
    _, text = driver().cuGetErrorString(result)
    said = text.decode() if text else "no description"
    why = f"{call_name}: {result.name}, {said}."
    if result.name != _OUT_OF_MEMORY:
        return GpuError("The GPU driver refused.", why=why)
    if call_name == "cuMemHostAlloc":
        return GpuError(
            "There is no host memory to pin.", why=why, hint="Raise the memory limit.", code="out-of-host-memory"
        )
    return GpuError("The GPU has no memory left.", why=why, hint="Choose a larger GPU.", code="gpu-out-of-memory")


@contextmanager
def context(device: int) -> Iterator[Any]:
    """The primary context of a device, current in this thread; other threads make it so with `enter`."""
    call("cuInit", 0)
    handle = call("cuDeviceGet", device)
    primary = call("cuDevicePrimaryCtxRetain", handle)
    before = call("cuCtxGetCurrent")
    try:
        enter(primary)
        yield primary
    finally:
        enter(before)
        call("cuDevicePrimaryCtxRelease", handle)


def enter(primary: Any) -> None:
    call("cuCtxSetCurrent", primary)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A pinned buffer and the event behind the last copy from it."""

    address: int
    view: memoryview
    event: Any


class Lane:
    """A stream with a few pinned buffers in turn: one is filled while the others are copied to the device.

    Belongs to one thread, in which a context is current; use it as a context manager. A buffer is handed
    out again only when the copies from it are done.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._undo: list[Callable[[], object]] = []
        self._slots: list[_Slot] = []
        self._count, self._slot_bytes = slots, slot_bytes
        self._next = 0
        self._stream = self._made("cuStreamCreate", "cuStreamDestroy", _NON_BLOCKING)

    def _new_slot(self) -> _Slot:
        """Pinning takes the driver some 0.4 ms for each MiB, one caller at a time: the first ones are in use meanwhile."""
        address = int(self._made("cuMemHostAlloc", "cuMemFreeHost", self._slot_bytes, _PORTABLE))
        view = memoryview((ctypes.c_ubyte * self._slot_bytes).from_address(address))
        event = self._made("cuEventCreate", "cuEventDestroy", _DISABLE_TIMING | _BLOCKING_SYNC)
        return _Slot(address, view, event)

    def _made(self, make: str, unmake: str, *arguments: Any) -> Any:
        thing = call(make, *arguments)
        self._undo.append(lambda: call(unmake, thing))
        return thing

    def buffer(self) -> memoryview:
        """The next buffer, once nothing is copied from it any more."""
        if self._next == len(self._slots):
            self._slots.append(self._new_slot())
        else:
            call("cuEventSynchronize", self._slots[self._next].event)
        return self._slots[self._next].view

    def send(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Begin to copy parts of the buffer, (start in it, bytes, device address) each, to the device."""
        slot = self._slots[self._next]
        for start, size, target in copies:
            call("cuMemcpyHtoDAsync", target, slot.address + start, size, self._stream)
        call("cuEventRecord", slot.event, self._stream)
        self._next = (self._next + 1) % self._count

    def finish(self) -> None:
        """Wait until everything is on the device."""
        call("cuStreamSynchronize", self._stream)

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        """Give everything back, whatever of it fails: a lost GPU fails each call."""
        if self._slots:
            self._undo.append(self.finish)  # first: copies still read the buffers
        while self._undo:
            try:
                self._undo.pop()()
            except GpuError:
                continue
