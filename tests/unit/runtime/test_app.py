"""What is put around the user's app: without a server, by calling it."""

import pytest

from adapter.runtime.app import RequestStats, Watched
from adapter.runtime.metrics import Metrics

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


def test_busy_time_is_that_with_any_request_in_flight_counted_once():
    now_ns = 100
    stats = RequestStats(lambda: now_ns)
    for step_ns, what in ((0, stats.begin), (5, stats.begin), (5, stats.end), (5, stats.end), (1000, stats.begin)):
        now_ns += step_ns
        what()
    now_ns += 7
    assert stats.busy_ns == 15 + 7


def test_probes_are_no_busy_time_and_requests_end_it():
    watched = Watched(
        lambda _environ, start: start("200 OK", []) or [b"ok"],
        ready_path="", log_call_id=False, on_answering=lambda _sock, _known: None, on_answered=lambda: None,
    )  # fmt: skip
    environ = {"REQUEST_METHOD": "GET", "gunicorn.socket": SOCK}
    watched(environ | {"PATH_INFO": "/_/health"}, lambda _status, _headers: None)
    assert watched.stats.busy_ns == 0
    body = watched(environ | {"PATH_INFO": "/"}, lambda _status, _headers: None)
    assert 0 < watched.stats.busy_ns < watched.stats.busy_ns
    body.close()
    assert watched.stats.busy_ns == watched.stats.busy_ns


def test_without_a_model_process_nobody_says_how_long_it_was_busy():
    metrics = Metrics("embed", "default")
    assert "gpufn_busy_seconds_total 1.5" in list(metrics._lines([], 0, 1_500_000_000))
    assert not [line for line in metrics._lines([], 0, None) if "busy" in line]
