"""A file over HTTP whose connection is cut, whose server lies, or that is another by now."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import pytest

from adapter.errors import AdapterError, NotFound, StorageError, Timeout, Unavailable
from adapter.packaging.sources import WeightsConfig, fetch_weights
from adapter.packaging.weights_download import Downloader
from tests.fakes.checkpoints import safetensors
from tests.fakes.file_server import FileServer, serving

BODY = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Fetch:
    """A download of `BODY` into a folder, without real pauses."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        self.pauses: list[float] = []
        self.seen: list[tuple[str, int, int]] = []

    def __call__(self, url: str, sha256: str = SHA256, **options) -> bytes:
        downloader = Downloader(pause=self.pauses.append, **options)
        try:
            downloader.fetch(url, self.path, name="model.safetensors", sha256=sha256, progress=self._progress)
        finally:
            downloader.close()
        return self.path.read_bytes()

    def _progress(self, *said) -> None:
        self.seen.append(said)

    def fails(self, url: str, sha256: str = SHA256, **options) -> AdapterError:
        with pytest.raises(AdapterError) as caught:
            self(url, sha256, **options)
        assert list(self.path.parent.iterdir()) == []
        assert caught.value.why
        return caught.value


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    return Fetch(tmp_path)


def test_a_file_that_is_what_its_digest_says(fetch):
    with serving(FileServer(BODY)) as server:
        assert fetch(f"{server.url}/model.safetensors") == BODY
        assert server.asked == [""]
    assert fetch.seen[-1] == ("model.safetensors", len(BODY), len(BODY))


def test_what_is_cut_goes_on_where_it_was_cut(fetch):
    with serving(FileServer(BODY, "cut", "cut")) as server:
        assert fetch(f"{server.url}/m") == BODY
        assert server.asked == ["", "bytes=128000-", "bytes=192000-"]


def test_a_server_that_hangs_is_left_and_asked_again(fetch):
    with serving(FileServer(BODY, "hang")) as server:
        assert fetch(f"{server.url}/m", timeouts_s=(5.0, 0.2)) == BODY
        assert server.asked == ["", "bytes=65536-"]


def test_a_server_that_knows_no_ranges_gives_it_from_the_beginning(fetch):
    with serving(FileServer(BODY, "cut", "whole")) as server:
        assert fetch(f"{server.url}/m") == BODY


def test_a_range_that_leaves_a_hole_is_not_added(fetch):
    with serving(FileServer(BODY, "cut", "hole")) as server:
        error = fetch.fails(f"{server.url}/m")
    assert error.code == "weights-digest"


def test_a_file_that_changes_on_the_way_is_begun_anew_and_then_refused(fetch):
    with serving(FileServer(BODY, "cut", "changed")) as server:
        error = fetch.fails(f"{server.url}/m")
        assert server.asked == ["", "bytes=128000-"]
    assert (error.code, hashlib.sha256(BODY[::-1]).hexdigest() in error.why) == ("weights-digest", True)


def test_what_is_cut_without_an_end_is_given_up(fetch):
    with serving(FileServer(BODY, "cut", *["503"] * 9)) as server:
        error = fetch.fails(f"{server.url}/m")
    assert isinstance(error, Unavailable)
    assert fetch.pauses == sorted(fetch.pauses)
    assert len(fetch.pauses) == 5


def test_a_server_that_is_busy_is_asked_again(fetch):
    with serving(FileServer(BODY, "503", "429", "500")) as server:
        assert fetch(f"{server.url}/m") == BODY


@pytest.mark.parametrize(
    ("status", "code"), [("404", "weights-missing"), ("401", "weights-denied"), ("403", "weights-denied")]
)
def test_a_server_that_refuses_is_not_asked_again(fetch, status, code):
    with serving(FileServer(BODY, status)) as server:
        assert fetch.fails(f"{server.url}/m").code == code
        assert len(server.asked) == 1


def test_a_server_that_is_down_is_said_by_name(fetch, free_port):
    error = fetch.fails(f"http://127.0.0.1:{free_port}/m?signature=of-mine")
    assert (error.code, error.why) == ("weights-unreachable", "Connection refused.")
    assert "of-mine" not in f"{error.message} {error.why} {error.hint}"


def test_a_server_that_says_nothing_at_all_is_given_up(fetch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = fetch.fails(f"http://127.0.0.1:{silent.getsockname()[1]}/m", timeouts_s=(5.0, 0.05))
    assert isinstance(error, Timeout)


def test_a_redirect_on_this_machine_is_followed(fetch):
    with serving(FileServer(BODY)) as end, serving(FileServer(b"", f"-> {end.url}/there")) as server:
        assert fetch(f"{server.url}/m") == BODY


def test_redirects_in_a_ring_end(fetch):
    with serving(FileServer(BODY, *["-> /again"] * 9)) as server:
        assert fetch.fails(f"{server.url}/m").code == "weights-redirects"


@pytest.mark.parametrize("target", ["http://example.invalid/x", "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_a_redirect_to_what_is_not_encrypted_is_refused(fetch, target):
    with serving(FileServer(BODY, f"-> {target}")) as server:
        assert fetch.fails(f"{server.url}/m").code == "weights-unsafe"


@pytest.mark.parametrize("address", ["10.1.2.3", "127.0.0.1", "169.254.169.254", "::1", "fd00::1"])
def test_a_redirect_from_afar_into_a_private_network_is_refused(fetch, monkeypatch, address):
    """As an answer of a public host would do it: the session is a stand-in that redirects."""

    class Answer:
        status_code, is_redirect, headers = 302, True, {"Location": "https://inside.example/latest/meta-data"}

        def close(self) -> None: ...

    class Session:
        trust_env = False

        def get(self, url, **_):
            asked.append(url)
            return Answer()

        def close(self) -> None: ...

    asked: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (address, 0))])
    error = fetch.fails("https://example.com/m", session=Session())
    assert (error.code, address in error.why) == ("weights-unsafe", True)
    assert asked == ["https://example.com/m"]


def test_no_login_of_the_builder_is_sent(fetch, tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("home")
    (home / ".netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    with serving(FileServer(BODY)) as server:
        fetch(f"{server.url}/m")
        assert "Authorization" not in server.headers[0]


def test_a_disk_without_room_is_said_before_it_is_full(fetch, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr("adapter.packaging.weights_download.shutil.disk_usage", lambda _: Usage)
    with serving(FileServer(BODY)) as server:
        error = fetch.fails(f"{server.url}/m")
    assert (isinstance(error, StorageError), error.code) == (True, "disk-full")


def test_an_address_becomes_weights(tmp_path):
    body = safetensors(a=[1.0])
    with serving(FileServer(body, "cut")) as server:
        url = f"{server.url}/net/model.safetensors?signature=of-mine"
        config = WeightsConfig(url, f"sha256:{hashlib.sha256(body).hexdigest()}")
        fetched = fetch_weights(config, tmp_path, tmp_path / "weights")
    assert (fetched.tensors, fetched.has_snapshot) == (1, True)
    assert "of-mine" not in (tmp_path / "weights" / "source.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights"]


def test_a_missing_address_leaves_nothing(tmp_path):
    with serving(FileServer(b"", "404")) as server, pytest.raises(NotFound):
        fetch_weights(
            WeightsConfig(f"{server.url}/m.safetensors", "sha256:" + "0" * 64), tmp_path, tmp_path / "weights"
        )
    assert list(tmp_path.iterdir()) == []
