"""The worker's drain, over real sockets in a thread beside the test."""

import os
import socket
import threading
from contextlib import closing

import pytest
from gunicorn.workers import gthread

from adapter.runtime.worker import Gunicorn, ModelWorker

LIMIT_S = 60
FOREVER_S = 10_000


def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


class Running:
    """A worker that serves; leaving it ends it."""

    def __init__(self):
        self._orders, self._line = os.pipe()
        self._stopping = threading.Event()
        self._worker = ModelWorker(
            Gunicorn(), app, threads=1, queue=1, exec_timeout_s=0, drain_timeout_s=FOREVER_S, on_stuck=lambda: None
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self._worker.watch(self._orders, self._stop)
        self._worker.serve(listener, [])
        self._thread = threading.Thread(target=self._worker.init_process)
        self._thread.start()

    def _stop(self):
        self._worker.stop(linger=os.read(self._orders, 1) == b"l")
        self._stopping.set()

    def stop(self, *, linger):
        """Returns once it knows."""
        os.write(self._line, b"l" if linger else b"n")
        assert self._stopping.wait(LIMIT_S)

    def ends(self):
        self._thread.join(LIMIT_S)
        return not self._thread.is_alive()

    def close(self):
        assert self.ends()
        self._worker.tmp.close()
        for descriptor in (self._orders, self._line):
            os.close(descriptor)


@pytest.fixture
def running(monkeypatch):
    monkeypatch.setattr(gthread, "STOP_KEEPALIVE_LINGER", FOREVER_S)
    with closing(Running()) as running:
        yield running


def ask(connection):
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\nok"):
        answer += connection.recv(4096)
    return answer


def test_a_stop_that_nobody_sends_after_waits_for_no_silent_connection(running):
    with socket.create_connection(running.address) as kept, socket.create_connection(running.address) as silent:
        ask(kept)
        running.stop(linger=False)
        assert running.ends()
        assert kept.recv(1) == b""
        assert silent.recv(1) == b""


def test_a_stop_that_lingers_still_answers_on_a_kept_connection(running):
    with socket.create_connection(running.address) as kept:
        ask(kept)
        running.stop(linger=True)
        assert b"Connection: close" in ask(kept)
        assert running.ends()
