"""The CUDA driver's checkpoint API: a process gives its GPU memory back and gets it again later.

Owns the calls and the words for what goes wrong. The caller needs no CUDA of its own: the process
is named by its id. Everything here can hang with the driver: `helper` keeps it apart from whoever must not.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__CHECKPOINT.html
"""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adapter.errors import GpuError
from adapter.gpu.wire import State


class _Meaning(NamedTuple):
    code: str
    why: str
    hint: str


_RIGHTS = _Meaning(
    "gpu-not-permitted",
    "It needs the rights of a debugger over the process, and for a restore persistence mode or an initialised driver.",
    "Run as the same user, or as root, and switch persistence mode on: nvidia-smi -pm 1",
)
_UNSUPPORTED = _Meaning(
    "gpu-checkpoint-unsupported",
    "Managed memory, MIG, MPS, vGPU and imported memory cannot be checkpointed, nor does every driver do it.",
    "Use memory of cudaMalloc on a whole GPU, with driver 580 or newer; without it functions start anew.",
)
_NO_CUDA = _Meaning(
    "gpu-no-cuda-process",
    "There is no such process, or it has not initialised CUDA.",
    "Park it once its model is on the GPU.",
)
_BROKEN = _Meaning(
    "gpu-failed",
    "The driver or the GPU is in a bad way.",
    "Look for Xid lines in the kernel's log (dmesg); a GPU that fell off the bus needs a reset or a reboot.",
)

_MEANINGS: dict[str, _Meaning] = {
    "CUDA_ERROR_NOT_PERMITTED": _RIGHTS,
    "CUDA_ERROR_NOT_SUPPORTED": _UNSUPPORTED,
    "CUDA_ERROR_INVALID_VALUE": _NO_CUDA,
    "CUDA_ERROR_NOT_INITIALIZED": _NO_CUDA,
    "CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER": _Meaning(
        "gpu-driver-too-old",
        "The installed driver is older than what the CUDA libraries here need.",
        "Update the NVIDIA driver to 580 or newer.",
    ),
    "CUDA_ERROR_ILLEGAL_STATE": _Meaning(
        "gpu-wrong-state", "The process is in another state than this step needs.", "Ask for its state first."
    ),
    "CUDA_ERROR_NOT_READY": _Meaning(
        "gpu-lock-timeout",
        "GPU work of the process went on for longer than the lock was allowed to wait.",
        "Let it finish its work first (torch.cuda.synchronize()).",
    ),
    "CUDA_ERROR_OUT_OF_MEMORY": _Meaning(
        "gpu-out-of-memory",
        "The GPU has less free memory than the process gave back: someone took it meanwhile.",
        "Start nothing on a GPU that has no lease there: memory of parked processes looks free.",
    ),
    "CUDA_ERROR_NO_DEVICE": _Meaning(
        "no-gpu", "The driver sees no GPU.", "Look at: nvidia-smi -L; and at NVIDIA_VISIBLE_DEVICES of the container."
    ),
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": _Meaning(
        "gpu-driver-mismatch",
        "The driver's library and its kernel module are of different versions.",
        "Reboot after the driver's update, or give the container the libraries of this host.",
    ),
}

_BAD_MAPPING = _Meaning(
    "gpu-bad-mapping", "A mapping names every GPU of the machine once on either side.", "Use UUIDs of: nvidia-smi -L"
)


def load_bindings() -> Any:
    """The module that speaks to the driver. Raises `GpuError` where this interpreter has none."""
    try:
        from cuda.bindings import driver
    except ImportError as exc:
        raise GpuError(
            "GPU processes cannot be parked here.",
            why=f"The package cuda-bindings is missing: {exc}.",
            hint="Install: gpufn[park]",
            code="no-cuda-bindings",
        ) from exc
    return driver


