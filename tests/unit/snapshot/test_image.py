"""CRIU images: the messages they are made of, and files that are none."""

import errno
import os
import struct

import pytest
from hypothesis import given, strategies as st

from adapter.errors import SnapshotError
from adapter.snapshot import image
from adapter.snapshot.image import PAGE_BYTES, ImageFile, _Area, _outside, _Run, decode, encode

FIELD = st.integers(1, 500)
MESSAGES = st.lists(
    st.one_of(
        st.tuples(FIELD, st.just(0), st.integers(0, 2**64 - 1)),
        st.tuples(FIELD, st.just(2), st.binary(max_size=300)),
        st.tuples(FIELD, st.just(1), st.binary(min_size=8, max_size=8)),
        st.tuples(FIELD, st.just(5), st.binary(min_size=4, max_size=4)),
    )
)


@given(MESSAGES)
def test_messages_survive_a_round_trip(fields):
    assert decode(encode(fields)) == fields


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data):
    try:
        decode(data)
    except SnapshotError:
        pass


@given(st.lists(st.binary(max_size=100)), st.integers(1, 20))
def test_image_files_survive_a_round_trip_and_no_truncation(tmp_path_factory, messages, cut):
    path = tmp_path_factory.mktemp("image") / "mm-1.img"
    ImageFile(path, b"magic888", messages).write()
    assert ImageFile.read(path).messages == messages
    whole = path.read_bytes()
    if messages and cut < len(messages[-1]) + 4:
        path.write_bytes(whole[:-cut])
        with pytest.raises(SnapshotError):
            ImageFile.read(path)


def test_a_length_beyond_the_file_is_refused(tmp_path):
    path = tmp_path / "mm-1.img"
    path.write_bytes(b"magic888" + struct.pack("<I", 1000) + b"short")
    with pytest.raises(SnapshotError, match="mm-1"):
        ImageFile.read(path)


@given(st.lists(st.integers(0, 60), max_size=10, unique=True), st.integers(0, 30), st.integers(1, 30))
def test_pages_are_left_to_criu_or_moved_never_both_never_neither(borders, start, length):
    borders = sorted(borders)
    moved = [_Area(a, b, 0, 0, 0, 0, []) for a, b in zip(borders[::2], borders[1::2], strict=False)]
    run = _Run(start, start + length, 0, True, [])
    left = {page for a, b in _outside(run, moved) for page in range(a, b)}
    inside = {page for area in moved for page in range(area.start, area.end)}
    assert left == set(range(run.start, run.end)) - inside
    assert PAGE_BYTES == 4096


def test_bytes_are_copied_where_the_kernel_does_not_copy_between_file_systems(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused)
    data = os.urandom(3 * 2**20 + 17)
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        image._copy(source.fileno(), target.fileno(), 2 * len(data), 5, 11)  # past its end: the rest is a hole
    assert (tmp_path / "target").read_bytes() == bytes(11) + data[5:]


def test_a_full_disk_is_no_other_file_system(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        image._copy(0, 1, 1, 0, 0)
