"""NVIDIA's container runtime, as far as containers see it: `python nvidia_runtime.py BUNDLE DRIVER`, before runc makes it.

A container with NVIDIA_VISIBLE_DEVICES gets the driver's libraries, here the simulated ones of tests/stubs, and CUDA
shows it those GPUs only. Their device files, by which programs see that there are some, are the null device. Standard
library only: it runs at each start of a container.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

INSIDE = "/run/nvidia-driver"
NOTHING = {"", "none", "void"}


def with_driver(spec: dict[str, Any], driver: str) -> dict[str, Any]:
    """The OCI specification of a container with what it asks of the driver, whose folder on the node is `driver`."""
    environment = dict(entry.split("=", 1) for entry in spec["process"].get("env", ()) if "=" in entry)
    visible = environment.get("NVIDIA_VISIBLE_DEVICES", "")
    if visible in NOTHING:
        return spec
    paths = [INSIDE, *filter(None, [environment.get("LD_LIBRARY_PATH", "")])]
    environment["LD_LIBRARY_PATH"] = ":".join(paths)
    if visible != "all":
        environment.setdefault("CUDA_VISIBLE_DEVICES", visible)
    devices = [_device_file(number) for number, _ in enumerate(visible.split(","))]
    process = {**spec["process"], "env": [f"{name}={value}" for name, value in environment.items()]}
    mount = {"destination": INSIDE, "type": "bind", "source": driver, "options": ["rbind", "rw"]}
    linux = {**spec.get("linux", {}), "devices": [*spec.get("linux", {}).get("devices", ()), *devices]}
    return {**spec, "process": process, "mounts": [*spec.get("mounts", ()), mount], "linux": linux}


def _device_file(number: int) -> dict[str, Any]:
    return {"path": f"/dev/nvidia{number}", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666}


def wrapper(python: str, driver: str) -> str:
    """The program that containerd calls instead of runc: a shell's start is cheap, and most calls make no container."""
    return f"""#!/bin/sh
bundle= before=
for word; do
    [ "$before" = --bundle ] && bundle=$word
    before=$word
done
if [ -n "$bundle" ] && grep -q '"NVIDIA_VISIBLE_DEVICES=' "$bundle/config.json"; then
    "{python}" -I "{Path(__file__)}" "$bundle" "{driver}" || exit 1
fi
exec runc "$@"
"""


if __name__ == "__main__":
    config = Path(sys.argv[1]) / "config.json"
    config.write_text(json.dumps(with_driver(json.loads(config.read_text()), sys.argv[2])))
