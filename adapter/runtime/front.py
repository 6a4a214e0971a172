"""The entrypoint's side of the port: holds requests until a model process takes them.

A connection is only looked at (MSG_PEEK), never read, before it is known whose it is: probes are
answered here, everything else is kept as it arrived and goes to the model process byte for byte.
"""

from __future__ import annotations

import json
import selectors
import socket
from collections.abc import Callable

from adapter.errors import AdapterError, Overloaded, Timeout
from adapter.keys import DURATION_HEADER, LIVENESS_PATHS, READINESS_PATHS

_LONGEST_REQUEST_LINE = 8192
PLAIN = "text/plain; charset=utf-8"
_REASONS = {200: "OK", 429: "Too Many Requests", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}


def answer(status: int, body: bytes, *, kind: str = PLAIN, headers: dict[str, str] | None = None) -> bytes:
    """A whole HTTP/1.1 answer that ends its connection."""
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
    ]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def error_answer(error: AdapterError, *, seconds: float | None = None) -> bytes:
    """503, since a replica that cannot take a request now is unavailable; 504 where time ran out, after `seconds`."""
    status = 504 if isinstance(error, Timeout) else 503
    headers = {"X-OpenFaaS-Internal": "gpufn"}
    if seconds is not None:
        headers[DURATION_HEADER] = f"{seconds:.6f}"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return answer(status, json.dumps(error.to_json()).encode(), kind="application/json", headers=headers)


def request_method(peeked: bytes) -> str:
    """The method of a request line."""
    return peeked.partition(b" ")[0].decode("latin-1")


def request_path(peeked: bytes) -> str | None:
    """The path of a request line, without its query; None while the line is not complete.

    What is no request line gives an empty path: the model process's HTTP parser will refuse it.
    """
    line, found, _ = peeked.partition(b"\n")
    if not found:
        return "" if len(peeked) >= _LONGEST_REQUEST_LINE else None
    words = line.split()
    return words[1].split(b"?", 1)[0].decode("latin-1") if len(words) == 3 else ""


class Front:
    """Listener and held connections. `probe(path)` gives the answer to a probe, `refuse()` an error or None."""

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        limit: int,
        *,
        probe: Callable[[bool], bytes],
        refuse: Callable[[], AdapterError | None],
        on_held: Callable[[], None],
    ) -> None:
        self.listener = listener
        self.listener.setblocking(False)
        self._selector = selector
        self._limit = limit
        self._probe = probe
        self._refuse = refuse
        self._on_held = on_held
        self._quiet: dict[socket.socket, None] = {}  # no whole request line yet, in order of arrival
        self.held: dict[socket.socket, None] = {}  # requests that wait for a model process
        self._accepting = False

    def accept_here(self, wanted: bool) -> None:
        """Whether this process accepts; the model process does while it serves."""
        if wanted and not self._accepting:
            self._selector.register(self.listener, selectors.EVENT_READ, self._accept)
        elif not wanted and self._accepting:
            self._selector.unregister(self.listener)
        self._accepting = wanted

    def adopt(self, connection: socket.socket) -> None:
        """Look after a connection: a new one, or one that a parking model process gave back."""
        connection.setblocking(False)
        self._quiet[connection] = None
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._look(connection))

    def take_all(self) -> list[socket.socket]:
        """Every connection, requests first in order of arrival; the caller owns them from here on."""
        for connection in [*self._quiet, *self.held]:
            self._forget(connection)
        taken = [*self.held, *self._quiet]
        self.held.clear()
        self._quiet.clear()
        return taken

    def refuse_held(self, error: AdapterError) -> int:
        """Answer every held request with `error`; returns how many there were."""
        connections = list(self.held)
        for connection in connections:
            self._end(connection, error_answer(error))
        return len(connections)

    def close(self) -> None:
        self.accept_here(False)
        for connection in self.take_all():
            connection.close()
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # drained, or the client is gone again
                return
            self.adopt(connection)
            self._look(connection)

    def _look(self, connection: socket.socket) -> None:
        try:
            peeked = connection.recv(_LONGEST_REQUEST_LINE, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            peeked = b""
        if not peeked:
            return self._end(connection)
        path = request_path(peeked)
        if path is None:
            return None
        if path in LIVENESS_PATHS or path in READINESS_PATHS:
            return self._end(connection, self._probe(path in READINESS_PATHS))
        return self._hold(connection)

    def _hold(self, connection: socket.socket) -> None:
        error = self._refuse()
        if error is None and len(self.held) >= self._limit:
            error = Overloaded(
                "Too many requests wait for this function to start.",
                why=f"{self._limit} are held already.",
                hint="Retry later, or raise GPUFN_HELD.",
                code="held-limit",
                retry_after_s=1,
            )
        if error is not None:
            return self._end(connection, error_answer(error))
        self._forget(connection)  # readable all the time from now on
        del self._quiet[connection]
        self.held[connection] = None
        self._on_held()
        return None

    def _end(self, connection: socket.socket, last_words: bytes = b"") -> None:
        self._forget(connection)
        self._quiet.pop(connection, None)
        self.held.pop(connection, None)
        if last_words:
            try:
                connection.recv(65536)  # unread bytes would turn the close into a reset that eats the answer
                connection.send(last_words)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        connection.close()

    def _forget(self, connection: socket.socket) -> None:
        try:
            self._selector.unregister(connection)
        except KeyError:
            pass
