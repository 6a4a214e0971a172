"""Images of functions, made as their users' would be: a base image, packages, the shim, the handler.

What is slow is kept in the cache under what it was made from: the base image by its script, packages by their lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from adapter.hosts.container import CONTRACT_LABEL
from adapter.keys import CONTRACT_VERSION
from tests.images import machine, wheels
from tests.testbed.images import Image, read_base, write_layer
from tests.testbed.programs import REPOSITORY

CACHE = Path(
    os.environ.get("GPUFN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gpufn"
)
HOME = "/opt/gpufn"
SHIM_PACKAGES = "flask\ngunicorn\n"
NO_BYTECODE = shutil.ignore_patterns("__pycache__")

SETTINGS = {
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


def base_layout(folder: Path, *packages: str) -> Path:
    """An OCI layout in `folder` with the images `run` and `build` of `scripts/base-image.sh`, and these Debian packages."""
    machine.run_script(REPOSITORY, "install-lifecycle.sh", str(CACHE / "lifecycle"))
    words = [word for package in packages for word in ("--with", package)]
    machine.run_script(REPOSITORY, "base-image.sh", *words, "--lifecycle", str(CACHE / "lifecycle"), str(folder))
    return folder


def function_image(name: str, function: Path, layout: Path, folder: Path, requirements: str = "") -> Image:
    """The image NAME of a function's folder, over `run` of a base layout. `folder` takes layers that are made anew."""
    wanted = f"{requirements}\n{SHIM_PACKAGES}"
    packages = wheels.fetch(CACHE, wanted, REPOSITORY / "requirements-dev.lock")
    with _python() as python:
        site = CACHE / "layers" / f"{packages.name}.tar"
        if not site.exists():
            site.parent.mkdir(parents=True, exist_ok=True)
            for wheel in packages.glob("*.whl"):
                with zipfile.ZipFile(wheel) as packed:
                    packed.extractall(python.stage / "site")
            python.layer("site", site)
        shutil.copytree(REPOSITORY / "adapter", python.stage / "shim" / "adapter", ignore=NO_BYTECODE)
        shutil.copytree(function, python.stage / "function", ignore=NO_BYTECODE)
        own = folder / hashlib.sha256(name.encode()).hexdigest()[:16]
        layers = [
            site,
            python.layer("shim", own.with_suffix(".shim")),
            python.layer("function", own.with_suffix(".own")),
        ]
    return Image(name, SETTINGS, layers, read_base(layout, "run"))


@dataclasses.dataclass(frozen=True)
class _Python:
    """The base image's Python, unpacked in `root`, and a folder in it for what is to become a layer."""

    root: Path
    stage: Path

    def layer(self, name: str, path: Path) -> Path:
        """What was put into a folder of the stage as a layer, with bytecode, as pip leaves it: an image is read-only."""
        stage = f"/{self.stage.relative_to(self.root)}"
        words = ["python3", "-m", "compileall", "-q", "-s", stage, "-p", HOME, "--invalidation-mode", "unchecked-hash"]
        # Some packages have files for Pythons that this one is not: exit status 1.
        subprocess.run(["chroot", str(self.root), *words, f"{stage}/{name}"], stdout=subprocess.DEVNULL, check=False)
        return write_layer({f"{HOME}/{name}": self.stage / name}, path)


@contextlib.contextmanager
def _python() -> Iterator[_Python]:
    with tempfile.TemporaryDirectory(prefix="gpufn-python-", dir="/var/tmp") as work:
        layout = base_layout(Path(work) / "layout")
        subprocess.run(["umoci", "unpack", "--image", f"{layout}:run", f"{work}/bundle"], check=True)
        root = Path(work) / "bundle" / "rootfs"
        stage = root / "stage"
        stage.mkdir()
        yield _Python(root, stage)
