"""Files that are there whole or not at all: written beside their place, synced, renamed."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

_STEM_LIMIT = 240
"""Characters of a file's name that its part's name repeats: with the rest they are below 255, for ASCII."""


def write_whole(path: Path, data: bytes) -> None:
    """`data` as the whole content of `path` (0600), on the disk when this returns.

    Raises `OSError`, and then leaves no part of `data` behind.
    """
    part = part_of(path)
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
    sync(path.parent)


def part_of(path: Path) -> Path:
    """Where `write_whole` writes first; a kill may leave it there. Its name is no longer than a name may be."""
    return path.with_name(f".{path.name[:_STEM_LIMIT]}.part")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_below(folder: Path, name: str) -> int:
    """A descriptor to read the regular file `name` (parts with / between) below `folder`. No part of it may be a link:
    somebody else may be changing what lies there. Raises `OSError`."""
    *folders, last = name.split("/")
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for part in folders:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = below
        fd = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
    finally:
        os.close(here)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{name} is no file")
    return fd


def remove_tree(path: Path) -> None:
    """All of a folder, as far as it can be removed, also what somebody nested deeper than Python can follow."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    except RecursionError:
        subprocess.run(["rm", "-rf", "--", str(path)], check=False, capture_output=True)
