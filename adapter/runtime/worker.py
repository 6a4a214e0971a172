"""gunicorn's threaded worker, without gunicorn's master: the entrypoint is the master.

It differs from `gunicorn.workers.gthread.ThreadWorker` in four things: connections can be handed in and
given back (SCM_RIGHTS), the number of waiting requests has a bound (429), probes are answered while all
threads are busy, and a request that takes too long is answered with 504 while its thread goes on.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import TConn, ThreadWorker

from adapter.errors import Overloaded, Timeout
from adapter.keys import LIVENESS_PATHS, READINESS_PATHS
from adapter.runtime.front import answer, error_answer, request_method, request_path

_STUCK_AFTER_S = 1.0
"""A thread whose request was ended (its socket shut down) and that has not come back by then hangs."""

_TICK_S = 0.1
"""How exactly `exec_timeout` is kept, and how often the loop looks for requests past it while some run."""


class _Log(Logger):  # type: ignore[misc]
    def close_on_exec(self) -> None:
        """Nothing: it would touch every logger of the process (torch has hundreds), and none of ours is a file."""


class Gunicorn(BaseApplication):  # type: ignore[misc]
    """gunicorn's settings and log. Making them takes milliseconds: before the snapshot point they cost no wake."""

    def __init__(self) -> None:
        super().__init__()
        self.log = _Log(self.cfg)
        self.wsgi_app: Callable[..., Any] | None = None

    def load_config(self) -> None:
        settings = {
            "worker_connections": 100_000,  # bounded by `queue`, not by connections
            "keepalive": 75,
            "loglevel": "error",
            "limit_request_line": 8190,  # gunicorn's most
            "accesslog": None,
            "worker_tmp_dir": "/dev/shm",  # noqa: S108  # memory, where gunicorn wants its heartbeat file
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def wsgi(self) -> Callable[..., Any]:
        assert self.wsgi_app is not None
        return self.wsgi_app

    load = wsgi


class ModelWorker(ThreadWorker):  # type: ignore[misc]
    """Serves one WSGI app from threads. `init_process` blocks until it is drained."""

    def __init__(
        self,
        gunicorn: Gunicorn,
        wsgi: Callable[..., Any],
        *,
        threads: int,
        queue: int,
        exec_timeout_s: float,
        drain_timeout_s: float,
        on_stuck: Callable[[str], None],
        on_refused: Callable[[str], None] = lambda _method: None,
    ) -> None:
        gunicorn.wsgi_app = wsgi
        gunicorn.cfg.set("threads", threads)
        gunicorn.cfg.set("graceful_timeout", int(drain_timeout_s) + 1)
        super().__init__(0, 0, [], gunicorn, 0, gunicorn.cfg, gunicorn.log)
        self._threads = threads
        self._queue = queue
        self._exec_timeout_s = exec_timeout_s
        self._on_stuck = on_stuck
        self._on_refused = on_refused
        self._running: dict[TConn, float] = {}  # connections in the pool -> deadline, 0 for none
        self._limits_s: dict[TConn, float] = {}  # what their deadlines were counted from
        self._channel_events: list[tuple[int, Callable[[], None]]] = []
        self._look_again_at = 0.0
        self._overdue: dict[TConn, float] = {}  # connections whose request was ended -> when
        self.answering: set[socket.socket] = set()
        """Sockets on which an answer has begun: nothing of ours may be written between."""
        self.ending: set[socket.socket] = set()
        """Those of them whose answer has a known length, and so ends by itself: their threads are as good as free."""
        self.paused = False
        self.closing = False
        """As `Watched.closing`, for probes that are answered here."""
        self._lingers = True

    @property
    def nr_conns(self) -> int:
        """All connections. gunicorn counts on its own, and counts one twice whose answer broke off."""
        return len(self._running) + len(self.keepalived_conns) + len(self.pending_conns)

    @nr_conns.setter
    def nr_conns(self, count: int) -> None:
        pass

    # What an arbiter would do -------------------------------------------------------------------

    def init_signals(self) -> None:
        """The model process keeps its signals: the entrypoint says what to do over the channel."""

    def notify(self) -> None:
        """There is no arbiter to notify; the tick is used to end requests that take too long."""
        self._end_overdue()
        if not self.alive:
            self.murder_pending()

    def is_parent_alive(self) -> bool:
        return True  # the channel's end says so

    # Sockets ------------------------------------------------------------------------------------

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """Call `callback` on the main thread when `descriptor` is readable."""
        self._channel_events.append((descriptor, callback))
        if self.poller is not None:
            self._register_channel()

    def _register_channel(self) -> None:
        for descriptor, callback in self._channel_events:
            self.poller.register(descriptor, selectors.EVENT_READ, lambda _fileobj, call=callback: call())
        self._channel_events.clear()

    def serve(self, listener: socket.socket | None, connections: list[socket.socket]) -> None:
        """Take the listener and connections that were accepted elsewhere; those have passed a bound already."""
        if listener is not None:
            self.sockets = [listener]
            self._accepting = False  # the loop sees that and registers it
            self.paused = False
        for connection in connections:
            conn = self._connection(connection)
            if conn is not None:
                self._await_data(conn) if not _has_data(connection) else super().enqueue_req(self._timed(conn))

    def _connection(self, connection: socket.socket) -> TConn | None:
        try:
            conn = TConn(self.cfg, connection, connection.getpeername(), connection.getsockname())
        except OSError:  # its client is gone
            connection.close()
            return None
        self.nr_conns += 1
        return conn

    def give_back(self) -> list[socket.socket]:
        """Stop accepting and let go of every connection on which no request is being handled."""
        self.paused = True
        self.set_accept_enabled(False)
        for listener in self.sockets:
            listener.close()
        self.sockets = []
        idle = [*self.keepalived_conns, *self.pending_conns]
        self.keepalived_conns.clear()
        self.pending_conns.clear()
        for conn in idle:
            self.poller.unregister(conn.sock)
            self.nr_conns -= 1
        return [conn.sock for conn in idle]

    def stop(self, *, linger: bool) -> None:
        """Drain: finish what runs, then return from `init_process`.

        `linger`: a request may still come on a kept connection (gunicorn waits two seconds for one). Without it
        nobody sends more, so that silent connections are closed at once.
        """
        self._lingers = linger
        self.alive = False

    def _cap_keepalive(self, deadline: float) -> None:
        deadline = deadline if self._lingers else time.monotonic()
        super()._cap_keepalive(deadline)
        for conn in self.pending_conns:
            conn.timeout = min(conn.timeout, deadline)

    @property
    def in_flight(self) -> int:
        """Requests being handled or waiting for a thread."""
        return len(self._running)

    @property
    def busy(self) -> int:
        """As `in_flight`, without requests that are answered but for the last bytes: who has these may send the next."""
        return max(0, len(self._running) - len(self.ending))

    def run(self) -> None:
        self._register_channel()
        super().run()

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled and not self.paused)

    def accept(self, listener: socket.socket) -> None:
        """A new connection gets a thread once it has said something: silence must not hold one."""
        try:
            connection, _ = listener.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                self._on_stuck("It has no file descriptor left for a connection: something leaks them.")
            return
        conn = self._connection(connection)
        if conn is None:
            return
        if not _has_data(connection):
            self._await_data(conn)
        elif _is_over(connection):  # a probe that only connects; asked last, since its end may come any moment
            conn.close()
        else:
            conn.data_ready = True
            self.enqueue_req(conn)

    def _await_data(self, conn: TConn) -> None:
        conn.sock.setblocking(False)
        conn.timeout = time.monotonic() + self.cfg.keepalive
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    # A connection that its client has closed is no request: it must not take the place of one.

    def on_client_socket_readable(self, conn: TConn, client: socket.socket) -> None:
        if not self._closed_over(conn, self.keepalived_conns):
            super().on_client_socket_readable(conn, client)

    def on_pending_socket_readable(self, conn: TConn, client: socket.socket) -> None:
        if not self._closed_over(conn, self.pending_conns):
            super().on_pending_socket_readable(conn, client)

    def _closed_over(self, conn: TConn, among: deque[TConn]) -> bool:
        if not _is_over(conn.sock):
            return False
        self.poller.unregister(conn.sock)
        among.remove(conn)
        conn.close()
        return True

    # Requests -----------------------------------------------------------------------------------

    def enqueue_req(self, conn: TConn) -> None:
        busy = self.busy
        if busy >= self._threads or not self._queue:  # only then is it worth looking before a thread does
            path = _peeked_path(conn)
            if path in LIVENESS_PATHS:
                return self._end(conn, answer(503, b"draining") if self.closing else answer(200, b"OK"))
            if path in READINESS_PATHS and (self.closing or busy >= self._threads):
                return self._end(conn, answer(503, b"draining") if self.closing else answer(429, b"busy"))
            if path in READINESS_PATHS:
                self.ending.add(conn.sock)  # it takes nobody's place
            elif busy >= self._threads + self._queue:
                self._on_refused(request_method(_peek(conn)))
                return self._end(conn, _too_many(self._threads, self._queue))
        super().enqueue_req(self._timed(conn))
        return None

    def _timed(self, conn: TConn) -> TConn:
        conn.data_ready = True
        self._running[conn] = 0.0
        return conn

    def handle(self, conn: TConn) -> Any:
        if self._exec_timeout_s:
            self._limits_s[conn] = self._exec_timeout_s
            self._running[conn] = time.monotonic() + self._exec_timeout_s
        return super().handle(conn)

    def shorten(self, sock: socket.socket, timeout_s: float) -> None:
        """The request on `sock`, which has just begun, gets less time than `exec_timeout`; never more."""
        if not 0 < timeout_s < self._exec_timeout_s:
            return
        for conn, deadline in list(self._running.items()):
            if conn.sock is sock and deadline:
                self._limits_s[conn] = timeout_s
                self._running[conn] = time.monotonic() + timeout_s

    def was_ended(self, sock: socket.socket) -> bool:
        """Whether the request on `sock` took too long, and its caller was told so."""
        return any(conn.sock is sock for conn in list(self._overdue))

    def finish_request(self, conn: TConn, fs: Any) -> None:
        self._running.pop(conn, None)
        self._overdue.pop(conn, None)
        self._limits_s.pop(conn, None)
        self.answering.discard(conn.sock)
        self.ending.discard(conn.sock)
        super().finish_request(conn, fs)
        if not self.alive and not self._lingers:
            self._cap_keepalive(time.monotonic())

    def _end_overdue(self) -> None:
        now = time.monotonic()
        if now < self._look_again_at:
            return
        self._look_again_at = now + _TICK_S
        for conn, deadline in list(self._running.items()):
            if not deadline or now < deadline:
                continue
            self._running[conn] = 0.0
            self._overdue[conn] = now
            limit_s = self._limits_s.get(conn, self._exec_timeout_s)
            error = Timeout(
                f"The function did not answer within {limit_s:g} s.",
                why="exec_timeout, or the request's X-Timeout, ends a request that takes longer.",
                hint="Raise limits.exec_timeout in gpufn.toml, or stream the answer.",
                code="exec-timeout",
            )
            _send_last(conn.sock, b"" if conn.sock in self.answering else error_answer(error, seconds=limit_s))
        hanging = sum(since < now - _STUCK_AFTER_S for since in self._overdue.values())
        if hanging >= self._threads:  # nobody is left to handle anything
            self._on_stuck("Every thread of it is past exec_timeout.")

    def _end(self, conn: TConn, last_words: bytes) -> None:
        self.nr_conns -= 1
        _send_last(conn.sock, last_words)
        conn.sock.close()

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        watching = self._exec_timeout_s and (self._running or self._overdue)
        super().wait_for_and_dispatch_events(min(timeout, _TICK_S) if watching else timeout)


def _has_data(connection: socket.socket) -> bool:
    try:
        connection.setblocking(False)
        return bool(connection.recv(1, socket.MSG_PEEK)) or True  # the end of the stream counts: gunicorn closes it
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


def _is_over(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return False  # nothing yet, or an error that whoever reads will meet


def _peek(conn: TConn) -> bytes:
    try:
        return bytes(conn.sock.recv(8192, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return b""


def _peeked_path(conn: TConn) -> str:
    return request_path(_peek(conn)) or ""


def _send_last(sock: socket.socket, words: bytes) -> None:
    """Send and shut down, whatever state the client is in; the descriptor stays its owner's."""
    try:
        sock.setblocking(False)
        sock.recv(65536)
    except OSError:
        pass
    try:
        sock.send(words)
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _too_many(threads: int, queue: int) -> bytes:
    error = Overloaded(
        "This replica is at its limit.",
        why=f"{threads} requests are being handled and {queue} wait.",
        hint="Retry, allow more replicas (scale.max) or more at once (scale.in_flight).",
        code="in-flight-limit",
        retry_after_s=1,
    )
    body = error_answer(error)
    return body.replace(b"503 Service Unavailable", b"429 Too Many Requests", 1)
