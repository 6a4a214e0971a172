"""Python environments of functions: one for each distinct set of requirements, shared by all that ask for it.

Installed with uv, which hard-links packages from its cache: a second environment with torch costs
seconds and no space. An environment is complete when its marker is there, which is written last; one
without it was interrupted and is built anew. It is built where it stays, because its scripts name its path.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from adapter.errors import ConfigError, Unavailable
from adapter.keys import REQUIREMENTS_FILE, REQUIREMENTS_NODEPS_FILE, SHIM_REQUIREMENTS

logger = logging.getLogger(__name__)

_MARKER = "gpufn-complete"


_LOCAL = re.compile(rb"^\s*(-[rce]\b|--(requirement|constraint|editable)\b|\.{0,2}/)|@\s*file:|^\s*file:", re.MULTILINE)
"""Requirements that mean files of the folder: such an environment belongs to one folder alone."""

_LOCK_POLL_S = 0.1

_LAST_WORDS = 8
"""Lines of an installer that an error repeats."""


class Environments:
    """Environments below `root`, named by a digest of what is in them. Safe for threads and processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._installers: set[subprocess.Popen[str]] = set()
        self._interrupted = threading.Event()

    def python_for(self, folder: Path) -> Path:
        """The interpreter for the function in `folder`; builds its environment first where there is none.

        Blocks, minutes for a first torch; whoever asks for one that is being built waits for it. Raises
        `ConfigError` with the installer's own words, `Unavailable` where there is no installer.
        """
        wanted = _requirements(folder)
        home = self.root / _digest(folder, wanted)
        python = home / "bin" / "python"
        if _is_complete(home):
            return python
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(self.root / f".{home.name}.lock") as lock:
            if not _is_complete(home):
                fields = {"folder": str(folder), "into": str(home)}
                logger.info("building an environment", extra={"fields": fields})
                shutil.rmtree(home, ignore_errors=True)
                self._build(home, folder, wanted, lock)
                (home / _MARKER).touch()
                logger.info("environment is ready", extra={"fields": fields})
        return python

    def interrupt(self) -> None:
        """End builds under way, for good; what they have made so far is built anew when it is next asked for."""
        self._interrupted.set()
        for installer in list(self._installers):
            installer.terminate()

    @contextmanager
    def _locked(self, path: Path) -> Iterator[int]:
        """One builder at a time, of this or any other process; the lock dies with its holders."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if self._interrupted.wait(_LOCK_POLL_S):
                    raise Unavailable("Waiting for an environment was interrupted.", code="closing")
            yield fd
        finally:
            os.close(fd)

    def _build(self, home: Path, folder: Path, wanted: dict[str, bytes], lock: int) -> None:
        python = str(home / "bin" / "python")
        uv = _uv()
        if uv:
            self._run([*uv, "venv", "--quiet", "--python", sys.executable, str(home)], folder, lock)
            install = [*uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python]
        else:
            self._run([sys.executable, "-m", "venv", str(home)], folder, lock)
            install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        requirements = ["--requirement", str(folder / REQUIREMENTS_FILE)] if REQUIREMENTS_FILE in wanted else []
        self._run([*install, *SHIM_REQUIREMENTS, *requirements], folder, lock)
        if REQUIREMENTS_NODEPS_FILE in wanted:
            no_deps = ["--no-deps", "--requirement", str(folder / REQUIREMENTS_NODEPS_FILE)]
            self._run([*install, *no_deps], folder, lock)

    def _run(self, command: Sequence[str], folder: Path, lock: int) -> None:
        try:
            installer = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                cwd=folder,
                pass_fds=(lock,),  # should we die, the lock lasts until the installer has ended too
            )
        except OSError as exc:
            raise Unavailable(f"{command[0]} cannot be run.", why=f"{exc}.", code="installer-missing") from exc
        self._installers.add(installer)
        if self._interrupted.is_set():
            installer.terminate()
        _, said = installer.communicate()
        self._installers.discard(installer)
        if installer.returncode:
            raise self._failure(folder, said, installer.returncode)

    def _failure(self, folder: Path, said: str, code: int) -> ConfigError | Unavailable:
        if self._interrupted.is_set():
            return Unavailable(f"The environment of {folder.name} was interrupted.", code="closing")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return ConfigError(
            f"The requirements of {folder.name} cannot be installed.",
            why=" ".join(lines[-_LAST_WORDS:]) or f"The installer ended with code {code}.",
            hint=f"Mend {folder / REQUIREMENTS_FILE} and deploy again.",
            code="requirements-failed",
        )


def _is_complete(home: Path) -> bool:
    """A marker, and an interpreter that still leads somewhere: it is a link to the one it was made from."""
    return (home / _MARKER).exists() and (home / "bin" / "python").exists()


def _requirements(folder: Path) -> dict[str, bytes]:
    names = (REQUIREMENTS_FILE, REQUIREMENTS_NODEPS_FILE)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def _digest(folder: Path, wanted: dict[str, bytes]) -> str:
    parts = [sys.version.encode(), sys.base_prefix.encode(), " ".join(SHIM_REQUIREMENTS).encode()]
    for name, content in sorted(wanted.items()):
        parts += [name.encode(), content]
    if any(_LOCAL.search(content) for content in wanted.values()):
        parts += [os.fsencode(folder), *(path.read_bytes() for path in sorted(folder.glob("*.txt")))]
    whole = hashlib.blake2b(digest_size=8)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


def _uv() -> list[str]:
    """The command that runs uv; empty where there is none."""
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    found = shutil.which("uv")
    return [found] if found else []
