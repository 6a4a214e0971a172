import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adapter.cli import state as module
from adapter.cli.state import GatewayClient, error_of, shown
from adapter.errors import ConfigError, Unavailable


@pytest.fixture
def state(state_dir):
    """The folder of a gateway that listens at http://10.1.2.3:8080."""
    for name, text in (
        ("basic-auth-user", "admin"),
        ("basic-auth-password", "hunter2\n"),
        ("gateway", "http://10.1.2.3:8080"),
    ):
        (state_dir / name).write_text(text)
    return state_dir


@pytest.fixture
def stranger(monkeypatch):
    """A gateway of somebody else, who keeps the credentials that he is sent."""
    heard = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.headers["Authorization"])
            self.send_response(200 if self.headers["Authorization"] else 401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words):
            pass

    monkeypatch.setattr(module, "_is_loopback", lambda _: False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", heard
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("url", "is_ours"),
    [
        ("http://127.0.0.1:8080", True),
        ("http://127.9.9.9:1", True),
        ("http://localhost:31112", True),
        ("http://[::1]:8080", True),
        ("http://10.1.2.3:8080/", True),
        ("http://10.1.2.3:8081", False),
        ("https://10.1.2.3:8080", False),
        ("http://10.1.2.4:8080", False),
        ("http://gateway.example", False),
        ("http://127.0.0.1.example", False),
        ("http://localhost.example", False),
        ("http://localhost@gateway.example", False),
        ("http://[nonsense", False),
    ],
)
def test_the_password_goes_only_to_the_gateway_it_belongs_to(state, url, is_ours):
    assert GatewayClient(url, state)._session.auth == (("admin", "hunter2") if is_ours else None)


def test_a_strangers_gateway_hears_nothing_and_the_user_how_to_log_in(state, stranger):
    place, heard = stranger
    with pytest.raises(Unavailable) as caught:
        GatewayClient(f"http://{place}", state).get_json("/system/functions")
    assert heard == [None]
    assert caught.value.code == "unauthorized"
    assert "http://USER:PASSWORD@HOST" in caught.value.hint


def test_a_password_in_the_address_is_sent_and_not_shown(state, stranger):
    place, heard = stranger
    url = f"http://me:s3cret@{place}"
    GatewayClient(url, state).request("GET", "/system/functions")
    assert b64decode(heard[0].removeprefix("Basic ")) == b"me:s3cret"
    assert shown(url) == f"http://{place}"
    with pytest.raises(Unavailable) as caught:
        GatewayClient("http://me:s3cret@127.0.0.1:1", state).request("GET", "/")
    assert "s3cret" not in str(vars(caught.value))


def test_a_password_that_is_no_text_is_named(state):
    (state / "basic-auth-password").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="basic-auth-password cannot be read"):
        GatewayClient("http://127.0.0.1:8080", state)


def test_no_gpu_for_a_function_ends_with_its_own_code():
    class Response:
        status_code = 503

        @staticmethod
        def json():
            return {"error": {"code": "no-node", "message": "No node had room.", "why": "", "hint": ""}}

    assert error_of(Response()).exit_code == 8
