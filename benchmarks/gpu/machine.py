"""The GPU of this machine, through NVML: what it is, and what of its memory is used."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapter.gpu.inventory import take_inventory


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def describe() -> dict[str, Any]:
    """The first GPU, as a results file keeps it. Raises `GpuError`."""
    inventory = take_inventory()
    gpu = inventory.gpus[0]
    with _nvml() as nvml:
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
        link = {
            "generation": _if_known(nvml, lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
            "width": _if_known(nvml, lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
            "current_generation": _if_known(nvml, lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
            "current_width": _if_known(nvml, lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        }
    return {
        "model": gpu.name,
        "count": len(inventory.gpus),
        "memory_gib": round(gpu.memory_bytes / 2**30, 1),
        "driver": inventory.driver_version,
        "cuda": inventory.cuda_version,
        "pcie": link,
        "persistence": gpu.persistence,
        "mig": gpu.mig,
        "torch": _version("torch"),
        "cuda_bindings": _version("cuda-bindings"),
    }


def memory_bytes() -> tuple[int, int]:
    """Of the first GPU: all of its memory, and what is used of it by whomever."""
    with _nvml() as nvml:
        found = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0))
        return int(found.total), int(found.used)


@contextmanager
def _nvml() -> Iterator[Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _if_known(nvml: Any, ask: Callable[[], int]) -> int | None:
    """None where the driver does not say it, as for a GPU that is no PCIe card."""
    try:
        return ask()
    except nvml.NVMLError:
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
