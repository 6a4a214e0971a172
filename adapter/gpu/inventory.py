"""Which GPUs this machine has, and which of them a process may use.

The only module that imports pynvml (nvidia-ml-py), and late: without it, as without a driver, there is no GPU,
and the error says why. How much of a GPU's memory is free is not asked here: a parked process is invisible to
NVML, so only leases know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapter.errors import GpuError

CUDA_VARIABLE = "CUDA_VISIBLE_DEVICES"
CONTAINER_VARIABLE = "NVIDIA_VISIBLE_DEVICES"

_XID_HINT = "Look for Xid lines in the kernel's log (dmesg); the GPU needs a reset, or the machine a reboot."


@dataclass(frozen=True, slots=True)
class Instance:
    """A part of a GPU in MIG mode. `memory_bytes`: all of its memory, used or not."""

    uuid: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """`memory_bytes`: all of its memory, used or not. `persistence` is None where the driver does not say."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    mig: bool
    instances: tuple[Instance, ...]
    persistence: bool | None


Device = Gpu | Instance


@dataclass(frozen=True, slots=True)
class Inventory:
    """`cuda_version`: the newest that the driver knows, as in ``13.0``."""

    driver_version: str
    cuda_version: str
    gpus: tuple[Gpu, ...]


def take_inventory() -> Inventory:
    """What NVML says now. Raises `GpuError`: `no-gpu` where there is none, else what stands in the way."""
    try:
        import pynvml
    except ImportError as exc:
        raise GpuError(
            "No GPU can be used here.",
            why=f"The package nvidia-ml-py is missing: {exc}.",
            hint="Install: gpufn[gpu]",
            code="no-gpu",
        ) from exc
    try:
        pynvml.nvmlInit()
        try:
            return _inventory(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as exc:
        raise _explained(pynvml, exc) from exc


def _inventory(nvml: Any) -> Inventory:
    gpus = tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    if not gpus:
        raise GpuError(
            "No GPU can be used here.",
            why="The NVIDIA driver is there, but no GPU.",
            hint=f"In a container, look at {CONTAINER_VARIABLE}; elsewhere: nvidia-smi -L",
            code="no-gpu",
        )
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
    return Inventory(_text(nvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}", gpus)


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    is_mig = _if_supported(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    return Gpu(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=nvml.nvmlDeviceGetMemoryInfo(handle).total,
        mig=bool(is_mig),
        instances=_instances(nvml, handle) if is_mig else (),
        persistence=_if_supported(nvml, lambda: nvml.nvmlDeviceGetPersistenceMode(handle) == 1),
    )


def _instances(nvml: Any, handle: Any) -> tuple[Instance, ...]:
    """Their numbers have gaps where instances were removed."""
    found = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            continue
        found.append(Instance(_text(nvml.nvmlDeviceGetUUID(instance)), nvml.nvmlDeviceGetMemoryInfo(instance).total))
    return tuple(found)


def _if_supported(nvml: Any, ask: Callable[[], bool]) -> bool | None:
    """None where the GPU does not have it (MIG on small ones), or we may not know."""
    try:
        return ask()
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _explained(nvml: Any, error: Any) -> GpuError:
    """NVML's error in words."""
    no_driver = ("no-gpu", "No NVIDIA driver answers.", "On a machine with a GPU, install the driver: nvidia-smi")
    meanings = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
            "no-gpu",
            "The NVIDIA driver's library (libnvidia-ml.so.1) is not here.",
            "On a machine with a GPU, install the driver; in a container, use the NVIDIA container toolkit.",
        ),
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: no_driver,
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
            "gpu-driver-mismatch",
            "The driver's library and its kernel module are of different versions.",
            "Reboot after the driver's update, or give the container the libraries of this host.",
        ),
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND: (
            "gpu-driver-too-old",
            "The installed driver lacks what is asked of it.",
            "Update the NVIDIA driver to 580 or newer.",
        ),
        nvml.NVML_ERROR_GPU_IS_LOST: ("gpu-lost", "A GPU fell off the bus.", _XID_HINT),
        nvml.NVML_ERROR_NO_PERMISSION: (
            "gpu-not-permitted",
            "This user may not use the GPU's devices.",
            "Look at: ls -l /dev/nvidia*",
        ),
    }
    code, why, hint = meanings.get(error.value, ("gpu-failed", "NVML failed.", "See what it says: nvidia-smi"))
    return GpuError("No GPU can be used here.", why=f"{why} (NVML: {error})", hint=hint, code=code)


def visible_devices(inventory: Inventory, environ: Mapping[str, str]) -> tuple[Device, ...]:
    """The GPUs or MIG instances that a CUDA process with these variables sees, in the order it counts them.

    Raises `GpuError` (`no-visible-gpu`), naming the variable, where that is none.
    """
    gpus = _in_container(inventory.gpus, environ.get(CONTAINER_VARIABLE))
    if not gpus:
        raise _none_visible(CONTAINER_VARIABLE, environ)
    wanted = environ.get(CUDA_VARIABLE)
    if wanted is None:
        return tuple(_usable(gpu) for gpu in gpus if not gpu.mig or gpu.instances)
    found = _chosen(gpus, wanted)
    if not found:
        raise _none_visible(CUDA_VARIABLE, environ)
    return found


def _in_container(gpus: Sequence[Gpu], wanted: str | None) -> Sequence[Gpu]:
    """The container runtime's variable. Set, it has been obeyed already, unless more are here than it names.

    Its indices are the host's, which count for nothing where the container has fewer GPUs.
    """
    if wanted is None or wanted == "all":
        return gpus
    if wanted in {"", "none", "void"}:
        return ()
    words = wanted.split(",")
    if len(words) >= len(gpus) or any(word.upper().startswith("MIG") or ":" in word for word in words):
        return gpus
    return [gpu for gpu in gpus if any(_names(word, gpu) for word in words)]


def _chosen(gpus: Sequence[Gpu], wanted: str) -> tuple[Device, ...]:
    """CUDA's own variable: its order counts; what comes after a word that names nothing does not.

    https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html
    """
    found: list[Device] = []
    for word in (word.strip() for word in wanted.split(",")):
        device = _named(gpus, word)
        if device is None:
            break
        if device in found:  # named twice: CUDA then shows none
            return ()
        found.append(device)
    return tuple(found)


def _named(gpus: Sequence[Gpu], word: str) -> Device | None:
    """By position, or by the beginning of a UUID where that is unique."""
    if word.isdecimal():
        return _usable(gpus[int(word)]) if int(word) < len(gpus) else None
    devices: list[Device] = [*gpus, *(instance for gpu in gpus for instance in gpu.instances)]
    found = [device for device in devices if len(word) > len("GPU-") and _has_uuid(device, word)]
    return found[0] if len(found) == 1 else None


def _names(word: str, gpu: Gpu) -> bool:
    return gpu.index == int(word) if word.isdecimal() else _has_uuid(gpu, word)


def _has_uuid(device: Device, prefix: str) -> bool:
    return device.uuid.lower().startswith(prefix.lower())


def _usable(gpu: Gpu) -> Device:
    """In MIG mode CUDA uses the first instance of a GPU that is named as a whole."""
    return gpu.instances[0] if gpu.mig and gpu.instances else gpu


def _none_visible(variable: str, environ: Mapping[str, str]) -> GpuError:
    return GpuError(
        "No GPU is visible to this process.",
        why=f"{variable} is {environ.get(variable, '')!r}.",
        hint=f"Set {variable} to indices or UUIDs of: nvidia-smi -L",
        code="no-visible-gpu",
    )
