"""Snapshots of an image from a registry into a store: found, chosen, fetched, checked, published.

Every chunk is compared with its layer's digest and its frame's checksum before a byte of it is written, and written to
its place at once: no file is read again. What has come survives a kill, and only the rest is fetched the next time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import zstandard

from adapter.errors import NotFound, SnapshotCorrupt, SnapshotError, SnapshotMismatch, StorageError
from adapter.registry.artifact import (
    ARTIFACT_TYPE,
    KINDS,
    Chunk,
    Described,
    Listed,
    listed,
    parse,
    read_manifest,
)
from adapter.registry.client import Client, Descriptor
from adapter.registry.push import Progress
from adapter.snapshot.identity import MACHINE_FIELDS
from adapter.snapshot.store import Draft, Snapshot, Store, read_snapshot

_THREADS = (os.cpu_count() or 1) + 2
"""More than processors: some wait for the registry."""
_PIECE_BYTES = 2**20
"""One write: on ext4 a single one of a whole chunk takes four times as long."""
_SNAPSHOTS_LIMIT = 8
"""Of one image and machine: they differ in the variables that `load` sees."""
_MARK = "receiving"
"""Says which artifact a draft is of."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Pulled:
    """A snapshot that is in the store. `received_bytes` is what came over the network for it."""

    snapshot: Snapshot
    digest: str
    size_bytes: int
    received_bytes: int


def snapshots_of(client: Client, subject: str) -> list[Listed]:
    """The snapshots of the image whose manifest has the digest `subject`, newest first."""
    found = [listed(entry) for entry in client.referrers(subject, ARTIFACT_TYPE)]
    return sorted(found, key=lambda entry: entry.created, reverse=True)


def choose(found: Sequence[Listed], machine: Mapping[str, str], image: str) -> list[Listed]:
    """Those that fit `machine` (see `machine_identity`), the newest of each key, weights before processes.

    Raises `NotFound` where there are none, and `SnapshotMismatch` naming what each differs in.
    """
    if not found:
        raise NotFound(
            f"{image} has no snapshot in the registry.",
            hint=f"Push one from where it was taken: gpufn snapshot push {image}",
            code="no-snapshot",
        )
    fitting = [entry for entry in found if entry.kind in KINDS and not entry.differs_in(machine)]
    if not fitting:
        reasons = sorted({", ".join(entry.differs_in(machine)) or "kind" for entry in found})
        raise SnapshotMismatch(
            f"None of the {len(found)} snapshot{'s' if len(found) > 1 else ''} of {image} fits this machine.",
            why=f"Differs in: {'; or in: '.join(reasons)}.",
            hint="Take one on a machine like this: gpufn snapshot create, then gpufn snapshot push",
        )
    newest: dict[tuple[str, str], Listed] = {}
    for entry in fitting:
        newest.setdefault((entry.kind, entry.key), entry)
    chosen = list(newest.values())[:_SNAPSHOTS_LIMIT]
    return sorted(chosen, key=lambda entry: KINDS.index(entry.kind))


def pull(
    client: Client,
    subject: str,
    chosen: Descriptor,
    store: Store,
    machine: Mapping[str, str],
    *,
    tenant: str = "default",
    function: str = "",
    owner: tuple[int, int] | None = None,
    on_progress: Progress = lambda *_: None,
) -> Pulled:
    """Bring one artifact of the image manifest `subject` into `store`, as a snapshot of `function` (``name.namespace``;
    where it is empty, of the one that it was taken of). It belongs to `owner`, user and group, where replicas run as
    another user than we do; so do the folders that are made for it.

    Raises what `Client` raises; `SnapshotCorrupt` for anything that is not what it should be, `SnapshotMismatch`
    where it does not fit `machine`, `Conflict` while another pull brings the same, `StorageError` where it cannot be
    written. Nothing is published then.
    """
    artifact = read_manifest(client.get_manifest(chosen.digest).data, subject)
    raw = bytes(client.get_blob(artifact.config.digest, artifact.config.size))
    described = parse(raw, artifact.layers, store.limit_bytes)
    differs = [name for name in MACHINE_FIELDS if described.identity.get(name, machine[name]) != machine[name]]
    if differs:
        raise SnapshotMismatch("The snapshot does not fit this machine.", why=f"Differs in: {', '.join(differs)}.")
    function = function or described.function
    try:
        present = _present(_folder(store, tenant, function, owner), described, owner)
        if present is not None:
            return Pulled(present, chosen.digest, described.size, 0)
        with store.receiving(tenant, function, described.identity, described.kind) as draft:
            receiver = _Receiver(client, draft, described, artifact.layers, owner, on_progress)
            try:
                snapshot = receiver.receive(artifact.config.digest)
            except (SnapshotCorrupt, StorageError, OSError):
                draft.discard()  # what is damaged is not worth keeping, and a full disk needs its room
                raise
            return Pulled(snapshot, chosen.digest, described.size, receiver.received_bytes)
    except OSError as exc:
        raise _unwritable(store.root, exc) from exc


def _folder(store: Store, tenant: str, function: str, owner: tuple[int, int] | None) -> Path:
    """The function's folder of snapshots; the owner's, with those above it that are made now."""
    folder = store.root / tenant / function
    missing = [path for path in (store.root, folder.parent, folder) if not path.exists()]
    folder = store.folder(tenant, function)
    if owner is not None:
        for path in {*missing, folder}:
            os.chown(path, *owner)
    return folder


