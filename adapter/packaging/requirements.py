"""What a function's packages are asked for with: its requirement files, line by line, and what identifies them.

Lines are only looked at as far as must be: which package a line names, which files it leads to. What they mean is
the installer's business.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import ConfigError
from adapter.keys import REQUIREMENTS_FILE, REQUIREMENTS_NODEPS_FILE

LOCK_FILE = "requirements.lock"
PYLOCK_FILE = "pylock.toml"
FOREIGN_LOCKS = {
    "uv.lock": "uv export --format requirements.txt --no-emit-project -o requirements.lock",
    "poetry.lock": "poetry export -o requirements.lock",
    "Pipfile.lock": "pipenv requirements --hash > requirements.lock",
}
"""Locks of other tools, and what writes the one that is read here."""

_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*($|[<>=!~;@#\s(])")
_INCLUDE = re.compile(r"\s*(?:-r|--requirement)[\s=]*(\S+)\s*$")
_CONSTRAINT = re.compile(r"\s*(?:-c|--constraint)[\s=]*(\S+)\s*$")
_LOCAL = re.compile(r"^\s*(-e\b|--editable\b|\.{0,2}/)|@\s*file:|^\s*file:")
_COMMENT = re.compile(r"(^|\s+)#.*$")
_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Line:
    """One requirement, continuation lines joined: where it is written, and what it says."""

    file: str
    number: int
    text: str

    @property
    def name(self) -> str:
        """The package's normalised name; empty for an option, a path or an address."""
        match = None if self.text.lstrip().startswith(("-", ".", "/")) else _NAME.match(self.text)
        return normalised(match[1]) if match else ""

    def __str__(self) -> str:
        return f"{self.file}, line {self.number}: {self.text.split(' --hash')[0].strip()}"


@dataclass(frozen=True, slots=True)
class Requirements:
    """All lines of a function: those that bring what they depend on, and those that do not."""

    lines: tuple[Line, ...]
    without_deps: tuple[Line, ...]
    digest: str

    @property
    def has_hashes(self) -> bool:
        """With one hash somewhere, an installer wants one for each package of the same run."""
        return any("--hash" in line.text for line in self.lines)

    def without(self, names: Sequence[str]) -> Requirements:
        """The same, but for the lines that name one of `names`."""
        left_out = set(map(normalised, names))
        return Requirements(
            tuple(line for line in self.lines if line.name not in left_out),
            tuple(line for line in self.without_deps if line.name not in left_out),
            self.digest,
        )

    def line_of(self, words: str) -> Line | None:
        """The line whose package an installer's words name first."""
        places = [
            (match.start(), line)
            for line in (*self.lines, *self.without_deps)
            if line.name
            and (match := re.search(rf"(?<![\w.-]){re.escape(line.name)}(?![\w-])", normalised_text(words)))
        ]
        return min(places, key=lambda place: place[0])[1] if places else None


def normalised(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def normalised_text(text: str) -> str:
    return re.sub(r"[-_]+", "-", text).lower()


def read_requirements(folder: Path, app: Path) -> Requirements:
    """Of the function in `folder`; where it has no such file there, of `app`, that it lies in.

    The lock wins over what it was made from. Raises `ConfigError`.
    """
    whole = hashlib.sha256()
    lines: list[Line] = []
    nodeps: list[Line] = []
    if path := _first(folder, app, LOCK_FILE, PYLOCK_FILE, REQUIREMENTS_FILE):
        lines = _pylock(path, app) if path.name == PYLOCK_FILE else list(_lines(path, app))
    elif path := _first(folder, app, *FOREIGN_LOCKS):
        raise ConfigError(
            f"{path.name} cannot be read, and there is no {REQUIREMENTS_FILE}.",
            why=f"Packages are installed from {LOCK_FILE}, {PYLOCK_FILE} or {REQUIREMENTS_FILE}.",
            hint=f"Write one with: {FOREIGN_LOCKS[path.name]}",
            code="foreign-lock",
        )
    if path := _first(folder, app, REQUIREMENTS_NODEPS_FILE):
        nodeps = list(_lines(path, app))
    for kind, found in (("", lines), ("no-deps ", nodeps)):
        for line in found:
            whole.update(f"{kind}{line.text}\n".encode())
            if match := _CONSTRAINT.match(line.text):
                whole.update(_text_of(Path(match[1]), app).encode())
            if _LOCAL.search(line.text):
                _add_folder(whole, app)
    return Requirements(tuple(lines), tuple(nodeps), whole.hexdigest())


def _first(folder: Path, app: Path, *names: str) -> Path | None:
    return next((place / n for place in dict.fromkeys((folder, app)) for n in names if (place / n).exists()), None)


def _lines(path: Path, app: Path, depth: int = 0) -> Iterator[Line]:
    """Each requirement of the file and of those that it includes, constraints by their whole path."""
    text, shown = _text_of(path, app), _shown(path, app)
    if depth > _DEPTH:
        raise ConfigError(f"{shown} includes itself.", hint="Remove one of its -r lines.", code="bad-file")
    pending, started = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        started = started if pending else number
        pending += " " + _COMMENT.sub("", raw).rstrip() if pending else _COMMENT.sub("", raw).rstrip()
        if pending.endswith("\\"):
            pending = pending[:-1].rstrip()
            continue
        line, pending = pending.strip(), ""
        if not line:
            continue
        if match := _INCLUDE.match(line):
            yield from _lines(path.parent / match[1], app, depth + 1)
        elif match := _CONSTRAINT.match(line):
            yield Line(shown, started, f"-c {path.parent / match[1]}")
        else:
            yield Line(shown, started, line)


def _text_of(path: Path, app: Path) -> str:
    """Raises `ConfigError`, also for a file out of the application."""
    real = Path(os.path.realpath(path))
    if real != app and Path(os.path.realpath(app)) not in real.parents:
        raise ConfigError(
            f"{_shown(path, app)} lies out of the function folder.",
            why="A builder sees that folder only.",
            hint="Put the file into it.",
            code="outside",
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigError(f"{_shown(path, app)} cannot be read.", why=f"{exc.strerror}.", code="bad-file") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{_shown(path, app)} is no text in UTF-8.", why=f"{exc}.", code="bad-file") from exc


def _shown(path: Path, app: Path) -> str:
    return os.path.relpath(path, app)


def _pylock(path: Path, app: Path) -> list[Line]:
    """The packages of a PEP 751 lock, each pinned and with its hashes."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    shown = _shown(path, app)
    try:
        packages: list[dict[str, Any]] = tomllib.loads(_text_of(path, app)).get("packages", [])
        return [Line(shown, number, _pinned(package)) for number, package in enumerate(packages, 1)]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigError(
            f"{shown} is no lock that can be read.",
            why=f"{exc!r}.",
            hint=f"Write it anew, or use {LOCK_FILE}: one pinned package a line.",
            code="bad-file",
        ) from exc


def _pinned(package: dict[str, Any]) -> str:
    files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
    hashes = sorted({file["hashes"]["sha256"] for file in files})
    marker = f" ; {package['marker']}" if package.get("marker") else ""
    return " ".join([f"{package['name']}=={package['version']}{marker}", *(f"--hash=sha256:{h}" for h in hashes)])


def _add_folder(whole: hashlib._Hash, app: Path) -> None:
    """A requirement that is a folder of the application: all of that is part of what was asked for."""
    for path in sorted(app.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            whole.update(f"{path.relative_to(app)}\n".encode() + path.read_bytes())
