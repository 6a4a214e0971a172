"""Wheels for the base image's Python, so that images are built offline: fetched once, kept in the cache."""

from __future__ import annotations

import fcntl
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHON = "3.13"
"""Of the base image: Debian 13's."""

BROUGHT = ("torch",)
"""Packages that the base image brings as Debian packages: no wheel of them, nor of what only they need."""

_GLIBC = ("2_28", "2_27", "2_26", "2_24", "2_17", "2_12", "2_5")
_PLATFORMS = [f"manylinux_{version}" for version in _GLIBC] + ["manylinux2014", "manylinux2010", "manylinux1"]


def fetch(cache: Path, requirements: str, constraints: Path) -> Path:
    """A folder with the wheels of `requirements` (lines of a requirements file) and all that they need.

    Raises `CalledProcessError`; the resolver's and pip's words are in the test's output."""
    words = [PYTHON, platform.machine(), *BROUGHT, requirements, constraints.read_text()]
    folder = cache / "wheels" / hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            new = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                _download(_resolve(requirements, constraints, new), new)
                new.chmod(0o755)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    return folder


def _resolve(requirements: str, constraints: Path, folder: Path) -> Path:
    """Every package with its version, in a file."""
    wanted, overrides, lock = folder / "wanted.txt", folder / "overrides.txt", folder / "lock.txt"
    wanted.write_text("\n".join(line for line in requirements.splitlines() if not line.startswith(BROUGHT)))
    # A marker that is never true takes a package out, wherever it is asked for.
    overrides.write_text("".join(f'{name}; python_version < "3"\n' for name in BROUGHT))
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    target = ["--python-version", PYTHON, "--python-platform", f"{platform.machine()}-manylinux_2_28"]
    known = folder / "constraints.txt"  # but for what is pinned already
    pinned = tuple(f"{name}==" for name in re.findall(r"(?m)^([\w.-]+)==", requirements))
    lines = constraints.read_text().splitlines()
    known.write_text("\n".join(line for line in lines if not line.startswith(pinned)))
    rules = ["--override", str(overrides), "--constraint", str(known)]
    subprocess.run([*uv, *target, *rules, str(wanted), "--output-file", str(lock)], check=True)
    return lock


def _download(lock: Path, folder: Path) -> None:
    # Only the interpreter that the environment was made from is sure to have pip.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    target = ["--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "cp"]
    target += [f"--platform={name}_{platform.machine()}" for name in _PLATFORMS]
    subprocess.run([*pip, *target, "--dest", str(folder), "--requirement", str(lock)], check=True)
