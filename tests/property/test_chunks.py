"""Chunks of sparse files: any holes, any sizes, the same bytes after the way there and back."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from adapter.errors import SnapshotCorrupt
from adapter.registry import artifact
from adapter.registry.artifact import CHUNK_TYPE, config_of, parse, plan
from adapter.registry.client import Descriptor
from adapter.snapshot.store import Snapshot

PAGE = 4096
areas = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3 * PAGE)), max_size=6)
"""(page it begins at, bytes) of what a file holds."""


def write(path, holds, tail):
    with path.open("wb") as file:
        for page, size in holds:
            file.seek(page * PAGE)
            file.write(os.urandom(size))
        file.truncate(max([page * PAGE + size for page, size in holds], default=0) + tail)


@given(files=st.lists(st.tuples(areas, st.integers(0, 10 * PAGE)), min_size=1, max_size=4), limit=st.integers(1, 5))
def test_all_data_is_in_exactly_one_chunk_and_nothing_else_is(tmp_path_factory, files, limit):
    folder = tmp_path_factory.mktemp("files")
    for number, (holds, tail) in enumerate(files):
        write(folder / f"f{number}", holds, tail)
    names = [f"f{number}" for number in range(len(files))]
    chunk_bytes, artifact.CHUNK_BYTES = artifact.CHUNK_BYTES, limit * PAGE
    try:
        chunks = [replace(chunk, sha256=hashlib.sha256(b"").hexdigest()) for chunk in plan(folder, names)]
        assert all(0 < chunk.size <= limit * PAGE for chunk in chunks)
        assert all(chunk.size == limit * PAGE for chunk in chunks[:-1])
        assert rebuilt(folder, names, chunks) == {name: (folder / name).read_bytes() for name in names}
        parsed = parse(config_of(snapshot_of(folder, names), chunks), layers_of(chunks), 2**30)
        assert parsed.chunks == tuple(chunks)
        assert parsed.size == sum(end - start for name in names for start, end in artifact.data_ranges(folder, name))
    finally:
        artifact.CHUNK_BYTES = chunk_bytes


def rebuilt(folder: Path, names, chunks):
    """What files become that get these extents and nothing else."""
    made = {name: bytearray((folder / name).stat().st_size) for name in names}
    for chunk in chunks:
        for extent in chunk.extents:
            with (folder / extent.file).open("rb") as file:
                file.seek(extent.offset)
                data = file.read(extent.size)
            assert len(data) == extent.size
            made[extent.file][extent.offset : extent.offset + extent.size] = data
    return made


def snapshot_of(folder, names):
    files = {name: {"size": (folder / name).stat().st_size, "checksum": "0" * 64} for name in names}
    return Snapshot(folder, "", "process", "fn.openfaas-fn", "default", {"code": "c"}, {}, files, 1)


def layers_of(chunks):
    return [Descriptor(CHUNK_TYPE, "sha256:" + "0" * 64, 10) for _ in chunks]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["format", "kind", "function", "tenant", "identity", "facts", "files", "created_at_ns", "chunks"]
        ),
        values,
    )
)
def test_a_configuration_is_read_or_refused(changes):
    sound = {
        "format": 1, "kind": "process", "function": "fn.x", "tenant": "default", "identity": {"code": "c"}, "facts": {},
        "files": {"f": {"size": 10, "checksum": "0" * 64}}, "created_at_ns": 1,
        "chunks": [{"sha256": "0" * 64, "extents": [[0, 0, 10]]}],
    }  # fmt: skip
    raw = json.dumps({**sound, **changes}).encode()
    try:
        parse(raw, layers_of(range(1)), 2**30)
    except SnapshotCorrupt as error:
        assert error.code == "bad-artifact"
        assert error.why


@given(st.binary(max_size=200))
def test_bytes_are_no_configuration(raw):
    with pytest.raises(SnapshotCorrupt):
        parse(raw, [], 2**30)
