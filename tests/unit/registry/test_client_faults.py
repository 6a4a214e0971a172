"""Registries that are down, refuse, stumble, cut, hang and lie: each a three-line error, or none at all."""

import hashlib
import socket

import pytest

from adapter.errors import Overloaded, SnapshotCorrupt, Timeout, Unavailable
from adapter.registry.client import Client
from adapter.registry.credentials import Credentials
from adapter.registry.reference import Reference
from tests.fakes.cutting_proxy import CuttingProxy
from tests.fakes.registry import FakeRegistry
from tests.unit.registry.conftest import (
    PASSWORD,
    client_of,
    credentials,
    digest_of,
    docker_registry,
    needs_docker_registry,
    put_image,
)

DATA = bytes(range(256)) * 4096
DIGEST = digest_of(DATA)


def said(error):
    assert error.why
    assert error.hint
    return f"{error.message} {error.why} {error.hint}"


def test_a_registry_that_is_down_is_named(free_port):
    with client_of(f"127.0.0.1:{free_port}") as client, pytest.raises(Unavailable) as caught:
        client.resolve("amd64")
    assert caught.value.code == "registry-down"
    assert f"127.0.0.1:{free_port}" in said(caught.value)
    assert "refused" in caught.value.why


def test_a_host_that_does_not_exist_is_named():
    with client_of("registry.invalid") as client, pytest.raises(Unavailable) as caught:
        client.resolve("amd64")
    assert "registry.invalid" in said(caught.value)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_passes_is_waited_for(fake, status):
    waits = []
    client = Client(Reference.parse(f"{fake.host}/team/fn:1"), pause=waits.append)
    image = put_image(client)
    fake.answers.extend([(status, {"Retry-After": "7"}), (status, {})])
    assert client.resolve("amd64").digest == image.digest
    assert waits[0] >= 7
    assert 0 < waits[1] < 7


def test_what_does_not_pass_is_told_in_the_end(fake):
    fake.answers.extend([(503, {})] * 20)
    with client_of(fake.host) as client, pytest.raises(Unavailable) as caught:
        client.resolve("amd64")
    assert "503" in said(caught.value)
    fake.answers.clear()
    fake.answers.extend([(429, {"Retry-After": "1"})] * 20)
    with client_of(fake.host) as client, pytest.raises(Overloaded):
        client.resolve("amd64")


def test_a_refusal_for_good_is_not_asked_again(fake):
    fake.answers.append((400, {}))
    with client_of(fake.host) as client, pytest.raises(Unavailable):
        client.resolve("amd64")
    assert len(fake.seen) == 1


def test_an_upload_that_stumbles_begins_anew(fake):
    with client_of(fake.host) as client:
        fake.answers.extend([(202, {"Location": "/v2/team/fn/blobs/uploads/9?_state=x"}), (500, {})])
        client.push_blob(DIGEST, DATA)
    assert fake.blobs[DIGEST] == DATA


def test_a_cut_upload_begins_anew(fake):
    with CuttingProxy(fake.port).running() as proxy, client_of(proxy.host) as client:
        proxy.cuts = [1]  # the first answer does not arrive whole
        client.push_blob(DIGEST, DATA)
    assert fake.blobs[DIGEST] == DATA


def test_a_registry_that_hangs_is_given_up(fake):
    with CuttingProxy(fake.port).running() as proxy:
        proxy.hangs = True
        with client_of(proxy.host, timeouts_s=(0.1, 0.05)) as client, pytest.raises(Timeout) as caught:
            client.resolve("amd64")
        assert proxy.hung.is_set()
    assert caught.value.code == "registry-timeout"
    said(caught.value)


def test_a_download_that_stands_still_goes_on(fake):
    fake.blobs[DIGEST] = DATA
    with CuttingProxy(fake.port).running() as proxy, client_of(proxy.host, timeouts_s=(1, 0.2)) as client:

        def hang_once(count):
            proxy.hangs = count > 100_000 and not proxy.hung.is_set()

        proxy.on_bytes = hang_once
        client._pause = lambda _: setattr(proxy, "hangs", False)
        assert client.get_blob(DIGEST, len(DATA)) == DATA
        assert proxy.hung.is_set()


