"""A CRIU with the right that it needs in its file, for containers of ordinary users.

An engine gives capabilities to root alone; anybody else has them only through a file that carries them. Images that
buildpacks make carry none: they are built by an ordinary user, who cannot say so. So the host lends its own.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

from adapter.keys import ENV_CRIU
from adapter.replica import private_criu

logger = logging.getLogger(__name__)

_ATTRIBUTE = "security.capability"
_LOADERS = "usr/lib/*/ld-linux*.so.*"
_CHECKPOINT_RESTORE = 40  # linux/capability.h
_VFS_CAP_REVISION_2, _VFS_CAP_FLAGS_EFFECTIVE = 0x02000000, 1


def lend(folder: Path, environ: Mapping[str, str] = os.environ) -> str:
    """Make `folder` a copy of this machine's private CRIU whose loader carries CAP_CHECKPOINT_RESTORE.

    Returns why there is none; empty: there is one. `folder` lies where nobody else on this machine can reach it.
    """
    if os.geteuid() != 0:
        return "only root can give a file a capability"
    source = Path(environ.get(ENV_CRIU) or private_criu(environ)).resolve().parent
    if not list(source.glob(_LOADERS)):
        return f"{source} is no private CRIU; make one with: make criu"
    fresh, old = (folder.with_name(f".{folder.name}.{word}") for word in ("fresh", "old"))
    try:
        for path in (fresh, old):
            shutil.rmtree(path, ignore_errors=True)
        _copy(source, fresh)
        if _files(folder) == _files(fresh):  # restores may be under way with it
            return ""
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except OSError as exc:
        return f"{exc}"
    finally:
        for path in (fresh, old):
            shutil.rmtree(path, ignore_errors=True)
    return ""


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, symlinks=True)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o555)
    for loader in folder.glob(_LOADERS):
        os.setxattr(loader.resolve(), _ATTRIBUTE, _file_capability(_CHECKPOINT_RESTORE))


def _files(folder: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """What tells one copy from another: mode, size, time and capability of each file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        right = b"".join(os.getxattr(path, name) for name in os.listxattr(path) if name == _ATTRIBUTE)
        found[path.relative_to(folder).as_posix()] = facts.st_mode, facts.st_size, facts.st_mtime_ns, right
    return found


def _file_capability(number: int) -> bytes:
    """The attribute of a file that gives it one capability: linux/capability.h, ``struct vfs_cap_data``."""
    low, high = (1 << number) & 0xFFFFFFFF, (1 << number) >> 32
    return struct.pack("<5I", _VFS_CAP_REVISION_2 | _VFS_CAP_FLAGS_EFFECTIVE, low, 0, high, 0)
