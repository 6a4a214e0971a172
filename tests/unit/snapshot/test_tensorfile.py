"""The safetensors format: what we write others read, and what a stranger writes is checked before it is used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given, strategies as st

from adapter.errors import SnapshotCorrupt
from adapter.snapshot.tensorfile import ITEM_BYTES, PAGE_BYTES, Header, arrange, header_bytes, read_header, size_bytes


def parse(content: bytes) -> Header:
    fd = os.memfd_create("weights")
    try:
        os.write(fd, content)
        return read_header(fd)
    finally:
        os.close(fd)


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


described = st.lists(
    st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 70), max_size=3).map(tuple)), max_size=12
)


@given(described, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_what_is_arranged_and_written_reads_back_aligned_and_without_holes(tensors: list, metadata: dict) -> None:
    placed = arrange((f"t{i}", dtype, shape, ITEM_BYTES[dtype]) for i, (dtype, shape) in enumerate(tensors))
    data = bytes(sum(stored.size_bytes for stored in placed))
    header = parse(header_bytes(placed, metadata) + data)
    assert header.data_at % PAGE_BYTES == 0
    assert header.metadata == metadata
    assert sorted(header.tensors.values(), key=lambda t: t.name) == sorted(placed, key=lambda t: t.name)
    for number, (dtype, shape) in enumerate(tensors):
        stored = header.tensors[f"t{number}"]
        assert (stored.dtype, stored.shape, stored.size_bytes) == (dtype, shape, size_bytes(dtype, shape))
        assert stored.start % ITEM_BYTES[dtype] == 0


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xff" * 8)
@example(file_of(b"[" * 100_000))
@example(file_of(b"\xff\xfe"))
@example(file_of([]))
@example(file_of(b'{"a": 1, "a": 1}'))
@example(file_of({"__metadata__": {"a": 1}}))
@example(file_of({"__metadata__": []}))
@example(file_of({"a": []}))
@example(file_of({"a": {**entry(), "extra": 1}}, bytes(8)))
@example(file_of({"a": entry("F31")}, bytes(8)))
@example(file_of({"a": entry(["F32"])}, bytes(8)))
@example(file_of({"a": entry(shape=[-2], offsets=[8, 0])}, bytes(8)))
@example(file_of({"a": entry(shape=[True, 2])}, bytes(8)))
@example(file_of({"a": entry(shape=[2.0])}, bytes(8)))
@example(file_of({"a": entry(shape="2")}, bytes(8)))
@example(file_of({"a": entry(shape=[2**62, 2**62])}, bytes(8)))
@example(file_of({"a": entry(offsets=[0])}, bytes(8)))
@example(file_of({"a": entry(offsets=[0, 9])}, bytes(9)))
@example(file_of({"a": entry()}, bytes(7)))
@example(file_of({"a": entry()}, bytes(9)))
@example(file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)))
@example(file_of({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)))
@example(file_of({"a": entry(), "b": entry()}, bytes(8)))
def test_anything_else_is_refused_and_never_crashes(content: bytes) -> None:
    try:
        parse(content)
    except SnapshotCorrupt as error:
        assert error.why
    else:
        assert content[8:10] == b"{}", "only an empty header describes no bytes"


@pytest.mark.parametrize(
    ("second", "size", "said"),
    [
        ([4, 12], 12, "b overlaps"),
        ([12, 20], 20, "b leaves a hole"),
        ([8, 16], 12, "b ends after"),
        ([8, 16], 20, "4 bytes"),
    ],
)
def test_the_refusal_names_the_tensor(second: list, size: int, said: str) -> None:
    with pytest.raises(SnapshotCorrupt) as caught:
        parse(file_of({"a": entry(), "b": entry(offsets=second)}, bytes(size)))
    assert said in caught.value.why


def test_a_real_reader_opens_what_we_write(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    placed = arrange((name, name, (3, 5), ITEM_BYTES[name]) for name in ITEM_BYTES)
    path = tmp_path / "all.safetensors"
    path.write_bytes(header_bytes(placed, {"format": "pt"}) + bytes(sum(stored.size_bytes for stored in placed)))
    for name, found in safetensors.deserialize(path.read_bytes()):
        assert (found["dtype"], found["shape"]) == (name, [3, 5])
