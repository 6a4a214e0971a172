"""Images that the testbed writes itself are whole, named, and the same for the same content."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

from tests.testbed.images import Base, Image, program_image, write_archive, write_layer


def members(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def blob(found, digest):
    content = found[f"blobs/{digest.replace(':', '/')}"]
    assert f"sha256:{hashlib.sha256(content).hexdigest()}" == digest
    return content


def program(folder: Path) -> Path:
    path = folder / "pause"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)
    return path


def test_every_blob_of_an_image_is_in_its_archive_under_its_digest(tmp_path):
    found = members(
        write_archive([program_image("dev.local/pause:1", program(tmp_path), tmp_path)], tmp_path / "a.tar")
    )
    (entry,) = json.loads(found["index.json"])["manifests"]
    assert set(entry["annotations"].values()) == {"dev.local/pause:1"}
    manifest = json.loads(blob(found, entry["digest"]))
    config = json.loads(blob(found, manifest["config"]["digest"]))
    layers = [hashlib.sha256(blob(found, layer["digest"])).hexdigest() for layer in manifest["layers"]]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{layer}" for layer in layers]
    assert config["config"]["Entrypoint"] == ["/pause"]


def test_the_same_files_make_the_same_layer_whenever_they_were_written(tmp_path):
    folder = tmp_path / "function"
    folder.mkdir()
    (folder / "handler.py").write_text("x = 1")
    first = write_layer({"/f": folder, "/note": b"hi"}, tmp_path / "1").read_bytes()
    (folder / "handler.py").touch()
    assert write_layer({"/note": b"hi", "/f": folder}, tmp_path / "2").read_bytes() == first


def test_layers_that_a_node_has_are_left_out(tmp_path):
    digest = f"sha256:{hashlib.sha256(b'base').hexdigest()}"
    stored = tmp_path / "blobs" / digest.replace(":", "/")
    stored.parent.mkdir(parents=True)
    stored.write_bytes(b"base")
    config = {"rootfs": {"type": "layers", "diff_ids": ["sha256:unpacked"]}}
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": 4}
    image = Image("dev.local/f:1", {}, [write_layer({"/x": b""}, tmp_path / "x")], Base(config, [layer], tmp_path))
    name = f"blobs/{digest.replace(':', '/')}"
    assert members(write_archive([image], tmp_path / "whole.tar"))[name] == b"base"
    assert name not in members(write_archive([image], tmp_path / "thin.tar", without=image.base_digests))
