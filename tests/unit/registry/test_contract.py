"""What every registry does for the client: the one in this process, with and without referrers, and the real one."""

import os

import pytest

from adapter.errors import NotFound, SnapshotCorrupt
from adapter.registry.artifact import ARTIFACT_TYPE
from adapter.registry.client import INDEX_TYPE, MANIFEST_TYPE, Descriptor
from tests.unit.registry.conftest import client_of, digest_of, put_image

MISSING = "sha256:" + "0" * 64


def test_a_blob_comes_back_as_it_went(client):
    data = os.urandom(3 * 2**20)
    digest = digest_of(data)
    assert not client.has_blob(digest)
    client.push_blob(digest, data)
    assert client.has_blob(digest)
    assert client.get_blob(digest, len(data)) == data


def test_a_blob_under_a_wrong_digest_is_not_stored(client):
    with pytest.raises(Exception, match="cannot do what it was asked") as caught:
        client.push_blob(MISSING, b"data")
    assert caught.value.code == "registry-failed"
    assert not client.has_blob(MISSING)


def test_a_blob_of_another_size_than_said_is_refused(client):
    digest = digest_of(b"0123456789")
    client.push_blob(digest, b"0123456789")
    with pytest.raises(SnapshotCorrupt):
        client.get_blob(digest, 5)


def test_what_is_not_there_is_not_found(client):
    put_image(client)
    for ask in (
        lambda: client.get_manifest("2"),
        lambda: client.get_manifest(MISSING),
        lambda: client.get_blob(MISSING, 3),
    ):
        with pytest.raises(NotFound) as caught:
            ask()
        assert caught.value.code == "no-image"
        assert "404" in caught.value.why


def test_an_image_is_resolved_by_tag_and_by_digest(client, host):
    image = put_image(client)
    assert client.resolve("amd64").digest == image.digest
    client.reference = client.reference.at(image.digest)
    assert client.resolve("amd64").digest == image.digest


def test_of_an_index_the_platforms_image_is_meant(client):
    amd, arm = put_image(client, "amd"), put_image(client, "arm")
    entries = [
        {**image.to_json(), "platform": {"os": "linux", "architecture": architecture}}
        for image, architecture in ((arm, "arm64"), (amd, "amd64"))
    ]
    client.put_manifest("1", {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries})
    assert client.resolve("amd64").digest == amd.digest
    with pytest.raises(NotFound, match="linux/riscv64"):
        client.resolve("riscv64")


def refer(client, image, number):
    """A manifest whose subject is the image, entered as a registry of its kind wants it."""
    empty = b"{}"
    client.push_blob(digest_of(empty), empty)
    manifest = {
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(empty), "size": 2},
        "layers": [], "subject": image.to_json(), "annotations": {"number": str(number)},
    }  # fmt: skip
    stored, is_tracked = client.put_manifest("", manifest)
    if not is_tracked:
        entry = Descriptor(stored.media_type, stored.digest, stored.size, ARTIFACT_TYPE, manifest["annotations"])
        client.add_referrer(image.digest, entry, lambda other: other.annotations["number"] == str(number))
    return stored.digest


def test_referrers_are_listed_with_their_annotations(client):
    image = put_image(client)
    assert client.referrers(image.digest, ARTIFACT_TYPE) == []
    digests = {refer(client, image, number) for number in range(3)}
    found = client.referrers(image.digest, ARTIFACT_TYPE)
    assert {entry.digest for entry in found} == digests
    assert {entry.annotations["number"] for entry in found} == {"0", "1", "2"}
    assert client.referrers(image.digest, "application/other") == []
    refer(client, image, 1)  # again
    assert len(client.referrers(image.digest, ARTIFACT_TYPE)) == 3


def test_a_cut_download_goes_on_where_it_was_cut(client, host, proxy):
    data = os.urandom(4 * 2**20)
    digest = digest_of(data)
    client.push_blob(digest, data)
    proxy.cuts = [3 * 2**20, 2**19]
    with client_of(proxy.host) as other:
        assert other.get_blob(digest, len(data)) == data
    assert proxy.cuts == []
    assert proxy.received < 1.2 * len(data)