def test_a_server_that_ends_short_of_what_it_said_is_asked_for_the_rest(fake):
    fake.blobs[DIGEST] = DATA[: len(DATA) // 2]  # as a store that lost its tail would serve it
    with client_of(fake.host) as client, pytest.raises(Unavailable) as caught:
        client.get_blob(DIGEST, len(DATA))
    assert caught.value.code in {"registry-cut", "registry-failed"}
    said(caught.value)


def test_bytes_that_are_not_the_digests_are_refused(fake):
    fake.blobs[DIGEST] = DATA[:-1] + b"x"
    with client_of(fake.host) as client, pytest.raises(SnapshotCorrupt) as caught:
        client.get_blob(DIGEST, len(DATA))
    assert caught.value.code == "wrong-digest"
    said(caught.value)


def test_a_manifest_that_is_not_the_digests_is_refused(fake):
    wanted = "sha256:" + "1" * 64
    fake.put_manifest("1", "application/json", b"{}")
    fake.manifests[wanted] = fake.manifests["1"]
    with client_of(fake.host) as client, pytest.raises(SnapshotCorrupt):
        client.get_manifest(wanted)


@pytest.mark.parametrize("raw", [b"", b"[]", b"no json", b"[" * 10**6, b'{"a":"' + b"x" * 5 * 2**20 + b'"}'])
def test_a_manifest_that_is_none_is_refused(fake, raw):
    fake.manifests["1"] = ("application/json", raw)
    with client_of(fake.host) as client, pytest.raises(SnapshotCorrupt):
        client.get_manifest("1")


def test_an_endless_blob_is_not_read_to_the_end(fake):
    fake.blobs[DIGEST] = bytes(50 * 2**20)
    with client_of(fake.host) as client, pytest.raises(SnapshotCorrupt):
        client.get_blob(DIGEST, 1000)
    assert client.traffic.received_bytes < 3 * 2**20


def test_an_entry_that_another_push_overwrote_is_entered_again(fake):
    with client_of(fake.host) as client:
        image = put_image(client)
        tag = image.digest.replace(":", "-")
        others = []

        def overwrite_once():
            if not others:
                others.append(1)
                fake.put_manifest(tag, "application/vnd.oci.image.index.v1+json", b'{"manifests":[]}')

        fake.after_index = overwrite_once
        client.add_referrer(image.digest, image, lambda other: False)
        assert tag in fake.manifests
        assert image.digest.encode() in fake.manifests[tag][1]


def test_an_entry_that_never_stays_is_an_error(fake):
    with client_of(fake.host) as client:
        image = put_image(client)
        tag = image.digest.replace(":", "-")
        fake.after_index = lambda: fake.put_manifest(tag, "application/json", b'{"manifests":[]}')
        with pytest.raises(Unavailable) as caught:
            client.add_referrer(image.digest, image, lambda other: False)
    assert caught.value.code == "referrers-contended"


# Who asks


@pytest.mark.parametrize("tokens", [False, True])
def test_credentials_open_a_closed_registry(tokens):
    with (
        FakeRegistry(password=f"team:{PASSWORD}", tokens=tokens).running() as registry,
        client_of(registry.host, credentials=credentials()) as client,
    ):
        put_image(client)
        asked = len(registry.seen)
        client.resolve("amd64")
        assert len(registry.seen) == asked + 1  # what opened once is said at once from then on


def test_an_identity_token_is_exchanged():
    with (
        FakeRegistry(password="team:other", tokens=True).running() as registry,
        client_of(registry.host, credentials=Credentials(identity_token="long-lived")) as client,
    ):
        put_image(client)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("given", [None, Credentials("team", "wrong s3cret")])
def test_a_refusal_says_so_and_no_secret(tokens, given):
    with (
        FakeRegistry(password=f"team:{PASSWORD}", tokens=tokens).running() as registry,
        client_of(registry.host, credentials=given) as client,
        pytest.raises(Unavailable) as caught,
    ):
        client.resolve("amd64")
    assert caught.value.code == "registry-denied"
    assert "401" in caught.value.why
    assert "docker login" in caught.value.hint
    assert "s3cret" not in said(caught.value)


@needs_docker_registry
def test_the_real_registry_opens_to_the_right_password_only(tmp_path):
    with docker_registry(tmp_path, password=True) as host:
        with client_of(host, credentials=credentials()) as client:
            put_image(client)
        for wrong in (None, Credentials("team", "wrong")):
            with client_of(host, credentials=wrong) as client, pytest.raises(Unavailable) as caught:
                client.resolve("amd64")
            assert caught.value.code == "registry-denied"


def test_credentials_do_not_follow_a_redirect_to_another_host(fake):
    with FakeRegistry().running() as other, FakeRegistry(password=f"team:{PASSWORD}").running() as registry:
        other.blobs[DIGEST] = DATA
        with client_of(registry.host, credentials=credentials()) as client:
            put_image(client)
            registry.answers.append((307, {"Location": f"http://{other.host}/v2/team/fn/blobs/{DIGEST}"}))
            assert client.get_blob(DIGEST, len(DATA)) == DATA
    assert [given for _, _, given in other.seen] == [""]


def test_credentials_do_not_follow_an_upload_to_another_host():
    with (
        FakeRegistry().running() as other,
        FakeRegistry(password=f"team:{PASSWORD}").running() as registry,
        client_of(registry.host, credentials=credentials()) as client,
    ):
        put_image(client)
        registry.answers.append((202, {"Location": f"http://{other.host}/v2/team/fn/blobs/uploads/1"}))
        client.push_blob(DIGEST, DATA)
    assert other.blobs[DIGEST] == DATA
    assert [given for _, _, given in other.seen] == [""]


def test_an_unencrypted_token_service_of_an_encrypted_registry_gets_no_password(monkeypatch):
    with client_of("registry.example", credentials=credentials()) as client:
        sent = []
        monkeypatch.setattr(client, "_send", lambda *args, **options: sent.append(args))
        with pytest.raises(Unavailable) as caught:
            client._login.answer('Bearer realm="http://registry.example/token",service="x"', "")
    assert sent == []
    assert caught.value.code == "registry-denied"


def test_a_netrc_file_is_not_sent(fake, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    with client_of(fake.host) as client:
        put_image(client)
    assert {given for _, _, given in fake.seen} == {""}


def test_nothing_secret_is_logged(caplog):
    with (
        FakeRegistry(password=f"team:{PASSWORD}", tokens=True).running() as registry,
        caplog.at_level("DEBUG"),
        client_of(registry.host, credentials=credentials()) as client,
    ):
        put_image(client)
    for word in (PASSWORD, "secret-state", "good-token"):
        assert word not in caplog.text


def test_plain_http_goes_to_this_machine_or_where_it_is_said():
    assert Client(Reference.parse("registry.example/fn"))._base == "https://registry.example"
    assert Client(Reference.parse("registry.example/fn"), plain_http=True)._base == "http://registry.example"
    assert Client(Reference.parse("127.0.0.1:5000/fn"))._base == "http://127.0.0.1:5000"


def test_a_server_that_speaks_no_http_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        import threading

        def babble():
            for _ in range(5):
                connection, _ = server.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(hashlib.sha256(b"").digest() + b"\n")

        thread = threading.Thread(target=babble, daemon=True)
        thread.start()
        with client_of(f"127.0.0.1:{server.getsockname()[1]}") as client, pytest.raises(Unavailable) as caught:
            client.resolve("amd64")
        thread.join()
    said(caught.value)
