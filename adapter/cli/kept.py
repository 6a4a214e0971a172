"""Snapshots as they lie in a store, damaged ones and what processes map included; and which of them may go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.cli.scope import EVERYTHING, Scope, split_name
from adapter.errors import SnapshotError
from adapter.snapshot.store import Snapshot, Store, discard, read_snapshot


@dataclass(frozen=True, slots=True)
class Kept:
    """One snapshot's folder. `snapshot` is None where it is damaged, and `damage` says how."""

    path: Path
    snapshot: Snapshot | None
    damage: str
    in_use: bool
    """Some process maps its files: it was restored from it and still needs it."""
    size_bytes: int

    @property
    def function(self) -> str:
        """``name.namespace``."""
        return self.path.parent.name

    @property
    def tenant(self) -> str:
        return self.path.parent.parent.name

    @property
    def kind(self) -> str:
        return self.path.name.partition("-")[0]

    @property
    def key(self) -> str:
        return self.path.name.partition("-")[2]

    @property
    def state(self) -> str:
        """``ok``, ``in-use`` or ``damaged``."""
        return "damaged" if self.snapshot is None else "in-use" if self.in_use else "ok"

    @property
    def scope(self) -> Scope:
        """Its function alone."""
        return Scope(*split_name(self.function, ""))

    def is_in(self, scope: Scope) -> bool:
        return scope.has(*split_name(self.function, ""))

    def to_json(self) -> dict[str, Any]:
        name, namespace = split_name(self.function, "")
        row: dict[str, Any] = {"function": name, "namespace": namespace}
        row |= {name: getattr(self, name) for name in ("tenant", "kind", "key", "state")}
        snapshot = self.snapshot
        return row | {
            "size_bytes": self.size_bytes,
            "created_at_ns": snapshot.created_at_ns if snapshot else None,
            "used_at_ns": snapshot.used_at_ns if snapshot else None,
            "damage": self.damage,
            "path": str(self.path),
        }


def kept(store: Store, scope: Scope = EVERYTHING) -> list[Kept]:
    """The snapshots of a scope's functions, by function and kind, the newest first."""
    mapped = _mapped_below(store.root)
    found = [_look(path, mapped) for path in store.root.glob("*/*/*-*") if not path.name.startswith(".")]
    found = [item for item in found if item.is_in(scope)]
    return sorted(found, key=lambda item: (item.function, item.tenant, item.kind, -_created_at_ns(item)))


def may_go(
    items: Iterable[Kept],
    *,
    everything: bool = False,
    removed: Callable[[Kept], bool] | None = None,
    unused_since_ns: int | None = None,
) -> list[Kept]:
    """What a prune removes: damaged snapshots, and those that a newer one of the same function and kind replaced.

    With `everything` the newest go too, with `unused_since_ns` those not used since, with `removed` those of
    functions for which it is true. What a process maps stays, and so do the weights that a process snapshot which stays was made with.
    """
    items = list(items)
    newest: dict[tuple[str, str, str], int] = {}
    for item in items:
        slot = (item.tenant, item.function, item.kind)
        newest[slot] = max(newest.get(slot, 0), _created_at_ns(item))

    def is_due(item: Kept) -> bool:
        if item.in_use:
            return False
        if item.snapshot is None or everything or (removed is not None and removed(item)):
            return True
        if unused_since_ns is not None and item.snapshot.used_at_ns < unused_since_ns:
            return True
        return item.snapshot.created_at_ns < newest[item.tenant, item.function, item.kind]

    due = [item for item in items if is_due(item)]
    needed = {
        (item.tenant, item.function, str(item.snapshot.facts.get("weights")))
        for item in items
        if item not in due and item.snapshot is not None
    }
    return [item for item in due if (item.tenant, item.function, item.key) not in needed]


def remove(items: Sequence[Kept]) -> None:
    """Raises `SnapshotError` naming the first that cannot be removed."""
    for item in items:
        try:
            discard(item.path)
        except OSError as exc:
            raise SnapshotError(f"{item.path} cannot be removed.", why=f"{exc.strerror}.", code="not-removed") from exc


def _look(path: Path, mapped: set[Path]) -> Kept:
    damage, snapshot = "", None
    try:
        snapshot = read_snapshot(path, owner=_owner(path))
    except SnapshotError as error:
        damage = f"{error.message} {error.why}".strip()
    return Kept(path, snapshot, damage, path in mapped, snapshot.size_bytes if snapshot else _size_bytes(path))


def _owner(path: Path) -> int | None:
    """Whose it should be, where we look and do not restore: root sees those of containers' users too."""
    return path.parent.stat().st_uid if os.geteuid() == 0 else None


def _created_at_ns(item: Kept) -> int:
    return item.snapshot.created_at_ns if item.snapshot else 0


def _size_bytes(folder: Path) -> int:
    """Bytes on the disk of whatever is there; links are not followed."""
    total = 0
    with suppress(RecursionError):  # somebody's prank: what was seen until then
        for parent, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):  # it went meanwhile
                    total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


def _mapped_below(root: Path) -> set[Path]:
    """Folders of snapshots (``root/tenant/function/name``) of which some process maps a file.

    By inode and the path's end: a replica's mount namespace, or a chroot, may show another beginning.
    """
    files = {}
    for pattern in ("*/*/*-*/*", "*/*/*-*/*/*"):  # a snapshot's files are no deeper
        for path in root.glob(pattern):
            with suppress(OSError):  # it went meanwhile
                files[str(os.lstat(path).st_ino)] = path.relative_to(root)
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # ended meanwhile, or another user's
            for line in maps.read_text(errors="replace").splitlines():
                fields = line.split(maxsplit=5)
                file = files.get(fields[4])
                if file is not None and len(fields) == 6 and fields[5].endswith(f"/{file}"):
                    mapped.add(root.joinpath(*file.parts[:3]))
    return mapped
