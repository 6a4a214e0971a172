"""A snapshot from its folder into a registry, as an artifact beside the image it is of."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import zstandard

from adapter.errors import SnapshotError
from adapter.files import open_below
from adapter.registry.artifact import (
    ARTIFACT_TYPE,
    CHUNK_TYPE,
    CONFIG_TYPE,
    Chunk,
    config_of,
    listed,
    manifest_of,
    plan,
)
from adapter.registry.client import Client, Descriptor
from adapter.snapshot.store import Snapshot, compare

DEFAULT_LEVEL = 3
_THREADS = (os.cpu_count() or 1) + 2
"""More than processors: some wait for the registry."""

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all), from any thread."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """An artifact that is in the registry. `sent_bytes` is what was not there before."""

    digest: str
    subject: str
    key: str
    kind: str
    size_bytes: int
    compressed_bytes: int
    sent_bytes: int


def push(
    client: Client,
    subject: Descriptor,
    snapshot: Snapshot,
    *,
    level: int = DEFAULT_LEVEL,
    on_progress: Progress = lambda *_: None,
) -> Pushed:
    """Store `snapshot` as an artifact whose subject is the image manifest `subject`; what is there already stays.

    Raises what `Client` raises, `SnapshotCorrupt` where the files are not what was published, and `SnapshotError`
    where they cannot be read. What an interrupted push has stored is found by the next.
    """
    try:
        compare(snapshot)  # what leaves this machine is right
        sender = _Sender(client, snapshot, level, on_progress)
        chunks, layers = sender.send()
    except OSError as exc:
        raise SnapshotError(
            f"The snapshot {snapshot.key} cannot be read.", why=f"{exc.strerror}.", code="snapshot-unreadable"
        ) from exc
    raw = config_of(snapshot, chunks)
    config = Descriptor(CONFIG_TYPE, _digest(raw), len(raw))
    if not client.has_blob(config.digest):
        client.push_blob(config.digest, raw)
    size = sum(chunk.size for chunk in chunks)
    manifest = manifest_of(snapshot, subject, config, layers, size)
    stored, is_tracked = client.put_manifest("", manifest)
    if not is_tracked:
        entry = replace(stored, artifact_type=ARTIFACT_TYPE, annotations=manifest["annotations"])
        client.add_referrer(subject.digest, entry, lambda other: _is_older(other, entry))
    compressed = sum(layer.size for layer in layers)
    return Pushed(stored.digest, subject.digest, snapshot.key, snapshot.kind, size, compressed, sender.sent_bytes)


def _is_older(other: Descriptor, entry: Descriptor) -> bool:
    """Of two snapshots that fit the same, the later one is wanted."""
    mine, theirs = listed(entry), listed(other)
    return other.artifact_type == ARTIFACT_TYPE and (mine.kind, mine.key) == (theirs.kind, theirs.key)


class _Sender:
    """Reads, compresses and stores chunks, several at a time."""

    def __init__(self, client: Client, snapshot: Snapshot, level: int, on_progress: Progress) -> None:
        self.sent_bytes = 0
        self._client = client
        self._snapshot = snapshot
        self._level = level
        self._on_progress = on_progress
        self._done = 0
        self._lock = threading.Lock()

    def send(self) -> tuple[list[Chunk], list[Descriptor]]:
        planned = plan(self._snapshot.path, sorted(self._snapshot.files))
        total = sum(chunk.size for chunk in planned)
        self._on_progress(0, total)
        with ThreadPoolExecutor(_THREADS, "push") as pool:
            try:
                sent = list(pool.map(lambda chunk: self._send(chunk, total), planned))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [chunk for chunk, _ in sent], [layer for _, layer in sent]

    def _send(self, chunk: Chunk, total: int) -> tuple[Chunk, Descriptor]:
        plain = self._read(chunk)
        compressor = zstandard.ZstdCompressor(level=self._level, write_content_size=True, write_checksum=True)
        packed = compressor.compress(plain)
        layer = Descriptor(CHUNK_TYPE, _digest(packed), len(packed))
        is_new = not self._client.has_blob(layer.digest)
        if is_new:
            self._client.push_blob(layer.digest, packed)
        with self._lock:
            self.sent_bytes += len(packed) if is_new else 0
            self._done += chunk.size
            self._on_progress(self._done, total)
        return replace(chunk, sha256=hashlib.sha256(plain).hexdigest()), layer

    def _read(self, chunk: Chunk) -> bytearray:
        plain = bytearray(chunk.size)
        at = 0
        for extent in chunk.extents:
            fd = open_below(self._snapshot.path, extent.file)
            try:
                with memoryview(plain) as whole:
                    if os.preadv(fd, [whole[at : at + extent.size]], extent.offset) != extent.size:
                        raise SnapshotError(f"{extent.file} became shorter while it was read.", code="changed")
            finally:
                os.close(fd)
            at += extent.size
        return plain


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