class Driver:
    """The initialised driver, in the process that makes this. Raises `GpuError`, as all of its methods do.

    The calls are those of the API: nothing here puts right what was asked in the wrong order.
    """

    def __init__(self) -> None:
        self._api = load_bindings()
        self._call("The CUDA driver could not be initialised.", "cuInit", 0)

    def gpus(self) -> list[str]:
        """UUIDs of all that this process sees."""
        count = self._call("The GPUs could not be counted.", "cuDeviceGetCount")
        found = (self._call(f"GPU {index} has no UUID.", "cuDeviceGetUuid", index) for index in range(count))
        return [f"GPU-{uuid.UUID(bytes=bytes(each.bytes))}" for each in found]

    def state(self, pid: int) -> State:
        state = self._call(f"The state of process {pid} is not known.", "cuCheckpointProcessGetState", pid)
        return State(state.name.rpartition("CU_PROCESS_STATE_")[2].lower())

    def lock(self, pid: int, timeout_s: float) -> None:
        """From `RUNNING`, where it stays on failure. Waits for submitted work."""
        arguments = self._struct("CUcheckpointLockArgs")
        arguments.timeoutMs = max(1, round(timeout_s * 1000))  # 0 would wait for ever
        self._call(f"Process {pid} could not be locked.", "cuCheckpointProcessLock", pid, arguments)

    def checkpoint(self, pid: int) -> None:
        """From `LOCKED`. There is no way back from a failure, unless the driver says `LOCKED` still."""
        self._call(f"Process {pid} could not be checkpointed.", "cuCheckpointProcessCheckpoint", pid, None)

    def restore(self, pid: int, mapping: Mapping[str, str] | None = None) -> None:
        """From `CHECKPOINTED` to `LOCKED`. `mapping`: GPU UUIDs, old to new, where they are not the same."""
        arguments = self._restore_arguments(mapping) if mapping else None
        invalid = {"CUDA_ERROR_INVALID_VALUE": _BAD_MAPPING} if mapping else {}
        self._call(
            f"Process {pid} could not be restored.", "cuCheckpointProcessRestore", pid, arguments, meanings=invalid
        )

    def unlock(self, pid: int) -> None:
        """From `LOCKED` to `RUNNING`."""
        self._call(f"Process {pid} could not be unlocked.", "cuCheckpointProcessUnlock", pid, None)

    def _restore_arguments(self, mapping: Mapping[str, str]) -> Any:
        pairs = []
        for old, new in full_mapping(mapping, self.gpus()).items():
            pair = self._struct("CUcheckpointGpuPair")
            pair.oldUuid, pair.newUuid = self._uuid(old), self._uuid(new)
            pairs.append(pair)
        arguments = self._struct("CUcheckpointRestoreArgs")
        arguments.gpuPairs, arguments.gpuPairsCount = pairs, len(pairs)
        return arguments

    def _uuid(self, text: str) -> Any:
        """The bindings make such a value, but let nobody write it."""
        value = self._struct("CUuuid")
        try:
            data = uuid.UUID(text.removeprefix("GPU-")).bytes
        except ValueError as exc:
            raise _error(
                "A process cannot be restored onto another GPU.", f"{text!r} is no UUID.", _BAD_MAPPING
            ) from exc
        ctypes.memmove(value.getPtr(), data, len(data))
        return value

    def _struct(self, name: str) -> Any:
        found = getattr(self._api, name, None)
        if found is None:
            raise _bindings_too_old(name)
        return found()

    def _call(self, message: str, name: str, *arguments: object, meanings: Mapping[str, _Meaning] | None = None) -> Any:
        """The value of a call, if it has one. `message` says what it means that it failed."""
        function = getattr(self._api, name, None)
        if function is None:
            raise _bindings_too_old(name)
        try:
            result, *values = function(*arguments)
        except RuntimeError as exc:  # the bindings', where the driver lacks the function or is not there
            missing = _UNSUPPORTED if "Checkpoint" in str(exc) else _MEANINGS["CUDA_ERROR_NO_DEVICE"]
            raise _error(message, f"{exc}.".replace("..", "."), missing) from exc
        except ValueError as exc:  # the bindings', of an answer newer than they are
            raise _error(message, f"{name}: {exc}.", _BROKEN) from exc
        if int(result) != 0:
            meaning = {**_MEANINGS, **(meanings or {})}.get(result.name) or _unsaid(name, arguments)
            raise _error(message, f"{result.name} of {name}.", meaning)
        return values[0] if values else None


def _unsaid(name: str, arguments: Sequence[object]) -> _Meaning:
    """Of a result that has no meaning of its own: driver 580 has none for a process that has ended, nor for another
    user's. It talks to a process through what that has open."""
    if not name.startswith("cuCheckpointProcess"):
        return _BROKEN
    try:
        has_any_open = bool(os.listdir(f"/proc/{arguments[0]}/fd"))
    except PermissionError:
        return _RIGHTS
    except OSError:
        return _NO_CUDA
    return _BROKEN if has_any_open else _NO_CUDA  # one that has ended and was not waited for has none


def _error(message: str, said: str, meaning: _Meaning) -> GpuError:
    return GpuError(message, why=f"{said} {meaning.why}", hint=meaning.hint, code=meaning.code)


def _bindings_too_old(name: str) -> GpuError:
    return GpuError(
        "The installed cuda-bindings cannot do this.",
        why=f"They have no {name}: parking came with 12.8, other GPUs on restore with 13.0.",
        hint="Install: cuda-bindings>=13",
        code="gpu-bindings-too-old",
    )


def full_mapping(mapping: Mapping[str, str], gpus: Sequence[str]) -> dict[str, str]:
    """`mapping` with every one of `gpus` in it, as the driver wants it, those that are not used too.

    What it does not name stays where it is, or takes a place that became free. A mapping that names GPUs of
    another machine is returned as it is: only who made it knows what was there.
    """
    if not set(mapping) <= set(gpus) or not set(mapping.values()) <= set(gpus):
        return dict(mapping)
    if len(set(mapping.values())) < len(mapping):
        raise _error("A process cannot be restored onto these GPUs.", "Two would become one.", _BAD_MAPPING)
    taken = set(mapping.values())
    left = [gpu for gpu in gpus if gpu not in mapping]
    stay = {gpu: gpu for gpu in left if gpu not in taken}
    free = (gpu for gpu in gpus if gpu not in taken and gpu not in stay)
    move = {gpu: next(free) for gpu in left if gpu in taken}
    return {**mapping, **stay, **move}
