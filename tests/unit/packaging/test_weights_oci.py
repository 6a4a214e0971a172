"""An artifact of a registry: plain files by title, cut, lied about, or named by a stranger."""

from __future__ import annotations

import hashlib
import json

import pytest

from adapter.errors import AdapterError
from adapter.packaging.sources import FetchedWeights, WeightsConfig, fetch_weights
from tests.fakes.checkpoints import safetensors
from tests.fakes.file_server import FileServer, serving

TITLE = "org.opencontainers.image.title"
FILES = {"model.safetensors": safetensors(a=[1.0] * 5000, b=[2.0]), "config.json": b"{}", "vae/config.json": b"{}"}


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def artifact(files=FILES, **annotations: str) -> tuple[str, dict[str, bytes]]:
    """The digest of a manifest, and what a registry has at which path."""
    layers = [
        {
            "mediaType": "application/octet-stream",
            "digest": digest_of(body),
            "size": len(body),
            "annotations": {TITLE: name, **annotations},
        }
        for name, body in files.items()
    ]
    manifest = json.dumps({"schemaVersion": 2, "layers": layers}).encode()
    pages = {f"/v2/models/net/blobs/{digest_of(body)}": body for body in files.values()}
    return digest_of(manifest), {f"/v2/models/net/manifests/{digest_of(manifest)}": manifest, **pages}


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    (tmp_path / "layers").mkdir()
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "no-logins"))

    def fetch(server: FileServer, digest: str) -> FetchedWeights:
        config = WeightsConfig(f"oci://127.0.0.1:{server.server_address[1]}/models/net@{digest}")
        return fetch_weights(config, tmp_path, tmp_path / "layers" / "weights")

    def fails(server: FileServer, digest: str) -> AdapterError:
        with pytest.raises(AdapterError) as caught:
            fetch(server, digest)
        assert list((tmp_path / "layers").iterdir()) == []
        assert caught.value.why
        return caught.value

    fetch.fails = fails
    return fetch


def test_an_artifact_becomes_weights(fetch):
    digest, pages = artifact()
    with serving(FileServer(b"", pages=pages)) as server:
        fetched = fetch(server, digest)
    assert (fetched.tensors, fetched.left_out) == (2, ())
    assert fetched.source.endswith(f"/models/net@{digest}")
    assert (fetched.folder / "model" / "vae" / "config.json").read_bytes() == b"{}"


def test_a_blob_that_is_cut_goes_on(fetch):
    digest, pages = artifact()
    with serving(FileServer(b"", "", "", "", "cut", pages=pages)) as server:
        assert fetch(server, digest).tensors == 2
        assert any(asked for asked in server.asked)


def test_a_blob_of_another_digest_is_refused(fetch):
    digest, pages = artifact()
    blob = f"/v2/models/net/blobs/{digest_of(FILES['config.json'])}"
    with serving(FileServer(b"", pages={**pages, blob: b"[]"})) as server:
        fetch.fails(server, digest)


def test_another_manifest_than_the_one_asked_for_is_refused(fetch):
    digest, pages = artifact()
    manifest = f"/v2/models/net/manifests/{digest}"
    with serving(FileServer(b"", pages={**pages, manifest: pages[manifest] + b" "})) as server:
        fetch.fails(server, digest)


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "a\nb.json", "a/../b.json", ".ssh/config.json"])
def test_a_title_that_leads_out_is_left_out(fetch, name, tmp_path):
    digest, pages = artifact({**FILES, name: b"[1]"})
    with serving(FileServer(b"", pages=pages)) as server:
        assert name in fetch(server, digest).left_out
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"[1]"]


def test_a_folder_in_an_archive_is_refused_with_the_reason(fetch):
    digest, pages = artifact(**{"io.deis.oras.content.unpack": "true"})
    with serving(FileServer(b"", pages=pages)) as server:
        error = fetch.fails(server, digest)
    assert (error.code, "archive" in error.why) == ("weights-unsafe", True)


def test_an_image_is_no_artifact_of_weights(fetch):
    manifest = json.dumps({"layers": [{"mediaType": "x", "digest": digest_of(b""), "size": 0}]}).encode()
    with serving(FileServer(b"", pages={f"/v2/models/net/manifests/{digest_of(manifest)}": manifest})) as server:
        assert fetch.fails(server, digest_of(manifest)).code == "weights-unsafe"


@pytest.mark.parametrize("status", ["404", "401", "403"])
def test_a_registry_that_refuses_is_said(fetch, status):
    digest, pages = artifact()
    with serving(FileServer(b"", *[status] * 9, pages=pages)) as server:
        assert "127.0.0.1" in fetch.fails(server, digest).message
