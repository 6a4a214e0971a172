"""How a snapshot looks as an artifact in a registry: its files in chunks, described by one configuration.

    manifest    artifactType `ARTIFACT_TYPE`, `subject` = the image's manifest, annotations for listings
    config      the snapshot's manifest.json with one more entry:
                "chunks": [{"sha256": of the plain bytes, "extents": [[file, offset, size], …]}, …]
    layers      one for each chunk, in that order: the bytes of its extents, one after the other, as one zstd frame

`file` counts the names of "files" in their order. Holes have no extents, so a sparse file of terabytes is as large
as what it holds. Small files share a chunk. The same files give the same artifact.

An artifact is hostile until it is proven: `parse` takes nothing whose names, sizes, numbers or order are not what
`plan` could have made. Pure but for `plan`, which asks files where their holes are.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import SnapshotCorrupt
from adapter.files import open_below
from adapter.registry.client import MANIFEST_TYPE, Descriptor
from adapter.snapshot.identity import MACHINE_FIELDS, Identity, key_of
from adapter.snapshot.store import FORMAT, Snapshot

ARTIFACT_TYPE = "application/vnd.gpufn.snapshot.v1"
CONFIG_TYPE = "application/vnd.gpufn.snapshot.manifest.v1+json"
CHUNK_TYPE = "application/vnd.gpufn.snapshot.chunk.v1+zstd"
KINDS = ("weights", "process", "compile")
"""In the order in which they are wanted: a process may map weights."""

CHUNK_BYTES = 16 * 2**20
CONFIG_LIMIT_BYTES = 8 * 2**20

_ANNOTATION = "dev.gpufn.snapshot."
_CREATED_ANNOTATION = "org.opencontainers.image.created"
_FILES_LIMIT = 4096
_CHUNKS_LIMIT = 8192
_EXTENTS_LIMIT = 200_000
_FILE_SIZE_LIMIT_BYTES = 2**43
"""Of a file with its holes: each large area of a process has a gigabyte of hole behind it."""
_TEXT_LIMIT = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_OWN_NAMES = frozenset({"manifest.json", "verified.json", "used"})
_CHECKSUM = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of one file: where they begin and how many."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one layer holds. `sha256` is of the plain bytes in hexadecimal; empty where they were not read yet."""

    extents: tuple[Extent, ...]
    sha256: str = ""

    @property
    def size(self) -> int:
        return sum(extent.size for extent in self.extents)


@dataclass(frozen=True, slots=True)
class Described:
    """A snapshot as a configuration describes it."""

    kind: str
    function: str
    tenant: str
    identity: Identity
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    created_at_ns: int
    chunks: tuple[Chunk, ...]

    @property
    def key(self) -> str:
        return key_of(self.identity)

    @property
    def size(self) -> int:
        """Bytes of data, holes left out."""
        return sum(chunk.size for chunk in self.chunks)


def plan(folder: Path, names: Sequence[str]) -> list[Chunk]:
    """The chunks of these files, in order, their bytes not read yet. Raises `OSError`."""
    chunks: list[Chunk] = []
    extents: list[Extent] = []
    room = CHUNK_BYTES
    for name in names:
        for start, end in data_ranges(folder, name):
            at = start
            while at < end:
                size = min(room, end - at)
                extents.append(Extent(name, at, size))
                at, room = at + size, room - size
                if room == 0:
                    chunks.append(Chunk(tuple(extents)))
                    extents, room = [], CHUNK_BYTES
    if extents:
        chunks.append(Chunk(tuple(extents)))
    return chunks


def data_ranges(folder: Path, name: str) -> list[tuple[int, int]]:
    """(start, end) of what the file `name` in `folder` holds between its holes, ascending. Raises `OSError`."""
    fd = open_below(folder, name)
    ranges: list[tuple[int, int]] = []
    try:
        size, offset = os.fstat(fd).st_size, 0
        while offset < size:
            try:
                offset = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole from here on
                break
            end = os.lseek(fd, offset, os.SEEK_HOLE)
            ranges.append((offset, end))
            offset = end
    finally:
        os.close(fd)
    return ranges


