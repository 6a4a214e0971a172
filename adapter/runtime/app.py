"""The WSGI layer around the user's app: probes, call ids, durations, counters.

What of-watchdog's HTTP mode adds to an answer (host-framework contract: ``X-Call-Id``,
``X-Duration-Seconds``, ``/_/health``, ``/_/ready``) is added here, inside the model process, so that
no proxy stands in the way of a request.
"""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from adapter.keys import CALL_ID_HEADER, DURATION_HEADER, LIVENESS_PATHS, READINESS_PATHS
from adapter.runtime.buckets import BUCKETS_S
from adapter.runtime.front import PLAIN
from adapter.units import parse_duration_s

StartResponse = Callable[..., Any]
Wsgi = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]

_CALL_ID_LOWER = CALL_ID_HEADER.lower()
_STREAMS = ("text/event-stream", "application/x-ndjson")
"""Who accepts these gets no duration, as from of-watchdog, which hands such requests on as they are."""


class RequestStats:
    """Counts of finished requests by (method, status), with a duration histogram, and the time in which there were
    any; safe for threads."""

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._lock = threading.Lock()
        self._clock_ns = clock_ns
        self._rows: dict[tuple[str, str], _Row] = {}
        self._in_flight = 0
        self._since_ns = self._busy_ns = 0

    def begin(self) -> None:
        with self._lock:
            if not self._in_flight:
                self._since_ns = self._clock_ns()
            self._in_flight += 1

    def end(self) -> None:
        with self._lock:
            self._in_flight -= 1
            if not self._in_flight:
                self._busy_ns += self._clock_ns() - self._since_ns

    @property
    def busy_ns(self) -> int:
        """Nanoseconds with at least one request in flight, up to now."""
        with self._lock:
            return self._busy_ns + (self._clock_ns() - self._since_ns if self._in_flight else 0)

    def add(self, method: str, status: str, seconds: float) -> None:
        method = method.lower()  # as the client library that of-watchdog counts with
        at = bisect.bisect_left(BUCKETS_S, seconds)
        with self._lock:
            row = self._rows.get((method, status)) or self._rows.setdefault((method, status), _Row())
            row.seconds += seconds
            row.buckets[at] += 1

    def to_json(self) -> list[dict[str, Any]]:
        with self._lock:
            return [
                {"method": m, "code": c, "count": sum(r.buckets), "sum": r.seconds, "buckets": list(r.buckets)}
                for (m, c), r in sorted(self._rows.items())
            ]


class _Row:
    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.buckets = [0] * (len(BUCKETS_S) + 1)


class Watched:
    """Wraps the function's WSGI app; `on_answered` runs after each request."""

    def __init__(
        self,
        app: Wsgi,
        *,
        ready_path: str,
        log_call_id: bool,
        on_answering: Callable[[Any, bool], None],
        on_answered: Callable[[], None],
        on_timeout: Callable[[Any, float], None] = lambda _sock, _timeout_s: None,
        was_ended: Callable[[Any], bool] = lambda _sock: False,
    ) -> None:
        self._app = app
        self._ready_path = ready_path
        self._log_call_id = log_call_id
        self._on_answering = on_answering
        self._on_answered = on_answered
        self._on_timeout = on_timeout
        self._was_ended = was_ended
        self.closing = False
        """Probes say that no new requests should come; those that do are served."""
        self.stats = RequestStats()

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if self.closing and (path in LIVENESS_PATHS or path in READINESS_PATHS):
            return _plain(start_response, "503 Service Unavailable", b"draining")
        if path in LIVENESS_PATHS:
            return _plain(start_response, "200 OK", b"OK")
        if path in READINESS_PATHS:
            if not self._ready_path:
                return _plain(start_response, "200 OK", b"OK")
            environ.update(PATH_INFO=self._ready_path, RAW_URI=self._ready_path, QUERY_STRING="", REQUEST_METHOD="GET")
            return self._app(environ, start_response)
        return self._measured(environ, start_response)

    def _measured(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        started = time.monotonic()
        self.stats.begin()
        call_id = environ.get("HTTP_X_CALL_ID") or os.urandom(16).hex()
        environ["HTTP_X_CALL_ID"] = call_id
        status_code = "500"
        sock = environ.get("gunicorn.socket")
        accepts = environ.get("HTTP_ACCEPT", "").lower()
        is_timed = not any(kind in accepts for kind in _STREAMS)
        if timeout := environ.get("HTTP_X_TIMEOUT"):
            self._shorten(sock, timeout)

        def begin(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            nonlocal status_code
            status_code = status[:3]
            names = {name.lower() for name, _ in headers}
            self._on_answering(sock, "content-length" in names)
            if _CALL_ID_LOWER not in names:
                headers.append((CALL_ID_HEADER, call_id))
            if is_timed:
                headers.append((DURATION_HEADER, f"{time.monotonic() - started:.6f}"))
            return start_response(status, headers, exc_info) if exc_info else start_response(status, headers)

        def finish() -> None:
            nonlocal status_code
            seconds = time.monotonic() - started
            if self._was_ended(sock):
                status_code = "504"  # what the caller was told, whatever the function says since
            self.stats.add(environ["REQUEST_METHOD"], status_code, seconds)
            self.stats.end()
            self._on_answered()
            if self._log_call_id:
                print(
                    f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} - {status_code} - {call_id} ({seconds:.4f}s)"
                )

        try:
            return _Closing(self._app(environ, begin), finish)
        except BaseException:
            finish()
            raise

    def _shorten(self, sock: Any, timeout: str) -> None:
        """X-Timeout, in Go's syntax; what is none is left alone, as of-watchdog does."""
        try:
            timeout_s = parse_duration_s(timeout)
        except ValueError:
            return
        if timeout_s > 0:
            self._on_timeout(sock, timeout_s)


class _Closing:
    """A response body that calls back when the server is done with it, sent or broken off."""

    __slots__ = ("_body", "_finish")

    def __init__(self, body: Iterable[bytes], finish: Callable[[], None]) -> None:
        self._body = body
        self._finish = finish

    def __iter__(self) -> Any:
        return iter(self._body)

    def close(self) -> None:
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._finish()


def _plain(start_response: StartResponse, status: str, body: bytes) -> list[bytes]:
    start_response(status, [("Content-Type", PLAIN), ("Content-Length", str(len(body)))])
    return [body]
