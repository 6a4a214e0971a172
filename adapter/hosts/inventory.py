"""The GPUs of this machine, as a child process sees them (``python -m adapter.gpu.inventory``).

A child, because the control side never loads a GPU's libraries: one that hangs or crashes takes nothing with it.
Its answer is one JSON object: ``{"driver", "why_not", "devices": [{"uuid", "name", "memory_bytes", "mig": […]}]}``,
where ``mig`` are a GPU's slices in the same form; they need no name.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from adapter.hosts import Inventory
from adapter.policy.grants import Device
from adapter.replica import shim_path
from adapter.units import format_size

logger = logging.getLogger(__name__)

_LIMIT_S = 30.0
"""A driver without persistence mode takes seconds to come up, for each GPU."""

_COMMAND = (sys.executable, "-m", "adapter.gpu.inventory")


def read_inventory() -> Inventory:
    """The GPUs here. Blocks for as long as the driver takes; never raises."""
    try:
        done = subprocess.run(
            _COMMAND,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_LIMIT_S,
            check=False,
            cwd="/",
            env={**os.environ, "PYTHONPATH": shim_path()},
        )
        inventory = parse_inventory(done.stdout) if done.stdout.strip() else Inventory(why_not=_last_words(done))
    except (OSError, subprocess.TimeoutExpired, ValueError) as exc:
        inventory = Inventory(why_not=f"The GPUs cannot be listed: {exc}.")
    fields = {"devices": [device.uuid for device in inventory.devices], "why_not": inventory.why_not}
    logger.info("GPUs of this machine", extra={"fields": fields})
    return inventory


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    said = done.stderr.strip().splitlines()
    return f"The GPUs cannot be listed: {said[-1] if said else f'code {done.returncode}'}."


def parse_inventory(text: str) -> Inventory:
    """Raises `ValueError` on anything else than the child's answer."""
    try:
        data = json.loads(text)
        devices = tuple(device for entry in data["devices"] for device in _devices(entry))
        asleep = tuple(str(entry["uuid"]) for entry in data["devices"] if entry.get("persistence") is False)
        why_not = str(data.get("why_not", "")) or ("" if devices else "The driver lists none.")
        return Inventory(devices, str(data.get("driver", "")), why_not, asleep)
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"not an inventory: {exc!r}") from exc


def _devices(entry: Mapping[str, Any]) -> Iterator[Device]:
    """A GPU that is cut into slices can only be used as these."""
    slices = entry.get("mig") or ()
    for slice_ in slices:
        size_bytes = int(slice_["memory_bytes"])
        model = str(slice_.get("name") or f"{entry['name']} MIG {format_size(size_bytes)}")
        yield Device(str(slice_["uuid"]), model, size_bytes, is_slice=True)
    if not slices:
        yield Device(str(entry["uuid"]), str(entry["name"]), int(entry["memory_bytes"]))
