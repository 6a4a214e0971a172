"""What every source of weights is: names of files with sizes, fetched one by one. Names by strangers stay inside."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapter.errors import AdapterError, SnapshotError, StorageError

Progress = Callable[[str, int, int], None]
"""Called with a file's name (or a step's), the bytes done, and all of them; 0: not known."""

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+ -]{0,200}")
_DEPTH = 8
FILES_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source: its name with ``/`` between folders, and its size in bytes; -1: not known yet."""

    name: str
    size: int


class Source(Protocol):
    """Where weights come from. `pinned` names exactly what was found, as a person may log it."""

    @property
    def pinned(self) -> str: ...

    def entries(self) -> list[Entry]:
        """Its files, by name. Raises `AdapterError`."""

    def fetch(self, entry: Entry, folder: Path, progress: Progress) -> Path:
        """The file on this disk, as the source's digests say it is: its own place, or ``folder/<name>``.

        Raises `AdapterError`.
        """


def silent(_what: str, _done: int, _total: int) -> None:
    """Progress for nobody."""


def is_safe(name: str) -> bool:
    """Whether a stranger's name of a file stays in the folder that it is written to, and can be read by people."""
    parts = name.split("/")
    return len(parts) <= _DEPTH and all(_PART.fullmatch(part) and not part.endswith((" ", ".")) for part in parts)


def checked(entries: list[Entry], where: str) -> list[Entry]:
    """Entries of a stranger's list, sorted. Raises `SnapshotError` where they are too many or repeat a name."""
    names = {entry.name for entry in entries}
    if len(names) != len(entries) or len(entries) > FILES_LIMIT:
        raise unsafe(where, "It names a file twice." if len(names) != len(entries) else "It names too many files.")
    return sorted(entries, key=lambda entry: entry.name)


def unsafe(what: str, why: str, hint: str = "") -> SnapshotError:
    return SnapshotError(f"{what} is refused.", why=why, hint=hint, code="weights-unsafe")


def other_digest(what: str, is_now: str, wanted: str) -> SnapshotError:
    return SnapshotError(
        f"{what} is not what was asked for.",
        why=f"Its digest is {is_now}, not {wanted}.",
        hint="See who changed the file; or write the new digest, if the change is meant.",
        code="weights-digest",
    )


def disk_error(exc: OSError, what: str) -> AdapterError:
    """The error of a disk that gives or takes no more."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"There is no room for {what}.",
            why="The disk is full.",
            hint="The build needs twice the size of the weights for a while.",
            code="disk-full",
        )
    return StorageError(f"{what} cannot be kept.", why=f"{exc.strerror or exc}.", code="weights-not-written")
