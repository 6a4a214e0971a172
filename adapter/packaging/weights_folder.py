"""Weights that lie in the function folder. Links are followed inside of it only: model hubs' caches are full of them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from adapter.errors import NotFound, SnapshotError
from adapter.packaging.weights_source import Entry, Progress, is_safe, other_digest, unsafe

_IGNORED = frozenset({"__pycache__", "node_modules"})
_COPY_BYTES = 2**20
_RING = "its links go round in a ring"


class FolderSource:
    """The file or folder `path` of the function folder `root`; `digest` is that of a file, or empty."""

    def __init__(self, root: Path, path: str, digest: str = "") -> None:
        self._root = root.resolve()
        self._said = path
        self._path = root / path
        self._digest = digest

    @property
    def pinned(self) -> str:
        return self._said

    def entries(self) -> list[Entry]:
        real = self._inside(self._path)
        if real.is_file():
            return [Entry(self._path.name, real.stat().st_size)]
        if self._digest:
            raise unsafe(self._said, "A digest is given, which is that of one file; this is a folder.")
        return sorted(self._below(self._path, "", (os.path.realpath(self._path),)), key=lambda entry: entry.name)

    def fetch(self, entry: Entry, folder: Path, progress: Progress) -> Path:
        path = self._path if self._inside(self._path).is_file() else self._path / entry.name
        self._inside(path)
        if self._digest and (found := f"sha256:{digest_of(path)}") != self._digest:
            raise other_digest(self._said, found, self._digest)
        progress(entry.name, entry.size, entry.size)
        return path

    def _below(self, folder: Path, below: str, above: tuple[str, ...]) -> Iterator[Entry]:
        for path in sorted(folder.iterdir()):
            if path.name in _IGNORED or path.name.startswith("."):
                continue
            real = self._inside(path)
            name = f"{below}{path.name}"
            if not is_safe(name):
                raise unsafe(f"{name!r} in {self._said}", "Such a name is not kept.", "Rename the file.")
            if real.is_dir():
                if str(real) in above:
                    raise unsafe(f"{name} in {self._said}", "It is a link to a folder that it lies in.")
                yield from self._below(path, f"{name}/", (*above, str(real)))
            else:
                yield Entry(name, real.stat().st_size)

    def _inside(self, path: Path) -> Path:
        """Where it really lies: a file or folder in the function folder."""
        shown = os.path.normpath(os.path.relpath(path, self._path.parent))
        try:
            real = path.resolve(strict=True)
            mode = real.stat().st_mode
        except (OSError, RuntimeError, ValueError) as exc:  # RuntimeError: links in a ring, before Python 3.13
            why = getattr(exc, "strerror", None) or ("no such name can be" if isinstance(exc, ValueError) else _RING)
            raise NotFound(
                f"The weights {self._said} are missing.",
                why=f"{shown}: {why}.",
                hint="Put them into the function folder, or name another source.",
                code="weights-missing",
            ) from exc
        if real != self._root and self._root not in real.parents:
            raise unsafe(
                shown, "It leads out of the function folder.", "Copy what it leads to: the image holds the folder only."
            )
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise unsafe(shown, "It is neither a file nor a folder.")
        if not os.access(real, os.R_OK):
            raise SnapshotError(f"{shown} cannot be read.", why="Permission denied.", code="weights-unreadable")
        return real


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises `OSError`."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_COPY_BYTES):
            whole.update(chunk)
    return whole.hexdigest()
