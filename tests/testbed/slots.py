"""Which clusters there are on this computer: each has a number, and from it a state folder and addresses of its own.

Whoever holds a slot's lock has the cluster; a lock that nobody holds is a cluster that died, and what it left is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
from pathlib import Path
from typing import IO

SLOTS = Path("/var/tmp/gpufn-testbed")
"""Short, since the path of a socket has at most 107 bytes; on disk, since images are unpacked there."""
COUNT = 32
CGROUPS = Path("/sys/fs/cgroup")
CGROUP = "gpufn-testbed"


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Of the cluster with this number, 0 to 31, all from 198.18.0.0/15, which is for testbeds and routed nowhere."""

    number: int

    @property
    def host(self) -> str:
        """This computer, as the cluster sees it."""
        return f"198.18.{self.number}.1"

    @property
    def control_plane(self) -> str:
        return f"198.18.{self.number}.2"

    def node(self, index: int) -> str:
        return f"198.18.{self.number}.{11 + index}"

    def pods(self, index: int) -> str:
        """The network of the pods of one node, 0 to 7."""
        return f"198.19.{8 * self.number + index}.0/24"

    @property
    def all_pods(self) -> str:
        return f"198.19.{8 * self.number}.0/21"

    @property
    def services(self) -> str:
        return f"198.18.{128 + 4 * self.number}.0/22"

    def service(self, index: int) -> str:
        return f"198.18.{128 + 4 * self.number}.{index}"


class Slot:
    """A number that no other cluster has, until `release`."""

    def __init__(self, number: int, lock: IO[bytes]) -> None:
        self.number = number
        self.folder = SLOTS / str(number)
        self.cgroup = f"/{CGROUP}/{number}"
        self.addresses = Addresses(number)
        self._lock = lock

    @classmethod
    def take(cls) -> Slot:
        """A free one, after cleaning up behind every cluster that died. Raises `RuntimeError`: all are taken."""
        SLOTS.mkdir(mode=0o711, exist_ok=True)
        if SLOTS.lstat().st_uid != os.getuid():
            raise RuntimeError(f"{SLOTS} is somebody else's")
        taken = None
        for number in range(COUNT):
            slot = cls._try(number)
            if slot is None:
                continue
            slot._clean()
            if taken is None:
                taken = slot
            else:
                slot._lock.close()
            if not any((SLOTS / f"{later}.lock").exists() for later in range(number + 1, COUNT)):
                break
        if taken is None:
            raise RuntimeError(f"{COUNT} clusters run already")
        taken.folder.mkdir(mode=0o711)
        return taken

    @classmethod
    def _try(cls, number: int) -> Slot | None:
        lock = (SLOTS / f"{number}.lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        return cls(number, lock)

    def make_cgroup(self, name: str) -> str:
        """A control group of that name in every hierarchy; returns its path below each."""
        path = f"{self.cgroup}/{name}"
        for hierarchy in _hierarchies():
            for parent in (Path(f"/{CGROUP}"), Path(self.cgroup), Path(path)):
                folder = hierarchy / str(parent).lstrip("/")
                folder.mkdir(exist_ok=True)
                _delegate(folder.parent)
        return path

    def release(self) -> None:
        """Removes what is left of the cluster, whose processes have ended."""
        self._clean()
        self._lock.close()

    def _clean(self) -> None:
        self._end_waiting()
        for hierarchy in _hierarchies():
            for folder, _, _ in os.walk(hierarchy / self.cgroup.lstrip("/"), topdown=False):
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(folder)
            with contextlib.suppress(OSError):  # other clusters are in it
                (hierarchy / CGROUP).rmdir()
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _end_waiting(self) -> None:
        """Kills each nsenter that was stopped when its program was, and so never learned of its end."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended
                words = path.read_bytes().split(b"\0")
                if words[0] == b"nsenter" and any(f"{self.folder}/".encode() in word for word in words):
                    os.kill(int(path.parent.name), signal.SIGKILL)


def _hierarchies() -> list[Path]:
    """Where control groups are made: one folder with version 2, one for each controller with version 1."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [folder for folder in CGROUPS.iterdir() if folder.is_dir() and not folder.is_symlink()]


def _delegate(folder: Path) -> None:
    """Version 2 only: the controllers of a group are for its children too."""
    with contextlib.suppress(OSError):  # version 1 has no such file
        controllers = (folder / "cgroup.controllers").read_text().split()
        (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
