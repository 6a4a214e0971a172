"""What must be equal for a snapshot to fit: the identity of code, environment and machine.

An identity is a flat mapping of names to short strings; its key is their digest. Both are stored with
the snapshot, so that a mismatch can name the field that differs. Values that may be secret (variables)
enter as digests only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from adapter.keys import CONTRACT_VERSION

Identity = dict[str, str]

_CONTENT_LIMIT_BYTES = 2**20
"""Files above this count by size and time, not content: reading gigabytes of weights would eat the gain."""

_IGNORED = frozenset({"__pycache__", ".git", ".venv", "node_modules", "template", "build"})


_WEIGHT_FIELDS = ("contract", "code", "packages", "variables", "weights")
"""`weights` is there where the image brings some, which `load` may have read."""


def weights_identity(identity: Mapping[str, str]) -> Identity:
    """The part of an identity that weights depend on: code and packages, not the machine."""
    return {name: identity[name] for name in _WEIGHT_FIELDS if name in identity}


MACHINE_FIELDS = ("kernel", "cpu", "driver", "gpus")
"""Fields that say on which machines a process snapshot fits, in or out of a container."""


def machine_identity() -> Identity:
    """`MACHINE_FIELDS` of the machine this runs on."""
    return {
        "kernel": platform.release(),
        "cpu": _cpu_digest(),
        "driver": _driver_version(),
        "gpus": _gpu_models(),
    }


def key_of(identity: Mapping[str, str]) -> str:
    """Twenty hex digits that name the snapshot of this identity."""
    text = json.dumps(dict(identity), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def differing_fields(mine: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names of the fields in which two identities differ, sorted."""
    return sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))


def identity_of(folder: Path, python: str, variables: Mapping[str, str], device: str) -> Identity:
    """The identity of the function in `folder` run by the interpreter `python` on this machine.

    `variables` are those that `load` sees. Reads small files only; raises `OSError` where it cannot.
    """
    return {
        "contract": str(CONTRACT_VERSION),
        "shim": _shim_digest(),
        "folder": str(folder),
        "code": tree_digest(folder),
        "python": _interpreter(python),
        "packages": _packages_digest(python),
        "variables": _digest(f"{name}={value}" for name, value in sorted(variables.items())),
        "device": device,
        **machine_identity(),
    }


def _shim_digest() -> str:
    """Of what runs in a replica: the shared vocabulary and the shim's packages, not the control side."""
    package = Path(__file__).resolve().parents[1]
    modules = (f"{path.name} {_content_digest(path)}" for path in sorted(package.glob("*.py")))
    return _digest([*modules, *(tree_digest(package / name) for name in ("runtime", "snapshot"))])


def tree_digest(folder: Path) -> str:
    """Digest of the names and contents below `folder`, byte-code and version-control folders left out.

    Links are followed, except one that leads nowhere or back to a folder it lies in: those count by their text.
    """
    return _digest(_tree_lines(folder, "", (os.path.realpath(folder),)))


def _tree_lines(folder: Path, below: str, above: tuple[str, ...]) -> Iterable[str]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name in _IGNORED or entry.name.endswith(".pyc"):
                continue
            name = f"{below}/{entry.name}"
            real = os.path.realpath(entry.path)
            if entry.is_symlink() and (real in above or not os.path.exists(real)):
                yield f"{name} -> {os.readlink(entry.path)}"
                continue
            if entry.is_dir():
                yield from _tree_lines(Path(entry.path), name, (*above, real))
                continue
            facts = entry.stat()
            if not stat.S_ISREG(facts.st_mode):  # reading a pipe would wait for ever
                yield f"{name} {stat.S_IFMT(facts.st_mode):o}"
            elif facts.st_size > _CONTENT_LIMIT_BYTES:
                yield f"{name} {facts.st_size} {facts.st_mtime_ns}"
            else:
                yield f"{name} {_content_digest(Path(entry.path))}"


def _content_digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _digest(lines: Iterable[str]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for line in lines:
        whole.update(line.encode(errors="surrogateescape") + b"\n")
    return whole.hexdigest()


def _interpreter(python: str) -> str:
    facts = os.stat(python)
    return f"{os.path.realpath(python)} {facts.st_size} {facts.st_mtime_ns}"


def _packages_digest(python: str) -> str:
    """Digest of the distributions beside `python`: their folders are named ``name-version.dist-info``."""
    library = Path(python).parent.parent / "lib"
    found: list[str] = []
    for site in sorted(library.glob("python3*/site-packages")):
        found += sorted(entry.name for entry in os.scandir(site) if entry.name.endswith(".dist-info"))
    return _digest([str(library), *found])


def _cpu_digest() -> str:
    """Model and features of the first processor: CRIU and compiled code depend on both."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first = file.read(8192).split("\n\n", 1)[0]
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    return _digest([platform.machine(), *(line for line in first.splitlines() if line.startswith(wanted))])


def _driver_version() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "none"


def _gpu_models() -> str:
    """Models of this machine's GPUs, as the driver names them: a process comes back on the same model only."""
    models: set[str] = set()
    for path in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        with suppress(OSError):
            lines = path.read_text().splitlines()
            models.update(line.partition(":")[2].strip() for line in lines if line.startswith("Model:"))
    return ", ".join(sorted(models)) or "none"
