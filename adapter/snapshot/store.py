"""The snapshot store: one folder a snapshot, published by one rename, bounded in size.

    <root>/<tenant>/<function>/<key>/           0700, owned by whoever runs the replica
        manifest.json                           identity, checksums, how to restore; written last
        images/                                 CRIU's files and memory.img      (kind "process")
        weights.safetensors, weights.json       see adapter.snapshot.weightsfile (kind "weights")
        verified.json                           the files' stat when their checksums last held
        used                                    its time is the last use, for eviction

A snapshot is the memory of a process and is trusted accordingly: foreign owners, writable by others,
links, unknown names, wrong sizes and wrong checksums are refused by name. Checksums are computed when
a copy is first used and whenever a file's size, time or inode is not what was verified.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import Conflict, NotFound, SnapshotCorrupt, SnapshotError
from adapter.files import open_below, part_of, remove_tree, sync, write_whole
from adapter.snapshot.checksum import file_checksum
from adapter.snapshot.identity import Identity, differing_fields, key_of

MANIFEST = "manifest.json"
VERIFIED = "verified.json"
USED = "used"
FORMAT = 1
_OWN_FILES = frozenset({MANIFEST, VERIFIED, USED, part_of(Path(VERIFIED)).name})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MANIFEST_LIMIT_BYTES = 2**20
DRAFT = ".draft-"
"""Names of what is being built, or taken away, begin so."""
_RECEIVED = ".receiving-"
_RECEIVED_FOR_S = 24 * 3600.0
"""How long what has come of a copy waits for the rest."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A published snapshot. `facts` is what its kind needs to be restored, `files` path -> checksum."""

    path: Path
    key: str
    kind: str
    function: str
    tenant: str
    identity: Identity
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    created_at_ns: int

    @property
    def size_bytes(self) -> int:
        """Bytes on the disk, holes left out."""
        return sum((self.path / name).stat().st_blocks * 512 for name in self.files)

    @property
    def used_at_ns(self) -> int:
        try:
            return (self.path / USED).stat().st_mtime_ns
        except FileNotFoundError:
            return self.created_at_ns


