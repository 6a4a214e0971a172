"""Weights that a function image brings: a weight snapshot in a layer, read-only, the same on every node.

    <GPUFN_WEIGHTS>/weights.safetensors, weights.json    see adapter.snapshot.weightsfile
                    model/                               what MODEL_DIR names
                    source.json                          where they came from, where a builder said it

They are the image's: nothing here writes to them or removes them. Whoever pulled the image has verified its
layers; what a disk did to them since is found by sizes at each start, and by checksums as often as is asked.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from adapter.errors import NotFound, SnapshotCorrupt
from adapter.files import write_whole
from adapter.snapshot import weightsfile
from adapter.snapshot.checksum import CHUNK_BYTES
from adapter.snapshot.identity import tree_digest
from adapter.snapshot.weightsfile import DATA, INDEX, reading

SOURCE = "source.json"
MODEL_FOLDER = "model"
KEY_PREFIX = "image:"
"""How the key of weights begins that a process snapshot maps and no store holds."""
_HEAD_LIMIT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ImageWeights:
    """A weight snapshot of an image whose two files fit each other. `digest`: see `identity_of_weights`."""

    path: Path
    digest: str


def identity_of_weights(folder: Path) -> str:
    """A digest of all that a replica finds in `folder`, which need not hold a weight snapshot. Quick: reads no weights.

    Weights count by what their index and their builder say, the small files beside them by content. Raises `OSError`.
    """
    whole = hashlib.blake2b(digest_size=16)
    for name in (INDEX, SOURCE):
        try:
            with (folder / name).open("rb") as file:
                whole.update(name.encode() + b" " + file.readline(_HEAD_LIMIT_BYTES))
        except FileNotFoundError:
            continue
    if (folder / MODEL_FOLDER).is_dir():
        whole.update(tree_digest(folder / MODEL_FOLDER).encode())
    return whole.hexdigest()


def find(folder: Path) -> ImageWeights:
    """The weight snapshot in `folder`, its index and its sizes checked, its contents not.

    Raises `NotFound` where there is none, `SnapshotCorrupt` naming what is wrong.
    """
    if not os.path.lexists(folder / INDEX):
        raise NotFound("The image brings no weight snapshot.", why=f"{folder} has no {INDEX}.", code="none")
    try:
        with reading(folder) as (file, _, index):
            if len(index.chunks) != -(-os.fstat(file.fileno()).st_size // CHUNK_BYTES):
                raise SnapshotCorrupt(f"{DATA} has another length than {INDEX} says.")
        return ImageWeights(folder, identity_of_weights(folder))
    except SnapshotCorrupt as exc:
        raise _of_the_image(exc) from exc
    except OSError as exc:
        raise _of_the_image(SnapshotCorrupt("They cannot be read.", why=f"{exc.strerror}.")) from exc


def verify(weights: ImageWeights, record: Path | None) -> None:
    """Compare all checksums; with `record`, a file, only where it does not say that they held here before.

    The record holds size and time, which every container of the image sees alike. Raises `SnapshotCorrupt`.
    """
    try:
        facts = os.stat(weights.path / DATA)
        said = json.dumps({"digest": weights.digest, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}).encode()
        if record is not None and record.is_file() and record.read_bytes() == said:
            return
        weightsfile.verify(weights.path)
    except SnapshotCorrupt as exc:
        raise _of_the_image(exc) from exc
    except OSError as exc:
        raise _of_the_image(SnapshotCorrupt("They cannot be read.", why=f"{exc.strerror}.")) from exc
    if record is not None:
        try:
            write_whole(record, said)
        except OSError:
            pass  # a full or read-only folder: the next start compares again


def _of_the_image(error: SnapshotCorrupt) -> SnapshotCorrupt:
    return SnapshotCorrupt(
        f"The image's weights are damaged: {error.message}",
        why=error.why,
        hint="Pull the image anew on this node.",
        code=error.code,
    )