def config_of(snapshot: Snapshot, chunks: Sequence[Chunk]) -> bytes:
    """The configuration: what `parse` reads."""
    names = sorted(snapshot.files)
    number = {name: index for index, name in enumerate(names)}
    return json.dumps(
        {
            "format": FORMAT,
            "kind": snapshot.kind,
            "function": snapshot.function,
            "tenant": snapshot.tenant,
            "identity": snapshot.identity,
            "facts": snapshot.facts,
            "files": {name: snapshot.files[name] for name in names},
            "created_at_ns": snapshot.created_at_ns,
            "chunks": [
                {"sha256": chunk.sha256, "extents": [[number[e.file], e.offset, e.size] for e in chunk.extents]}
                for chunk in chunks
            ],
        },
        separators=(",", ":"),
    ).encode()


def manifest_of(
    snapshot: Snapshot, subject: Descriptor, config: Descriptor, layers: Sequence[Descriptor], size: int
) -> dict[str, Any]:
    """The artifact's manifest; `size` is that of the plain data."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(snapshot.created_at_ns // 10**9))
    said = {
        "kind": snapshot.kind,
        "key": snapshot.key,
        "function": snapshot.function,
        "size": str(size),
        "compressed-size": str(sum(layer.size for layer in layers)),
        **{name: snapshot.identity[name] for name in MACHINE_FIELDS if name in snapshot.identity},
    }
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "subject": Descriptor(subject.media_type, subject.digest, subject.size).to_json(),
        "annotations": {
            _CREATED_ANNOTATION: created,
            **{_ANNOTATION + name: value for name, value in said.items()},
        },
    }


@dataclass(frozen=True, slots=True)
class Listed:
    """A snapshot as a listing shows it: what its annotations claim, which proves nothing."""

    descriptor: Descriptor
    kind: str
    key: str
    function: str
    size: int
    compressed_size: int
    created: str
    identity: Identity
    """Fields of `MACHINE_FIELDS` only; none of a snapshot that is not bound to a machine."""

    def differs_in(self, machine: Mapping[str, str]) -> list[str]:
        """Fields in which it does not fit a machine."""
        return sorted(name for name, value in self.identity.items() if machine.get(name) != value)


def listed(descriptor: Descriptor) -> Listed:
    """What the annotations of a referrer say; what they do not say is empty."""
    names = ("kind", "key", "function", "size", "compressed-size", *MACHINE_FIELDS)
    said = {name: _shown(descriptor.annotations.get(_ANNOTATION + name, "")) for name in names}
    return Listed(
        descriptor,
        said["kind"],
        said["key"],
        said["function"],
        _number(said["size"]),
        _number(said["compressed-size"]),
        _shown(descriptor.annotations.get(_CREATED_ANNOTATION, "")),
        {name: said[name] for name in MACHINE_FIELDS if said[name]},
    )


def _shown(text: str) -> str:
    """Somebody else's words, as a terminal may get them."""
    return "".join(character if character.isprintable() else "?" for character in text[:_TEXT_LIMIT])


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


@dataclass(frozen=True, slots=True)
class Artifact:
    """A manifest whose form is right: where its configuration and its chunks are."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


def read_manifest(data: Mapping[str, Any], subject: str) -> Artifact:
    """The parts of an artifact's manifest. Raises `SnapshotCorrupt` for one that is not a snapshot of `subject`."""
    if data.get("artifactType") != ARTIFACT_TYPE:
        raise _refused("Its artifact type is another.")
    about = data.get("subject")
    if not isinstance(about, dict) or about.get("digest") != subject:
        raise _refused("It is a snapshot of another image.")
    config = Descriptor.from_json(data.get("config"))
    if config.media_type != CONFIG_TYPE or not 0 < config.size <= CONFIG_LIMIT_BYTES:
        raise _refused("Its configuration is of another type, or too large.")
    entries = data.get("layers")
    if not isinstance(entries, list) or len(entries) > _CHUNKS_LIMIT:
        raise _refused(f"It has no layers, or more than {_CHUNKS_LIMIT}.")
    layers = tuple(Descriptor.from_json(entry) for entry in entries)
    if any(layer.media_type != CHUNK_TYPE or not 0 < layer.size <= compressed_limit(CHUNK_BYTES) for layer in layers):
        raise _refused("A layer is of another type, or too large.")
    return Artifact(config, layers)


def compressed_limit(size: int) -> int:
    """The most that zstd makes of `size` bytes, and some."""
    return size + size // 128 + 2**16