class Store:
    """Snapshots below `root`, kept under `limit_bytes` by dropping the least recently used."""

    def __init__(self, root: Path, limit_bytes: int = 20 * 2**30) -> None:
        self.root = root
        self.limit_bytes = limit_bytes

    def folder(self, tenant: str, function: str) -> Path:
        """Where snapshots of one function lie; made with mode 0700."""
        for name in (tenant, function):
            if not _NAME.fullmatch(name):
                raise SnapshotError(f"{name!r} cannot name a folder of snapshots.", code="bad-name")
        folder = self.root / tenant / function
        for path in (self.root, self.root / tenant, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def find(self, tenant: str, function: str, identity: Identity, kind: str) -> Snapshot:
        """The snapshot that fits, its checksums known to hold.

        Raises `NotFound` (its `why` names the fields in which the nearest one differs, code
        ``none`` or ``mismatch``) and `SnapshotCorrupt`.
        """
        path = self.folder(tenant, function) / f"{kind}-{key_of(identity)}"
        if not os.path.lexists(path):
            raise self._not_found(tenant, function, identity, kind)
        snapshot = read_snapshot(path)
        said = (snapshot.tenant, snapshot.function, snapshot.kind, snapshot.identity)
        if said != (tenant, function, kind, dict(identity)):
            raise SnapshotCorrupt(f"The manifest of {path.name} is of another snapshot.", code="snapshot-corrupt")
        verify(snapshot)
        os.utime(_touch(path / USED))
        return snapshot

    def _not_found(self, tenant: str, function: str, identity: Identity, kind: str) -> NotFound:
        others = [snapshot for snapshot in self.all(tenant, function) if snapshot.kind == kind]
        if not others:
            return NotFound("No snapshot yet.", code="none")
        nearest = min((differing_fields(identity, other.identity) for other in others), key=len)
        return NotFound("The snapshot does not fit.", why="Differs in: " + ", ".join(nearest) + ".", code="mismatch")

    @contextmanager
    def building(self, tenant: str, function: str, identity: Identity, kind: str) -> Iterator[Draft]:
        """A draft folder for one snapshot; nobody else builds the same meanwhile (`Conflict`).

        What is not published when the block ends is removed; so is what builders that died left behind.
        """
        folder = self.folder(tenant, function)
        key = key_of(identity)
        lock = folder / f".{kind}-{key}.lock"
        with _lock(lock):
            _sweep(folder, lock)
            draft = folder / f"{DRAFT}{kind}-{key}-{secrets.token_hex(4)}"
            draft.mkdir(mode=0o700)
            try:
                yield Draft(self, draft, folder / f"{kind}-{key}", kind, function, tenant, identity)
            finally:
                remove_tree(draft)

    @contextmanager
    def receiving(self, tenant: str, function: str, identity: Identity, kind: str) -> Iterator[Draft]:
        """As `building`, for a copy that comes in pieces: see `Draft.adopt`.

        What has come stays when the block fails, and the next call finds it; after a day without one it goes.
        """
        folder = self.folder(tenant, function)
        key = key_of(identity)
        ours = self.root / ".receiving" / f"{tenant}@{function}"  # no container sees it: see hosts/container.py
        ours.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = ours / f".{kind}-{key}.lock"
        with _lock(lock):
            _sweep(ours, lock)
            draft = ours / f"{_RECEIVED}{kind}-{key}"
            _make_private(draft)
            yield Draft(self, draft, folder / f"{kind}-{key}", kind, function, tenant, identity)

    def all(self, tenant: str | None = None, function: str | None = None) -> list[Snapshot]:
        """Every readable snapshot, newest first; damaged ones are left out (see `read_snapshot`)."""
        found = []
        for path in self.root.glob(f"{tenant or '*'}/{function or '*'}/*-*"):
            if path.name.startswith("."):
                continue
            try:
                found.append(read_snapshot(path))
            except SnapshotError:
                continue
        return sorted(found, key=lambda snapshot: -snapshot.created_at_ns)

    def remove(self, snapshot: Snapshot) -> None:
        """At once and whole: out of sight by a rename, then deleted. Processes that map it keep their pages."""
        discard(snapshot.path)

    def evict(self, *, keep: Path | None = None) -> list[Snapshot]:
        """Drop the least recently used until the store is below its limit; `keep` stays. Returns the dropped."""
        snapshots = sorted(self.all(), key=lambda snapshot: snapshot.used_at_ns)
        total = sum(snapshot.size_bytes for snapshot in snapshots)
        dropped = []
        for snapshot in snapshots:
            if total <= self.limit_bytes:
                break
            if snapshot.path == keep:
                continue
            total -= snapshot.size_bytes
            self.remove(snapshot)
            dropped.append(snapshot)
        return dropped


@dataclass(frozen=True, slots=True)
class Draft:
    """A snapshot being made in `path`; `publish` makes it visible."""

    store: Store
    path: Path
    target: Path
    kind: str
    function: str
    tenant: str
    identity: Identity

    def publish(self, facts: Mapping[str, Any]) -> Snapshot:
        """Checksum, write the manifest, sync, rename. Raises `OSError` (a full disk) with nothing published."""
        files = {}
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and not path.is_symlink():
                name = path.relative_to(self.path).as_posix()
                files[name] = {"size": path.stat().st_size, "checksum": file_checksum(path)}
                sync(path)
        return self._publish(facts, files, time.time_ns())

    def adopt(
        self,
        facts: Mapping[str, Any],
        files: Mapping[str, Any],
        created_at_ns: int,
        owner: tuple[int, int] | None = None,
    ) -> Snapshot:
        """Publish files that another store published with the entries `files`, and that are known to be the same.

        Nothing is read again: the caller has compared every byte as it came. The folder has to hold exactly these
        files, else `SnapshotCorrupt`. Raises `OSError`. Nothing is published then. `owner` is the user and group that
        replicas run as, where they are others than ours.
        """
        for name in files:
            os.chmod(self.path / name, 0o400, follow_symlinks=False)
            sync(self.path / name)
        return self._publish(facts, files, created_at_ns, check=True, owner=owner)

    def discard(self) -> None:
        """Remove what is there of it."""
        remove_tree(self.path)

    def _publish(
        self,
        facts: Mapping[str, Any],
        files: Mapping[str, Any],
        created_at_ns: int,
        *,
        check: bool = False,
        owner: tuple[int, int] | None = None,
    ) -> Snapshot:
        manifest = {
            "format": FORMAT,
            "kind": self.kind,
            "function": self.function,
            "tenant": self.tenant,
            "identity": self.identity,
            "facts": dict(facts),
            "files": dict(files),
            "created_at_ns": created_at_ns,
        }
        write_whole(self.path / MANIFEST, json.dumps(manifest, indent=1).encode())
        write_whole(self.path / VERIFIED, json.dumps(_stats(self.path, files)).encode())
        write_whole(self.path / USED, b"")
        if check:
            read_snapshot(self.path)
        if owner is not None:
            _give_away(self.path, owner)
        if os.path.lexists(self.target):
            discard(self.target)  # replaced, readable or damaged
        os.rename(self.path, self.target)
        sync(self.target.parent)
        self.store.evict(keep=self.target)
        return read_snapshot(self.target, owner=owner[0] if owner else None)


def discard(path: Path) -> None:
    """Remove a snapshot's folder whatever state it is in: out of sight by a rename first."""
    gone = path.with_name(f"{DRAFT}{path.name}-{secrets.token_hex(4)}")
    try:
        os.rename(path, gone)
    except FileNotFoundError:
        return
    if gone.is_dir() and not gone.is_symlink():
        remove_tree(gone)
    else:  # a link goes, never what it leads to
        gone.unlink()


def _give_away(folder: Path, owner: tuple[int, int]) -> None:
    """Make a folder of ours and all in it another user's; the folder itself last."""
    for path in (*folder.rglob("*"), folder):
        os.chown(path, *owner, follow_symlinks=False)


def read_snapshot(path: Path, *, owner: int | None = None) -> Snapshot:
    """The manifest in `path`, its folder and files checked for owner, mode, kind and size, not for content.

    They have to be ours, or where the caller only looks, its `owner`'s. Raises `SnapshotCorrupt` naming what is wrong.
    """
    trusted = os.geteuid() if owner is None else owner
    _check_trusted(path, trusted, directory=True)
    text = _read_manifest(path, trusted)
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise SnapshotCorrupt(f"{path.name} has format {data['format']}, this gpufn reads {FORMAT}.")
        files = {
            str(name): {"size": int(entry["size"]), "checksum": str(entry["checksum"])}
            for name, entry in data["files"].items()
        }
        snapshot = Snapshot(
            path=path,
            key=key_of(data["identity"]),
            kind=str(data["kind"]),
            function=str(data["function"]),
            tenant=str(data["tenant"]),
            identity={str(name): str(value) for name, value in data["identity"].items()},
            facts=dict(data["facts"]),
            files=files,
            created_at_ns=_instant(data["created_at_ns"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as exc:
        raise SnapshotCorrupt(f"The manifest of {path.name} cannot be read.", why=f"{exc!r}.") from exc
    _check_files(snapshot, trusted)
    return snapshot


def _read_manifest(folder: Path, trusted: int) -> bytes:
    """Neither followed nor waited for, whatever somebody puts in its place meanwhile. Raises `SnapshotCorrupt`."""
    _check_trusted(folder / MANIFEST, trusted)
    try:
        with open(open_below(folder, MANIFEST), "rb") as file:
            _check_facts(MANIFEST, os.fstat(file.fileno()), trusted)
            text = file.read(_MANIFEST_LIMIT_BYTES + 1)
    except OSError as exc:
        raise SnapshotCorrupt(f"{MANIFEST} of {folder.name} cannot be read.", why=f"{exc.strerror or exc}.") from exc
    if len(text) > _MANIFEST_LIMIT_BYTES:
        raise SnapshotCorrupt(f"{MANIFEST} of {folder.name} is too large for a manifest.")
    return text


def _instant(value: object) -> int:
    """Nanoseconds since the epoch, as far as clocks count. Raises `ValueError`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError("no instant")
    return value


def _check_files(snapshot: Snapshot, trusted: int) -> None:
    for name, entry in snapshot.files.items():
        parts = name.split("/")
        if len(parts) > 2 or not all(_NAME.fullmatch(part) for part in parts):
            raise SnapshotCorrupt(f"{snapshot.path.name} lists a file named {name!r}.", why="Names stay in the folder.")
        if len(parts) == 2:
            _check_trusted(snapshot.path / parts[0], trusted, directory=True)
        if _check_trusted(snapshot.path / name, trusted).st_size != entry["size"]:
            raise SnapshotCorrupt(f"{name} of {snapshot.path.name} has another size than was published.")
    for own in _OWN_FILES:
        if os.path.lexists(snapshot.path / own):
            _check_trusted(snapshot.path / own, trusted)
    folders = {name.partition("/")[0] for name in snapshot.files if "/" in name}
    listed = snapshot.files.keys() | folders | _OWN_FILES
    for name in _names(snapshot.path, folders):
        if name not in listed:
            raise SnapshotCorrupt(f"{snapshot.path.name} holds {name}, which its manifest does not list.")


def _names(path: Path, folders: Iterable[str]) -> Iterator[str]:
    """Of all that is in a folder and in these folders of it, one after the other: there may be many."""
    try:
        for inside in ("", *sorted(folders)):
            with os.scandir(path / inside) as entries:
                for entry in entries:
                    yield f"{inside}/{entry.name}".lstrip("/")
    except OSError as exc:
        raise SnapshotCorrupt(f"{path.name} cannot be listed.", why=f"{exc.strerror}.") from exc


def _check_trusted(path: Path, trusted: int, *, directory: bool = False) -> os.stat_result:
    """A file or folder that nobody else can have written. Raises `SnapshotCorrupt`."""
    try:
        facts = os.lstat(path)
    except OSError as exc:
        raise SnapshotCorrupt(f"{path.name} is missing.", why=f"{exc.strerror}.") from exc
    _check_facts(path.name, facts, trusted, directory=directory)
    return facts


def _check_facts(name: str, facts: os.stat_result, trusted: int, *, directory: bool = False) -> None:
    """Raises `SnapshotCorrupt` where these are of something that somebody else can have written."""
    if not (stat.S_ISDIR if directory else stat.S_ISREG)(facts.st_mode):
        raise SnapshotCorrupt(f"{name} is not a {'folder' if directory else 'file'}.", why="Links are refused.")
    if facts.st_uid != trusted:
        raise SnapshotCorrupt(f"{name} belongs to user {facts.st_uid}.", why="A snapshot is trusted memory.")
    if facts.st_mode & 0o022:
        raise SnapshotCorrupt(f"{name} can be written by others.", why="A snapshot is trusted memory.")


def verify(snapshot: Snapshot, *, always: bool = False) -> None:
    """Make sure the files are what was published; quick where nothing changed since that was last found true."""
    stats = _stats(snapshot.path, snapshot.files)
    try:
        if not always and json.loads((snapshot.path / VERIFIED).read_bytes()) == stats:
            return
    except (OSError, ValueError, RecursionError):
        pass  # never verified here, or a torn write: verify now
    compare(snapshot)
    write_whole(snapshot.path / VERIFIED, json.dumps(stats).encode())


def compare(snapshot: Snapshot) -> None:
    """Read all files and compare their checksums; writes nothing. Raises `SnapshotCorrupt`."""
    for name, entry in snapshot.files.items():
        if file_checksum(snapshot.path / name) != entry["checksum"]:
            if snapshot.kind == "weights":
                from adapter.snapshot import weightsfile

                weightsfile.verify(snapshot.path)  # knows which tensor it is
            raise SnapshotCorrupt(f"{name} of {snapshot.path.name} is damaged.", why="Its checksum differs.")


def _stats(folder: Path, files: Mapping[str, Any]) -> dict[str, list[int]]:
    found = {}
    for name in files:
        facts = os.stat(folder / name, follow_symlinks=False)
        found[name] = [facts.st_size, facts.st_mtime_ns, facts.st_ino, facts.st_dev]
    return found


def _make_private(folder: Path) -> None:
    """A folder of ours. Raises `SnapshotCorrupt` where something else has its name."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _check_trusted(folder, os.geteuid(), directory=True)
    os.utime(folder)  # it is in use again


def _sweep(folder: Path, held: Path) -> None:
    """Remove drafts whose builder died: its lock is free, or it is the one `held` here; and old halves of copies."""
    for draft in folder.glob(f"{_RECEIVED}*"):
        kind, _, rest = draft.name.removeprefix(_RECEIVED).partition("-")
        key = rest.partition("-")[0]
        lock = folder / f".{kind}-{key}.lock"
        try:
            if time.time() - draft.lstat().st_mtime > _RECEIVED_FOR_S:
                with nullcontext() if lock == held else _lock(lock):
                    remove_tree(draft)
        except (Conflict, FileNotFoundError):
            continue
    for draft in folder.glob(f"{DRAFT}*"):
        kind, _, rest = draft.name.removeprefix(DRAFT).partition("-")
        key = rest.partition("-")[0]
        lock = folder / f".{kind}-{key}.lock"
        try:
            with nullcontext() if lock == held else _lock(lock):
                remove_tree(draft)
        except Conflict:
            continue


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """An exclusive lock that dies with its holder; `Conflict` at once where it is taken."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Conflict("Another replica is taking this snapshot.", code="snapshot-busy") from exc
        yield
    finally:
        os.close(fd)


def _touch(path: Path) -> Path:
    path.touch(mode=0o600)
    return path
