"""Weights of an image: found by their index, damaged ones refused by name, and compared as often as is asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adapter.errors import NotFound, SnapshotCorrupt
from adapter.packaging.sources import WeightsConfig, fetch_weights
from adapter.snapshot import image_weights, weightsfile
from tests.fakes.checkpoints import safetensors


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    function = tmp_path / "function"
    (function / "net").mkdir(parents=True)
    (function / "net" / "model.safetensors").write_bytes(safetensors(a=[1.0, 2.0], b=[0.5] * 3000))
    (function / "net" / "config.json").write_text("{}")
    return fetch_weights(WeightsConfig("./net"), function, tmp_path / "weights").folder


def flip(path: Path, at: int) -> None:
    """One bit, the file's size and time kept."""
    facts, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_whole_weights_are_found(weights):
    assert image_weights.find(weights).path == weights


def test_a_folder_without_them_has_none(tmp_path):
    with pytest.raises(NotFound) as caught:
        image_weights.find(tmp_path)
    assert caught.value.code == "none"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights.safetensors").unlink(),
        lambda folder: os.truncate(folder / "weights.safetensors", 5000),
        lambda folder: flip(folder / "weights.json", 200),
        lambda folder: (folder / "weights.json").write_text("{}"),
        lambda folder: (folder / "weights.safetensors").write_bytes(safetensors(a=[1.0, 2.0])),
    ],
)
def test_damage_that_shows_in_index_and_sizes_is_refused_at_once(weights, damage):
    damage(weights)
    with pytest.raises(SnapshotCorrupt) as caught:
        image_weights.find(weights)
    assert "image's weights are damaged" in caught.value.message
    assert "Pull the image" in caught.value.hint


def test_a_flipped_bit_is_found_by_the_checksums_with_the_tensor_that_has_it(weights):
    flip(weights / "weights.safetensors", -1)
    found = image_weights.find(weights)
    with pytest.raises(SnapshotCorrupt) as caught:
        image_weights.verify(found, None)
    assert "holds the header, a, b" in caught.value.message


def test_checksums_are_compared_once_for_a_record(weights, tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(weightsfile, "verify", compared.append)
    found = image_weights.find(weights)
    for _ in range(2):
        image_weights.verify(found, tmp_path / "record")
    assert compared == [weights]
    image_weights.verify(found, None)
    os.utime(weights / "weights.safetensors", (7, 7))
    image_weights.verify(found, tmp_path / "record")
    assert len(compared) == 3


def test_damaged_weights_leave_no_record(weights, tmp_path):
    flip(weights / "weights.safetensors", -1)
    with pytest.raises(SnapshotCorrupt):
        image_weights.verify(image_weights.find(weights), tmp_path / "record")
    assert not (tmp_path / "record").exists()


def test_a_record_that_cannot_be_written_is_no_matter(weights, tmp_path):
    image_weights.verify(image_weights.find(weights), tmp_path / "gone" / "record")
    assert not (tmp_path / "gone").exists()


def test_nothing_of_the_image_is_written(weights, tmp_path):
    before = {path: (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in weights.rglob("*")}
    image_weights.verify(image_weights.find(weights), tmp_path / "record")
    assert {path: (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in weights.rglob("*")} == before


@pytest.mark.parametrize("name", ["model/config.json", "weights.json", "source.json"])
def test_whatever_load_or_build_may_read_is_in_the_identity(weights, name):
    first = image_weights.identity_of_weights(weights)
    assert image_weights.identity_of_weights(weights) == first
    (weights / name).write_text(json.dumps({"another": name}))
    assert image_weights.identity_of_weights(weights) != first
