"""Artifacts that someone made to do harm: refused by name, nothing of them is published or left."""

import hashlib
import json
import tracemalloc

import pytest
import zstandard

from adapter.errors import SnapshotCorrupt, SnapshotMismatch
from adapter.registry.artifact import ARTIFACT_TYPE, CHUNK_BYTES, CHUNK_TYPE, CONFIG_TYPE, Chunk, Extent
from adapter.registry.client import MANIFEST_TYPE, Descriptor
from adapter.registry.pull import pull, unpack
from adapter.snapshot.identity import machine_identity
from adapter.snapshot.store import Store
from tests.unit.registry.conftest import client_of, digest_of, put_image

PLAIN = b"plain bytes " * 1000
PACKED = zstandard.ZstdCompressor(write_content_size=True, write_checksum=True).compress(PLAIN)
MACHINE = {"kernel": "k", "cpu": "c", "driver": "none", "gpus": "none"}


def sound():
    return {
        "format": 1,
        "kind": "process",
        "function": "fn.openfaas-fn",
        "tenant": "default",
        "identity": {"code": "1", **MACHINE},
        "facts": {},
        "files": {"images/memory.img": {"size": len(PLAIN), "checksum": "0" * 64}},
        "created_at_ns": 1,
        "chunks": [{"sha256": hashlib.sha256(PLAIN).hexdigest(), "extents": [[0, 0, len(PLAIN)]]}],
    }


@pytest.fixture
def offered(fake, tmp_path):
    """Pull an artifact with this configuration, these layers and this manifest."""
    store = Store(tmp_path / "snapshots", limit_bytes=2**30)

    def offer(config=None, **manifest):
        with client_of(fake.host) as client:
            image = put_image(client)
            raw = json.dumps(config or sound()).encode()
            for blob in (raw, PACKED):
                client.push_blob(digest_of(blob), blob)
            data = {
                "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE,
                "config": {"mediaType": CONFIG_TYPE, "digest": digest_of(raw), "size": len(raw)},
                "layers": [{"mediaType": CHUNK_TYPE, "digest": digest_of(PACKED), "size": len(PACKED)}],
                "subject": image.to_json(), **manifest,
            }  # fmt: skip
            stored, _ = client.put_manifest("", data)
            return pull(client, image.digest, stored, store, MACHINE)

    return offer


@pytest.fixture
def nothing_left(tmp_path):
    yield
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")] == []


def test_what_the_others_here_are_changes_of_is_taken(offered):
    assert (offered().snapshot.path / "images/memory.img").read_bytes() == PLAIN


def with_file(name, **entry):
    return {"files": {name: {"size": len(PLAIN), "checksum": "0" * 64, **entry}}}


