"""What is put around the user's app: without a server, by calling it."""

import pytest

from adapter.runtime.app import Watched

SOCK = object()


def called(path="/", *, ended=False, closing=False, **headers):
    """Status, headers, the request's row of counts, and the time limits that it asked for."""
    limits = []
    watched = Watched(
        lambda _environ, start: (start("200 OK", [("Content-Length", "2")]) and [b"ok"]) or [b"ok"],
        ready_path="",
        log_call_id=False,
        on_answering=lambda _sock, _length_is_known: None,
        on_answered=lambda: None,
        on_timeout=lambda _sock, timeout_s: limits.append(timeout_s),
        was_ended=lambda _sock: ended,
    )
    watched.closing = closing
    answer = []
    environ = {"PATH_INFO": path, "REQUEST_METHOD": "GET", "gunicorn.socket": SOCK, **headers}
    body = watched(environ, lambda status, headers: answer.extend((status, dict(headers))))
    getattr(body, "close", lambda: None)()
    return answer[0], answer[1], watched.stats.to_json(), limits


def test_a_request_whose_caller_was_told_504_counts_as_such():
    assert [row["code"] for row in called(ended=True)[2]] == ["504"]
    assert [row["code"] for row in called()[2]] == ["200"]


@pytest.mark.parametrize(("text", "limits"), [("300ms", [0.3]), ("1m", [60.0]), ("soon", []), ("0s", [])])
def test_a_request_says_how_long_it_may_take(text, limits):
    assert called(HTTP_X_TIMEOUT=text)[3] == limits


@pytest.mark.parametrize("path", ["/_/health", "/_/ready", "/health/liveness", "/health/readiness"])
def test_once_it_closes_probes_say_so_and_requests_are_served(path):
    assert called(path, closing=True)[0].startswith("503")
    assert called(closing=True)[0] == "200 OK"
