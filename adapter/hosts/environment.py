"""Python environments of functions: one for each distinct set of requirements, shared by all that ask for it.

Installed with uv, which hard-links packages from its cache: a second environment with torch costs
seconds and no space. An environment is complete when its marker is there, which is written last; one
without it was interrupted and is built anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adapter.errors import ConfigError, Unavailable
from adapter.keys import REQUIREMENTS_FILE

logger = logging.getLogger(__name__)

REQUIREMENTS_NODEPS_FILE = "requirements-nodeps.txt"
"""Packages to install without what they depend on (``pip install --no-deps``)."""

SHIM_REQUIREMENTS = ("flask>=3.0,<4", "gunicorn>=27,<28")
"""What the shim needs beside the function's own requirements."""

_MARKER = "gpufn-complete"


class Environments:
    """Environments below `root`, named by a digest of what is in them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def python_for(self, folder: Path) -> Path:
        """The interpreter for the function in `folder`; builds its environment first where there is none.

        Blocks, minutes for a first torch. Raises `ConfigError` with the resolver's own words.
        """
        wanted = _requirements(folder)
        home = self.root / _digest(wanted)
        python = home / "bin" / "python"
        if (home / _MARKER).exists():
            return python
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self.root / f".{home.name}.lock"):
            if not (home / _MARKER).exists():
                logger.info("building an environment", extra={"fields": {"folder": str(folder), "into": str(home)}})
                shutil.rmtree(home, ignore_errors=True)
                _build(home, folder, wanted)
                (home / _MARKER).touch()
        return python


def _requirements(folder: Path) -> dict[str, bytes]:
    names = (REQUIREMENTS_FILE, REQUIREMENTS_NODEPS_FILE)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def _digest(wanted: dict[str, bytes]) -> str:
    whole = hashlib.blake2b(digest_size=8)
    for part in (sys.version.encode(), " ".join(SHIM_REQUIREMENTS).encode()):
        whole.update(part + b"\0")
    for name, content in sorted(wanted.items()):
        whole.update(name.encode() + b"\0" + content + b"\0")
    return whole.hexdigest()


def _build(home: Path, folder: Path, wanted: dict[str, bytes]) -> None:
    python = str(home / "bin" / "python")
    if shutil.which("uv") or _has_uv_module():
        uv = ["uv"] if shutil.which("uv") else [sys.executable, "-m", "uv"]
        _run([*uv, "venv", "--quiet", "--python", sys.executable, str(home)], folder)
        install = [*uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python]
    else:
        _run([sys.executable, "-m", "venv", str(home)], folder)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    requirements = ["--requirement", str(folder / REQUIREMENTS_FILE)] if REQUIREMENTS_FILE in wanted else []
    _run([*install, *SHIM_REQUIREMENTS, *requirements], folder)
    if REQUIREMENTS_NODEPS_FILE in wanted:
        _run([*install, "--no-deps", "--requirement", str(folder / REQUIREMENTS_NODEPS_FILE)], folder)


def _has_uv_module() -> bool:
    import importlib.util

    return importlib.util.find_spec("uv") is not None


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, stdin=subprocess.DEVNULL, check=False)
    except OSError as exc:
        raise Unavailable(f"{command[0]} cannot be run.", why=f"{exc}.", code="installer-missing") from exc
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(
            f"The requirements of {folder.name} cannot be installed.",
            why=" ".join(said[-6:]) or f"{command[0]} ended with code {done.returncode}.",
            hint=f"Mend {folder / REQUIREMENTS_FILE} and deploy again.",
            code="requirements-failed",
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time, of this or any other process; the lock dies with its holder."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
