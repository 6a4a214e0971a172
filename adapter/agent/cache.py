"""The snapshots on a node: which there are, and which go when they take more room than they may.

Functions' containers write below their own folders while this reads: what is no snapshot as a whole is none, and nothing
is followed out of the store.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from adapter.errors import SnapshotError
from adapter.records import Rung, StartRecord
from adapter.snapshot.store import DRAFT, Store, discard, read_snapshot

logger = logging.getLogger(__name__)

_ASSUMED_SAVING_S = 5.0
"""What a snapshot saves each start that it serves, before that was measured on this node."""
_SAVING_LIMIT_S = 600.0
"""Functions say what their starts took: none outweighs all others by that."""
_HALF_LIFE_S = 86_400.0
"""One that was used yesterday is half as likely to be used next as one that was used just now."""
_FASTER = {"process": ((Rung.RESTORE,), (Rung.START, Rung.LOAD)), "weights": ((Rung.START,), (Rung.LOAD,))}
_ABANDONED_S = 24 * 3600.0
"""A draft that was begun so long ago nobody builds any more."""
_ENTRIES = 1000
"""Of one function's folder that are looked at."""
_PROBE_BYTES = 64 * 2**20
_PROBE_FILE = ".gpufn-disk-probe"


@dataclass(frozen=True, slots=True)
class Cached:
    """One snapshot; `name` is ``tenant/function.namespace``, `bytes` what it takes of the disk."""

    path: Path
    name: str
    kind: str
    key: str
    bytes: int
    used_at_ns: int
    made_at_ns: int = 0


def read_cache(root: Path) -> list[Cached]:
    """Every snapshot below `root` that is whole, whoever's it is. Blocks."""
    found = []
    for path in _candidates(root):
        name = path.parent.relative_to(root).as_posix()
        try:
            snapshot = read_snapshot(path, owner=path.lstat().st_uid)
            if f"{snapshot.tenant}/{snapshot.function}" == name and path.name == f"{snapshot.kind}-{snapshot.key}":
                size = snapshot.size_bytes
                facts = snapshot.used_at_ns, snapshot.created_at_ns
                found.append(Cached(path, name, snapshot.kind, snapshot.key, size, *facts))
        except (SnapshotError, OSError):
            continue
    return sorted(found, key=lambda cached: (cached.name, cached.kind, cached.key))


def _candidates(root: Path) -> Iterator[Path]:
    """What may be snapshots by their names."""
    return (path for path in _entries(root) if "-" in path.name and not path.name.startswith("."))


def _entries(root: Path) -> Iterator[Path]:
    """What functions' folders hold; of one that a container has filled with names, only some."""
    for folder in root.glob("[!.]*/*"):
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in islice(entries, _ENTRIES):
                yield folder / entry.name


def _sweep(root: Path) -> None:
    """Remove what builders left that were ended: of a function that is gone none comes after them."""
    for path in _entries(root):
        with suppress(OSError):
            if path.name.startswith(DRAFT) and time.time() - path.lstat().st_mtime > _ABANDONED_S:
                discard(path)


def make_folder(root: Path, name: str) -> None:
    """The folder of a function's snapshots (``tenant/function.namespace``), before its containers have it mounted.

    Whatever user they run as may write there. Nobody else comes that far: the folders above are root's alone. Raises
    `SnapshotError` for a name that would lead elsewhere, `OSError`.
    """
    tenant, _, function = name.partition("/")
    Store(root).folder(tenant, function).chmod(0o777)


@dataclass(slots=True)
class Savings:
    """What starts took on this node, by function and rung: the latest of each."""

    seconds: dict[tuple[str, Rung], float] = field(default_factory=dict)

    def saw(self, name: str, record: StartRecord) -> None:
        """A start of the function `name`, without what came before its container's first instruction."""
        if not record.error:
            self.seconds[name, record.rung] = record.total_ns / 1e9

    def of(self, name: str, kind: str) -> float:
        """Seconds that a snapshot of this kind saves each start that it serves."""
        faster, slower = _FASTER.get(kind, ((), ()))
        quick = [self.seconds[name, rung] for rung in faster if (name, rung) in self.seconds]
        slow = [self.seconds[name, rung] for rung in slower if (name, rung) in self.seconds]
        return max(0.0, slow[0] - quick[0]) if quick and slow else _ASSUMED_SAVING_S


def to_evict(cached: Iterable[Cached], limit_bytes: int, now_ns: int, savings_s: Mapping[Path, float]) -> list[Cached]:
    """Those to remove so that the rest fits: the least value for a byte first.

    The value of one is what it saves a start, times how likely that start is, by how long ago the last one was.
    """

    def value(one: Cached) -> tuple[float, int]:
        age_s = (now_ns - one.used_at_ns) / 1e9
        likely = 0.5 ** (age_s / _HALF_LIFE_S if age_s >= 0 else 1.0)  # a container wrote it: nobody knows
        saving_s = min(savings_s.get(one.path, _ASSUMED_SAVING_S), _SAVING_LIMIT_S)
        return saving_s * likely / max(1, one.bytes), one.used_at_ns

    everything = sorted(cached, key=value)
    excess = sum(one.bytes for one in everything) - limit_bytes
    leaving = []
    for one in everything:
        if excess <= 0:
            break
        leaving.append(one)
        excess -= one.bytes
    return leaving


def evict(root: Path, limit_bytes: int, savings: Savings) -> tuple[list[Cached], list[Cached]]:
    """Keep the store below its limit; those that stay, and those that were removed. Blocks."""
    _sweep(root)
    cached = read_cache(root)
    savings_s = {one.path: savings.of(one.name, one.kind) for one in cached}
    leaving = to_evict(cached, limit_bytes, time.time_ns(), savings_s)
    left = []
    for one in leaving:
        try:
            discard(one.path)
            left.append(one)
        except OSError as error:
            fields = {"name": one.name, "key": one.key, "why": str(error)}
            logger.warning("a snapshot cannot be removed", extra={"fields": fields})
    return [one for one in cached if one not in left], left


def disk_bytes_per_s(folder: Path) -> float:
    """How fast the disk below `folder` gives a file that no cache has; 0 where that cannot be found out. Blocks."""
    path = folder / _PROBE_FILE
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            block = os.urandom(2**20)
            for _ in range(_PROBE_BYTES // len(block)):
                os.write(fd, block)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.monotonic()
            at = 0
            while data := os.pread(fd, 2**20, at):
                at += len(data)
            return at / max(1e-9, time.monotonic() - began)
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)
    except OSError:
        return 0.0
