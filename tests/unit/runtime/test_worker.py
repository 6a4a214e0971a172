"""The worker's drain, over real sockets in a thread beside the test."""

import io
import os
import socket
import sys
import threading
from contextlib import closing

import pytest
from gunicorn.workers import gthread

from adapter.runtime.worker import Gunicorn, ModelWorker

LIMIT_S = 60
FOREVER_S = 10_000


may_answer = threading.Event()


def app(environ, start_response):
    """Reads the body; hangs at ``/hang`` until `may_answer`, breaks off in its answer at ``/break``."""
    environ["wsgi.input"].read()
    if environ["PATH_INFO"] == "/hang":
        may_answer.wait(LIMIT_S)
    start_response("200 OK", [("Content-Length", "2")])
    return broken() if environ["PATH_INFO"] == "/break" else [b"ok"]


def broken():
    yield b"o"
    raise RuntimeError("broken off")


class Running:
    """A worker that serves; leaving it ends it."""

    def __init__(self, *, exec_timeout_s=0):
        self.stuck = []
        self.is_stuck = threading.Event()
        self._orders, self._line = os.pipe()
        self._stopping = threading.Event()
        self._worker = ModelWorker(
            Gunicorn(),
            app,
            threads=1,
            queue=1,
            exec_timeout_s=exec_timeout_s,
            drain_timeout_s=FOREVER_S,
            on_stuck=self._on_stuck,
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self._worker.watch(self._orders, self._stop)
        self._worker.serve(listener, [])
        self._thread = threading.Thread(target=self._worker.init_process)
        self._thread.start()

    def _on_stuck(self, reason):
        self.stuck.append(reason)
        self.is_stuck.set()

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


def ask(connection, path="/"):
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
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


def test_a_drain_waits_for_a_running_answer_after_another_broke_off(running, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # the worker logs what broke
    with socket.create_connection(running.address) as breaks, socket.create_connection(running.address) as hangs:
        breaks.sendall(b"GET /break HTTP/1.1\r\nHost: x\r\n\r\n")
        while breaks.recv(4096):
            pass
        hangs.sendall(b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n")
        running.stop(linger=False)
        may_answer.set()
        assert hangs.recv(4096).startswith(b"HTTP/1.1 200")
        may_answer.clear()


def test_an_upload_that_stalls_is_ended_and_is_no_hanging_thread():
    with closing(Running(exec_timeout_s=0.1)) as running:
        with socket.create_connection(running.address) as stalled:
            stalled.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nsome")
            assert b" 504 " in stalled.recv(4096)
        with socket.create_connection(running.address) as other:
            assert b"200 OK" in ask(other)
        running.stop(linger=False)
        assert running.stuck == []


def test_threads_that_do_not_come_back_are_reported():
    with closing(Running(exec_timeout_s=0.1)) as running:
        with socket.create_connection(running.address) as hangs:
            hangs.sendall(b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 504 " in hangs.recv(4096)
        assert running.is_stuck.wait(LIMIT_S)
        may_answer.set()
        running.stop(linger=False)
        may_answer.clear()
    assert "exec_timeout" in running.stuck[0]
