"""Registries: one in this process, and the real `docker-registry` where it is installed."""

import hashlib
import json
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest

from adapter.registry.client import MANIFEST_TYPE, Client
from adapter.registry.credentials import Credentials
from adapter.registry.reference import Reference
from adapter.snapshot.identity import machine_identity
from adapter.snapshot.store import Store
from tests.fakes.cutting_proxy import CuttingProxy
from tests.fakes.registry import FakeRegistry

USER, PASSWORD = "team", "open sesame"
_HTPASSWD = "team:$2b$04$.UXoVNDwtuoLFMwjmdHBR.YQe0MBf1GlgcYc53WWj4CPgQkU3yCzu\n"


def client_of(host, **options):
    return Client(Reference.parse(f"{host}/team/fn:1"), pause=lambda _: None, **options)


@contextmanager
def docker_registry(folder, *, password=False):
    """Host and port of a real registry over a fresh folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "htpasswd").write_text(_HTPASSWD)
    config = {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
        "log": {"level": "error"},
        **({"auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}} if password else {}),
    }
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    process = subprocess.Popen(
        ["docker-registry", "serve", str(folder / "config.yml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_until_it_listens(process, port)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait_until_it_listens(process, port):
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert process.poll() is None, "docker-registry ended"
            time.sleep(0.01)  # it says nowhere that it is ready


needs_docker_registry = pytest.mark.skipif(
    shutil.which("docker-registry") is None, reason="not installed: docker-registry (apt-get install docker-registry)"
)


@pytest.fixture
def fake():
    with FakeRegistry().running() as registry:
        yield registry


@pytest.fixture(params=["fake", "fake-referrers", pytest.param("docker-registry", marks=needs_docker_registry)])
def host(request, tmp_path):
    """Host and port of a registry: every kind there is."""
    if request.param == "docker-registry":
        with docker_registry(tmp_path) as found:
            yield found
    else:
        with FakeRegistry(has_referrers=request.param == "fake-referrers").running() as registry:
            yield registry.host


@pytest.fixture
def proxy(host):
    with CuttingProxy(int(host.rpartition(":")[2])).running() as found:
        yield found


@pytest.fixture
def client(host):
    with client_of(host) as found:
        yield found


def put_image(client, tag="1"):
    """An image without layers; its descriptor."""
    config = json.dumps({"os": "linux", "tag": tag}).encode()
    digest = digest_of(config)
    client.push_blob(digest, config)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest,
            "size": len(config),
        },
        "layers": [],
    }
    return client.put_manifest(tag, manifest)[0]


def digest_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "snapshots")


def take(store, *, number=0, kind="process", function="fn.openfaas-fn", machine=None, **facts):
    """A snapshot with a sparse file of many chunks, beside small ones."""
    identity = {"code": f"c{number}", **(machine_identity() if machine is None else machine)}
    with store.building("default", function, identity, kind) as draft:
        images = draft.path / "images"
        images.mkdir(mode=0o700)
        for name in ("files.img", "mm-5.img"):
            (images / name).write_bytes(name.encode() * 100)
        with (images / "memory.img").open("wb") as file:
            for area in range(3):
                file.seek(area * 2**30)
                file.write(block(area, 2**21 + 4096 * area))
            file.truncate(6 * 2**30)
        return draft.publish(facts)


def block(seed, size):
    """Bytes that do not compress, the same each time."""
    return hashlib.shake_128(bytes([seed])).digest(size)


def credentials():
    return Credentials(USER, PASSWORD)