def parse(raw: bytes, layers: Sequence[Descriptor], limit_bytes: int) -> Described:
    """The snapshot that a configuration describes. `limit_bytes` is the most data that it may hold.

    Raises `SnapshotCorrupt` (``bad-artifact``) with what is wrong.
    """
    try:
        data = json.loads(raw)
        if data["format"] != FORMAT:
            raise _refused(f"It has format {str(data['format'])[:20]}, this gpufn reads {FORMAT}.")
        files = _files(data["files"])
        described = Described(
            kind=_one_of(data["kind"], KINDS),
            function=_name(data["function"]),
            tenant=_name(data["tenant"]),
            identity=_identity(data["identity"]),
            facts=dict(data["facts"]),
            files=files,
            created_at_ns=_whole(data["created_at_ns"], time.time_ns() + 86400 * 10**9),
            chunks=_chunks(data["chunks"], files),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as exc:
        raise _refused(f"Its configuration cannot be read: {type(exc).__name__}.") from exc
    if len(described.chunks) != len(layers):
        raise _refused("It has another number of chunks than of layers.")
    for chunk, layer in zip(described.chunks, layers, strict=True):
        if layer.size > compressed_limit(chunk.size):
            raise _refused("A layer is larger than what it should hold.")
    if described.size > limit_bytes:
        raise _refused(f"It holds {described.size} bytes, and the folder of snapshots may hold {limit_bytes}.")
    return described


def _files(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if not 0 < len(entries) <= _FILES_LIMIT:
        raise _refused(f"It lists no files, or more than {_FILES_LIMIT}.")
    folders = {name.partition("/")[0] for name in entries if "/" in name}
    files = {}
    for name in sorted(entries):
        parts = name.split("/")
        if len(parts) > 2 or not all(_NAME.fullmatch(part) for part in parts) or name in _OWN_NAMES | folders:
            raise _refused(f"It lists a file named {name[:80]!r}.")
        checksum = entries[name]["checksum"]
        if not _CHECKSUM.fullmatch(checksum):
            raise _refused(f"The checksum of {name} is none.")
        files[name] = {"size": _whole(entries[name]["size"], _FILE_SIZE_LIMIT_BYTES), "checksum": checksum}
    return files


def _chunks(entries: Sequence[Any], files: Mapping[str, Mapping[str, Any]]) -> tuple[Chunk, ...]:
    if not isinstance(entries, list) or len(entries) > _CHUNKS_LIMIT:
        raise _refused(f"It has more than {_CHUNKS_LIMIT} chunks.")
    names = list(files)
    chunks, count, before = [], 0, (0, 0)
    for entry in entries:
        if not _CHECKSUM.fullmatch(entry["sha256"]):
            raise _refused("The digest of a chunk is none.")
        count += len(entry["extents"])
        if count > _EXTENTS_LIMIT:
            raise _refused(f"It has more than {_EXTENTS_LIMIT} extents.")
        extents = []
        for file, offset, size in entry["extents"]:
            number, start = _whole(file, len(names) - 1), _whole(offset, _FILE_SIZE_LIMIT_BYTES)
            end = start + _whole(size, CHUNK_BYTES)
            if (number, start) < before or end == start or end > files[names[number]]["size"]:
                raise _refused(f"A chunk lies outside of {names[number]}, or over another.")
            before = (number, end)
            extents.append(Extent(names[number], start, end - start))
        chunk = Chunk(tuple(extents), entry["sha256"])
        if not 0 < chunk.size <= CHUNK_BYTES:
            raise _refused("A chunk is empty, or too large.")
        chunks.append(chunk)
    return tuple(chunks)


def _identity(fields: Mapping[str, Any]) -> Identity:
    if len(fields) > 64 or not all(
        isinstance(text, str) and len(text) <= _TEXT_LIMIT for pair in fields.items() for text in pair
    ):
        raise _refused("Its identity is none.")
    return dict(fields)


def _whole(value: object, limit: int) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise _refused(f"{str(value)[:40]} is no number that can be.")
    return value


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise _refused(f"{value[:80]!r} cannot name a folder of snapshots.")
    return value


def _one_of(value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise _refused(f"Its kind {str(value)[:40]!r} is unknown.")
    return value


def _refused(why: str) -> SnapshotCorrupt:
    return SnapshotCorrupt(
        "The snapshot in the registry is refused.",
        why=why,
        hint="Push it again from where it was taken, and see who may write to this repository.",
        code="bad-artifact",
    )