def _present(folder: Path, described: Described, owner: tuple[int, int] | None) -> Snapshot | None:
    """The same snapshot, where the store has it already."""
    path = folder / f"{described.kind}-{described.key}"
    if not os.path.lexists(path):
        return None
    try:
        snapshot = read_snapshot(path, owner=owner[0] if owner else None)
    except SnapshotError:
        return None
    return snapshot if (snapshot.files, snapshot.facts) == (described.files, described.facts) else None


class _Receiver:
    """Fetches the chunks of one snapshot into a draft, several at a time."""

    def __init__(
        self,
        client: Client,
        draft: Draft,
        described: Described,
        layers: Sequence[Descriptor],
        owner: tuple[int, int] | None,
        on_progress: Progress,
    ) -> None:
        self.received_bytes = 0
        self._client = client
        self._draft = draft
        self._described = described
        self._layers = layers
        self._owner = owner
        self._on_progress = on_progress
        self._done = 0
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        self._stopped = False

    def receive(self, mark: str) -> Snapshot:
        """All chunks, then the snapshot is published. `mark` names the artifact: a draft of another begins anew."""
        is_resumed = self._prepare(mark)
        with ExitStack() as stack:
            self._open_files(stack)
            self._check_room()
            work = list(zip(self._described.chunks, self._layers, strict=True))
            self._on_progress(0, self._described.size)
            with ThreadPoolExecutor(_THREADS, "pull") as pool:
                try:
                    for _ in pool.map(lambda item: self._receive(item[0], item[1], is_resumed), work):
                        pass
                except BaseException:
                    self._stopped = True
                    pool.shutdown(cancel_futures=True)
                    raise
        (self._draft.path / _MARK).unlink()
        described = self._described
        return self._draft.adopt(described.facts, described.files, described.created_at_ns, self._owner)

    def _prepare(self, mark: str) -> bool:
        """Whether the draft holds parts of this very artifact; else it is empty now."""
        folder, path = self._draft.path, self._draft.path / _MARK
        try:
            if path.read_text(encoding="ascii") == mark:
                return True
        except (OSError, ValueError):
            pass
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        path.write_text(mark, encoding="ascii")
        return False

    def _open_files(self, stack: ExitStack) -> None:
        for name, entry in self._described.files.items():
            path = self._draft.path / name
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            os.ftruncate(fd, entry["size"])
            self._files[name] = fd

    def _check_room(self) -> None:
        """A full disk is found before anything is fetched. Raises `OSError`."""
        disk = os.statvfs(self._draft.path)
        there = sum(os.fstat(fd).st_blocks * 512 for fd in self._files.values())
        if disk.f_bavail * disk.f_frsize < self._described.size - there:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _receive(self, chunk: Chunk, layer: Descriptor, is_resumed: bool) -> None:
        if self._stopped:
            return
        received = 0
        if not (is_resumed and self._is_there(chunk)):
            packed = self._client.get_blob(layer.digest, layer.size)
            received = len(packed)
            self._write(chunk, unpack(packed, chunk))
        with self._lock:
            self.received_bytes += received
            self._done += chunk.size
            self._on_progress(self._done, self._described.size)

    def _is_there(self, chunk: Chunk) -> bool:
        plain = hashlib.sha256()
        for extent in chunk.extents:
            plain.update(os.pread(self._files[extent.file], extent.size, extent.offset))
        return plain.hexdigest() == chunk.sha256

    def _write(self, chunk: Chunk, plain: bytes) -> None:
        at = 0
        with memoryview(plain) as whole:
            for extent in chunk.extents:
                end, offset = at + extent.size, extent.offset
                while at < end:
                    count = os.pwrite(self._files[extent.file], whole[at : min(end, at + _PIECE_BYTES)], offset)
                    at, offset = at + count, offset + count
        for name in {extent.file for extent in chunk.extents}:
            os.fdatasync(self._files[name])  # while others fetch: little is left to write at the end


def unpack(packed: bytes | bytearray, chunk: Chunk) -> bytes:
    """The plain bytes of a chunk. Raises `SnapshotCorrupt` for what is not exactly them.

    `packed` has been compared with its digest; what the decoder makes of it is compared with the frame's own
    checksum, and a frame without one is refused. Nothing larger than was declared is ever made room for: a frame that
    says so, or does not say it, is refused.
    """
    try:
        if zstandard.frame_content_size(packed) != chunk.size:
            raise _damaged("It does not hold as many bytes as were declared.")
        if not zstandard.get_frame_parameters(packed).has_checksum:
            raise _damaged("Its frame has no checksum.")
        plain = zstandard.ZstdDecompressor(max_window_size=2**27).decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise _damaged("It is no frame of zstd, or its checksum differs.") from exc
    return plain


def _damaged(why: str) -> SnapshotCorrupt:
    return SnapshotCorrupt(
        "A chunk of the snapshot is damaged.", why=why, hint="Push the snapshot again.", code="bad-artifact"
    )


def _unwritable(root: Path, exc: OSError) -> StorageError:
    hint = "Make room, or name another folder with --into." if exc.errno in _FULL else "Check the folder and its owner."
    return StorageError(
        f"The snapshot cannot be written to {root}.",
        why=f"{exc.strerror or exc}.",
        hint=hint,
        code="disk-full" if exc.errno in _FULL else "not-written",
    )
