"""Images of functions, made as their users' would be: a base image, packages, the shim, the handler.

What is slow is kept in the cache under what it was made from: the base image by its script, packages by their lock.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from adapter.hosts.container import CONTRACT_LABEL
from adapter.keys import CONTRACT_VERSION
from tests.images import machine, wheels
from tests.testbed.images import Image, read_base, wheels_layer, write_layer
from tests.testbed.programs import REPOSITORY

CACHE = Path(
    os.environ.get("GPUFN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gpufn"
)
HOME = "/opt/gpufn"
SHIM_PACKAGES = "flask\ngunicorn\n"


def base_layout(folder: Path, *packages: str) -> Path:
    """An OCI layout in `folder` with the images `run` and `build` of `scripts/base-image.sh`, and these Debian packages."""
    machine.run_script(REPOSITORY, "install-lifecycle.sh", str(CACHE / "lifecycle"))
    words = [word for package in packages for word in ("--with", package)]
    machine.run_script(REPOSITORY, "base-image.sh", *words, "--lifecycle", str(CACHE / "lifecycle"), str(folder))
    return folder


def function_image(name: str, function: Path, layout: Path, folder: Path, requirements: str = "") -> Image:
    """The image NAME of a function's folder, over `run` of a base layout. `folder` takes layers that are made anew."""
    packages = wheels.fetch(CACHE, f"{requirements}\n{SHIM_PACKAGES}", REPOSITORY / "requirements-dev.lock")
    site = CACHE / "layers" / f"{packages.name}.tar"
    site.parent.mkdir(parents=True, exist_ok=True)
    if not site.exists():
        wheels_layer(packages, f"{HOME}/site", site)
    content = {f"{HOME}/shim/adapter": REPOSITORY / "adapter", f"{HOME}/function": function}
    own = write_layer(content, folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.layer")
    settings = {
        "Entrypoint": ["python3", "-m", "adapter.runtime"],
        "Env": [
            "PATH=/usr/local/bin:/usr/bin:/bin",
            "LANG=C.UTF-8",
            f"PYTHONPATH={HOME}/shim:{HOME}/site",
            f"GPUFN_FOLDER={HOME}/function",
        ],
        "User": "1000:1000",
        "WorkingDir": "/home/cnb",
        "Labels": {CONTRACT_LABEL: str(CONTRACT_VERSION)},
    }
    return Image(name, settings, [site, own], read_base(layout, "run"))
