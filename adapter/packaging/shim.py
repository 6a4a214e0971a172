"""The layers that gpufn brings: the shim, a CRIU of its own, and what the image's processes find in their environment."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import adapter
from adapter.errors import ConfigError
from adapter.keys import ENV_CRIU
from adapter.packaging.layers import Making
from adapter.packaging.packages import compile_all
from adapter.packaging.settings import CRIU, SNAPSHOTS, BuildSettings, launch_variables

SHIM_MODULES = (
    "__init__", "errors", "files", "keys", "logs", "pagecache", "records", "replica", "spec", "units",
)  # fmt: skip
SHIM_PACKAGES = ("gpu", "runtime", "snapshot")
"""What of `adapter` is in an image: the vocabulary and the shim side, never the control side."""

LEAST_CRIU = (4, 1)
_VERSION = re.compile(r"Version:\s*(\d+\.\d+)")

_LAUNCH_SCRIPT = f"""#!/bin/sh
# Run by the launcher before the process: writes variables to descriptor 3. See docs/reference/buildpack.md.
if [ "${{{SNAPSHOTS.name}:-{SNAPSHOTS.default}}}" = off ]; then
    echo 'GPUFN_PROCESS_SNAPSHOT = "off"' >&3
    echo 'GPUFN_WEIGHT_SNAPSHOT = "off"' >&3
elif [ "${{{CRIU.name}:-{CRIU.default}}}" = off ]; then
    echo 'GPUFN_PROCESS_SNAPSHOT = "off"' >&3
fi
"""


def adapter_folder() -> Path:
    """The package `adapter` that runs this build."""
    return Path(adapter.__file__).parent


def shim_files() -> list[Path]:
    """Sources of the shim, by name."""
    root = adapter_folder()
    modules = [root / f"{name}.py" for name in SHIM_MODULES]
    return [*modules, *(path for name in SHIM_PACKAGES for path in sorted((root / name).rglob("*.py")))]


def shim_made_from() -> dict[str, str]:
    whole = hashlib.sha256()
    for path in shim_files():
        whole.update(f"{path.relative_to(adapter_folder())}\n".encode() + path.read_bytes())
    return {"gpufn": adapter.__version__, "sources": whole.hexdigest(), "python": sys.version.split()[0]}


def leave_only_the_shim(root: Path) -> None:
    """Removes from `root`, an installed `adapter` in an image, what no function needs. The template's builds call it."""
    kept = {*SHIM_PACKAGES, *(f"{name}.py" for name in SHIM_MODULES), "py.typed"}
    for path in root.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_shim(layer: Making, environ: Mapping[str, str]) -> None:
    """The package in a folder of its own, which the image's processes have on their path."""
    for path in shim_files():
        target = layer.folder / "adapter" / path.relative_to(adapter_folder())
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    compile_all(layer.folder, Path(sys.executable), environ)
    layer.set_env("PYTHONPATH", str(layer.folder), "prepend", delimiter=os.pathsep)
    layer.what = f"gpufn {adapter.__version__}"


# CRIU -----------------------------------------------------------------------------------------------------------


def installed_criu(environ: Mapping[str, str]) -> tuple[int, ...]:
    """The version of the CRIU that the build image has, and so the run image made beside it; empty: it has none."""
    path = shutil.which("criu", path=environ.get("PATH"))
    return tuple(int(part) for part in _version(path).split(".") if part) if path else ()


def criu_version(folder: Path) -> str:
    """The version of the CRIU in `folder`, as 4.1; unknown: it says none."""
    return _version(str(folder / "criu")) or "unknown"


def _version(path: str) -> str:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = _VERSION.search(said)
    return match[1] if match else ""


def brings_criu(settings: BuildSettings, brought: Path | None, environ: Mapping[str, str]) -> bool:
    """Whether the image gets the buildpack's CRIU, which is in `brought`. Raises `ConfigError`: it must, and cannot."""
    if settings.criu == "off":
        return False
    if settings.criu == "auto":
        return brought is not None and installed_criu(environ) < LEAST_CRIU
    if brought is None:
        raise ConfigError(
            "This buildpack brings no CRIU.",
            why="It was made without, and BP_GPUFN_CRIU says that the image must get one.",
            hint="Make it anew on a machine where `make criu` has run: gpufn buildpack FOLDER",
            code="criu-missing",
        )
    return True


def criu_made_from(brought: Path) -> dict[str, str]:
    whole = hashlib.sha256()
    for path in _criu_files(brought):
        mode = "x" if os.access(path, os.X_OK) else "-"
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        whole.update(f"{path.relative_to(brought)} {mode}\n".encode() + content)
    return {"files": whole.hexdigest()}


def make_criu(layer: Making, brought: Path) -> None:
    """A private CRIU with the libraries that it is linked against; the system's stay as they are."""
    for path in _criu_files(brought):
        target = layer.folder / path.relative_to(brought)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target, follow_symlinks=False)
    layer.set_env(ENV_CRIU, str(layer.folder / "criu"))
    layer.what = "CRIU and its libraries"


_CRIU_LEAVES = ("gconv", "compel", "perl", "perl-base", "audit", "python3", "doc", "man")
"""Folders of its packages that no dump and no restore reads."""


def _criu_files(brought: Path) -> list[Path]:
    return sorted(
        path
        for path in brought.rglob("*")
        if (path.is_symlink() or path.is_file()) and not {*path.relative_to(brought).parts} & {*_CRIU_LEAVES}
    )


# Environment ----------------------------------------------------------------------------------------------------


def environment_made_from(folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    script = hashlib.sha256(_LAUNCH_SCRIPT.encode()).hexdigest()
    variables = hashlib.sha256(repr(sorted(launch_variables(environ).items())).encode()).hexdigest()
    return {"folder": str(folder), "script": script, "variables": variables}


def make_environment_layer(layer: Making, folder: Path, environ: Mapping[str, str]) -> None:
    """Where the function lies, what `BPE_*` of the build set, and the script that the launcher runs."""
    layer.set_env("GPUFN_FOLDER", str(folder))
    layer.set_env("PYTHONUNBUFFERED", "1")
    for name, value in launch_variables(environ).items():
        variable, _, kind = name.rpartition(".")
        layer.set_env(variable, value, kind)
    script = layer.folder / "exec.d" / "gpufn"
    script.parent.mkdir()
    script.write_text(_LAUNCH_SCRIPT, encoding="utf-8")
    script.chmod(0o755)
    layer.what = "variables of the image's processes"
