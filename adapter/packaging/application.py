"""The application folder of an image: what of a user's folder is in it, and what never is.

`IGNORED` and the lines of `.gpufnignore` say what stays out: what tools leave behind, and files that hold secrets.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adapter.errors import ConfigError

IGNORE_FILE = ".gpufnignore"
WHEELS_FOLDER = "wheels"
"""Packages for a build without an index; they are in the image installed, and not again as files."""

LEFT_BEHIND = (
    ".git", ".hg", ".svn", ".venv", "venv", ".tox", ".nox", "node_modules", "__pycache__", "*.pyc", ".mypy_cache",
    ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", ".DS_Store", "*.swp", ".coverage", IGNORE_FILE, "/build",
    "/template", f"/{WHEELS_FOLDER}",
)  # fmt: skip
"""What tools leave behind. A slash in front: only at the top."""

SECRET = (
    ".env", ".env.*", ".netrc", ".pypirc", ".git-credentials", ".npmrc", ".ssh", ".aws", ".azure", ".kube", ".docker",
    ".config/gcloud", "id_rsa", "id_ecdsa", "id_ed25519", "*.key", "*.p12", "*.pfx", ".huggingface",
)  # fmt: skip
"""What holds secrets: they come to a replica mounted, never in an image."""

IGNORED = (*LEFT_BEHIND, *SECRET)


@dataclass(frozen=True, slots=True)
class Ignore:
    """Patterns of names that stay out, the last that fits wins; one that begins with ``!`` brings back."""

    patterns: tuple[str, ...]

    def __call__(self, path: PurePosixPath) -> bool:
        """Whether `path`, relative to the application, stays out (for itself, not for the folder that it is in)."""
        out = False
        for pattern in self.patterns:
            brings_back = pattern.startswith("!")
            if _fits(path, pattern.removeprefix("!")):
                out = not brings_back
        return out


def _fits(path: PurePosixPath, pattern: str) -> bool:
    pattern = pattern.rstrip("/")
    if "/" not in pattern:
        return fnmatch.fnmatchcase(path.name, pattern)
    return fnmatch.fnmatchcase(str(path), pattern.lstrip("/"))


def read_ignore(app: Path) -> Ignore:
    """The patterns of the folder: ours, and those of its `.gpufnignore`, a line each. Raises `ConfigError`."""
    try:
        fd = os.open(app / IGNORE_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError("it is no file")
            text = file.read()
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{IGNORE_FILE} cannot be read.", why=f"{exc}.", code="bad-file") from exc
    lines = (line.strip() for line in text.splitlines())
    return Ignore((*IGNORED, *(line for line in lines if line and not line.startswith("#"))))


def entries(app: Path, ignore: Ignore) -> Iterator[tuple[Path, os.stat_result]]:
    """What the image holds of `app`: folders before what is in them, by name. Links are not followed.

    Raises `ConfigError` for a link that leads out of the folder, and for what is neither file, folder nor link.
    """
    root = Path(os.path.realpath(app))
    for path in _walk(app, app, ignore):
        status = os.lstat(path)
        shown = path.relative_to(app)
        if stat.S_ISLNK(status.st_mode):
            target = Path(os.path.realpath(path))
            if target != root and root not in target.parents:
                raise ConfigError(
                    f"{shown} is a link that leads out of the function folder.",
                    why=f"It leads to {os.readlink(path)}, which no image has.",
                    hint=f"Copy what it leads to, or name it in {IGNORE_FILE}.",
                    code="link-outside",
                )
        elif not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ConfigError(
                f"{shown} is neither a file nor a folder.",
                why="A pipe, a socket or a device cannot be in an image.",
                hint=f"Remove it, or name it in {IGNORE_FILE}.",
                code="no-file",
            )
        yield path, status


def _walk(folder: Path, app: Path, ignore: Ignore) -> Iterator[Path]:
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if ignore(PurePosixPath(path.relative_to(app))):
            continue
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, app, ignore)


def remove_ignored(app: Path, ignore: Ignore) -> list[str]:
    """Take what the image must not hold out of the application folder, which is the build's own copy; their names."""
    removed = []
    for parent, folders, files in os.walk(app):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if ignore(PurePosixPath(path.relative_to(app))):
                removed.append(str(path.relative_to(app)))
                _remove(path)
        folders[:] = [name for name in folders if Path(parent, name).is_dir() and not Path(parent, name).is_symlink()]
    return sorted(removed)


def remove_paths(app: Path, paths: Sequence[Path]) -> None:
    """Take files out of the application that another layer holds, and the folders that are empty then."""
    for path in paths:
        _remove(path)
        parent = path.parent
        while parent != app and app in parent.parents and not any(parent.iterdir()):
            parent.rmdir()
            parent = parent.parent


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
