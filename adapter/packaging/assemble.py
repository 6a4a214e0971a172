"""Puts the buildpack together: its scripts, what of gpufn they run, and what it brings for builds without a network."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from adapter.errors import ConfigError, Conflict
from adapter.packaging.application import WHEELS_FOLDER
from adapter.packaging.shim import SHIM_MODULES, SHIM_PACKAGES, adapter_folder

BUILDPACK_ID = "gpufn/gpu-function"
SOURCE = "buildpacks/gpu-function"
"""In a clone; an installed gpufn carries it below this package."""

_BUILD_PACKAGES = (*SHIM_PACKAGES, "packaging", "registry")
"""What of `adapter` a build runs."""


def source_folder() -> Path:
    """The buildpack's own files. Raises `ConfigError` where this installation lacks them."""
    for folder in (Path(__file__).parent / "buildpack", adapter_folder().parent / SOURCE):
        if (folder / "buildpack.toml").is_file():
            return folder
    raise ConfigError(
        "This installation of gpufn has no buildpack.",
        hint="Install gpufn again, whole: pip install 'gpufn[all]'",
        code="not-installed",
    )


def assemble(folder: Path, *, wheels: Path | None = None, criu: Path | None = None) -> None:
    """Write the buildpack into `folder`, whole or not at all.

    `wheels`: a folder with what the shim requires, and maybe more; `criu`: a folder with a private CRIU. Raises
    `Conflict` where `folder` holds something that is no buildpack of ours, `ConfigError` where something is missing.
    """
    if folder.exists() and not _is_ours(folder):
        raise Conflict(
            f"{folder} holds something else.",
            why="It would be overwritten.",
            hint="Name a new folder, or an empty one.",
            code="folder-exists",
        )
    draft = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        for source, target in _files(wheels, criu):
            place = draft / target
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place, follow_symlinks=not source.is_symlink())
            if target.parts[0] == "bin":
                place.chmod(0o755)  # an installer may not have kept it
        for parent, _, names in os.walk(draft):
            for name in names:
                path = os.path.join(parent, name)
                if not os.path.islink(path):
                    os.chmod(path, 0o755 if os.access(path, os.X_OK) else 0o644)
            os.chmod(parent, 0o755)  # noqa: S103  # a build reads it as another user
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except OSError as exc:
        raise ConfigError(f"{folder} cannot be written.", why=f"{exc.strerror}.", code="unwritable") from exc
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        return f'id = "{BUILDPACK_ID}"' in (folder / "buildpack.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _files(wheels: Path | None, criu: Path | None) -> Iterator[tuple[Path, Path]]:
    """What goes into a buildpack: each file, and where."""
    source = source_folder()
    for name in ("buildpack.toml", "README.md", "bin/detect", "bin/build"):
        yield source / name, Path(name)
    library = Path("lib/adapter")
    for name in SHIM_MODULES:
        yield adapter_folder() / f"{name}.py", library / f"{name}.py"
    for package in _BUILD_PACKAGES:
        for path in sorted((adapter_folder() / package).rglob("*.py")):
            yield path, library / path.relative_to(adapter_folder())
    if wheels is not None:
        found = sorted(path for path in wheels.iterdir() if path.suffix == ".whl")
        if not found:
            raise ConfigError(f"{wheels} holds no wheels.", hint="Fill it with: pip download -d FOLDER …", code="empty")
        for path in found:
            yield path, Path(WHEELS_FOLDER) / path.name
    if criu is not None:
        if not (criu / "criu").exists():
            raise ConfigError(f"{criu} holds no CRIU.", hint="Make one with: make criu", code="criu-missing")
        for path in sorted(criu.rglob("*")):
            if path.is_symlink() or path.is_file():
                yield path, Path("criu") / path.relative_to(criu)