CONFIGS = {
    "another format": {"format": 2},
    "an unknown kind": {"kind": "root"},
    "a function that leaves the folder": {"function": "../../etc"},
    "a tenant that leaves the folder": {"tenant": ".."},
    "a function of another type": {"function": ["fn"]},
    "a name that leaves the folder": with_file("../evil"),
    "an absolute name": with_file("/etc/passwd"),
    "a name with an empty part": with_file("images//x"),
    "a name too deep": with_file("a/b/c"),
    "a hidden name": with_file(".lock"),
    "a name with a zero byte": with_file("a\0b"),
    "the store's own name": with_file("manifest.json"),
    "the store's other name": with_file("verified.json"),
    "a file that is a folder too": {
        "files": {"a": {"size": len(PLAIN), "checksum": "0" * 64}, "a/b": {"size": 0, "checksum": "0" * 64}}
    },
    "a negative size": with_file("f", size=-1),
    "an absurd size": with_file("f", size=2**62),
    "a size that is true": with_file("f", size=True),
    "a checksum that is none": with_file("f", checksum="../x"),
    "no files": {"files": {}},
    "too many files": {"files": {f"f{n}": {"size": 1, "checksum": "0" * 64} for n in range(5000)}},
    "more data than the store holds": {
        "files": {"f": {"size": 2**40, "checksum": "0" * 64}},
        "chunks": [{"sha256": "0" * 64, "extents": [[0, n * CHUNK_BYTES, CHUNK_BYTES]]} for n in range(65)],
    },
    "a chunk past the end": {"chunks": [{"sha256": "0" * 64, "extents": [[0, 1, len(PLAIN)]]}]},
    "a chunk of no file": {"chunks": [{"sha256": "0" * 64, "extents": [[1, 0, 1]]}]},
    "a chunk of a file before the first": {"chunks": [{"sha256": "0" * 64, "extents": [[-1, 0, 1]]}]},
    "chunks that overlap": {"chunks": [{"sha256": "0" * 64, "extents": [[0, 0, 20], [0, 10, 20]]}]},
    "an empty chunk": {"chunks": [{"sha256": "0" * 64, "extents": []}]},
    "an empty extent": {"chunks": [{"sha256": "0" * 64, "extents": [[0, 0, 0]]}]},
    "a chunk too large": {
        **with_file("f", size=2**40),
        "chunks": [{"sha256": "0" * 64, "extents": [[0, 0, CHUNK_BYTES + 1]]}],
    },
    "more chunks than layers": {"chunks": [{"sha256": "0" * 64, "extents": [[0, n, 1]]} for n in range(2)]},
    "no chunks for its layers": {"chunks": []},
    "fewer bytes than the chunk has": {"chunks": [{"sha256": "0" * 64, "extents": [[0, 0, len(PLAIN) - 1]]}]},
    "an identity that is none": {"identity": {"code": 1}},
    "an identity without end": {"identity": {"code": "x" * 5000}},
    "a time that is none": {"created_at_ns": 2**70},
    "facts that are none": {"facts": "facts"},
    "facts larger than a manifest": {"facts": {"x": "y" * 2**21}},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_cannot_be_is_refused(offered, nothing_left, change):
    with pytest.raises(SnapshotCorrupt) as caught:
        offered({**sound(), **change})
    assert caught.value.message


MANIFESTS = {
    "of another image": {"subject": {"mediaType": MANIFEST_TYPE, "digest": "sha256:" + "1" * 64, "size": 1}},
    "of no image": {"subject": None},
    "of another type": {"artifactType": "application/x"},
    "with a configuration of another type": {"config": {"mediaType": "x", "digest": "sha256:" + "1" * 64, "size": 1}},
    "with a configuration too large": {
        "config": {"mediaType": CONFIG_TYPE, "digest": "sha256:" + "1" * 64, "size": 2**40}
    },
    "with a digest that is none": {"config": {"mediaType": CONFIG_TYPE, "digest": "sha256:../../x", "size": 1}},
    "with layers of another type": {"layers": [{"mediaType": "x", "digest": "sha256:" + "1" * 64, "size": 1}]},
    "with a layer too large": {"layers": [{"mediaType": CHUNK_TYPE, "digest": "sha256:" + "1" * 64, "size": 2**40}]},
    "with a negative layer": {"layers": [{"mediaType": CHUNK_TYPE, "digest": "sha256:" + "1" * 64, "size": -1}]},
    "with layers that are none": {"layers": "layers"},
    "with too many layers": {"layers": [{"mediaType": CHUNK_TYPE, "digest": "sha256:" + "1" * 64, "size": 1}] * 9000},
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_cannot_be_is_refused(offered, nothing_left, change):
    with pytest.raises(SnapshotCorrupt) as caught:
        offered(**change)
    assert caught.value.code in {"bad-artifact", "snapshot-corrupt"}


@pytest.mark.parametrize("field", MACHINE)
def test_a_process_of_another_machine_is_refused_whatever_the_listing_said(offered, field):
    with pytest.raises(SnapshotMismatch) as caught:
        offered({**sound(), "identity": {"code": "1", **MACHINE, field: "other"}})
    assert field in caught.value.why


def chunk(plain):
    return Chunk((Extent("f", 0, len(plain)),), hashlib.sha256(plain).hexdigest())


BOMB = zstandard.ZstdCompressor(write_content_size=True, write_checksum=True).compress(bytes(2**28))
FRAMES = {
    "no frame": b"garbage",
    "nothing": b"",
    "a frame cut short": PACKED[:-5],
    "a frame with more behind": PACKED + b"more",
    "two frames": PACKED + PACKED,
    "a frame that does not say its size": zstandard.ZstdCompressor(
        write_content_size=False, write_checksum=True
    ).compress(PLAIN),
    "a bomb": BOMB,
    "a bomb that says another size": BOMB[:4] + bytes([BOMB[4] & 0x3F | 0x40]) + BOMB[5:],
    "no checksum": zstandard.ZstdCompressor(write_content_size=True, write_checksum=False).compress(PLAIN),
    "a checksum of other bytes": PACKED[:-4] + bytes(byte ^ 0xFF for byte in PACKED[-4:]),
}


@pytest.mark.parametrize("packed", FRAMES.values(), ids=FRAMES)
def test_a_layer_that_is_not_its_chunk_is_refused_without_room_for_more(packed):
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotCorrupt):
            unpack(packed, chunk(PLAIN))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_annotations_prove_nothing_but_do_no_harm(fake):
    from adapter.registry.artifact import listed

    found = listed(Descriptor("m", "sha256:" + "1" * 64, 1, ARTIFACT_TYPE, {
        "dev.gpufn.snapshot.size": "9" * 5000, "dev.gpufn.snapshot.kernel": "\x1b[31m" * 5000,
        "dev.gpufn.snapshot.kind": "²",
    }))  # fmt: skip
    assert found.size == 0
    assert len(found.identity["kernel"]) <= 1024
    assert found.identity["kernel"].isprintable()
    assert found.differs_in(machine_identity()) == ["kernel"]
