"""The load generator against a server of known behaviour."""

import socketserver
import threading
from contextlib import contextmanager

from benchmarks.load import Load, request_bytes, run_load, send_at_once

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nping\r\n3\r\n-po\r\n0\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\npong"
FAILED = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"


@contextmanager
def serving(answer: bytes):
    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while line := self.rfile.readline():
                length = int(line.split(b":")[1]) if line.lower().startswith(b"content-length") else None
                if length is not None:
                    while self.rfile.readline().strip():
                        pass
                    self.rfile.read(length)
                    self.wfile.write(answer)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 256

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def test_connections_are_kept_and_right_answers_counted():
    with serving(WHOLE) as port:
        load = run_load(port, request_bytes("/", b"x"), connections=2, seconds=0.05, expected=b"pong")
    assert load.latencies_s
    assert not load.wrong


def test_chunked_answers_are_put_together():
    with serving(CHUNKED) as port:
        assert send_at_once(port, [request_bytes("/", b"x")], 5) == [(200, b"ping-po")]


def test_other_answers_are_wrong_ones():
    for answer, expected in ((FAILED, None), (WHOLE, b"something else")):
        with serving(answer) as port:
            load = run_load(port, request_bytes("/", b""), connections=1, seconds=0.02, expected=expected)
        assert load.wrong
        assert not load.latencies_s


def test_a_peer_that_is_not_there_is_told_not_raised(free_port):
    (outcome,) = send_at_once(free_port, [request_bytes("/", b"")], 5)
    assert isinstance(outcome, str)


def test_many_at_once_are_all_answered():
    with serving(WHOLE) as port:
        assert send_at_once(port, [request_bytes("/", b"x", close=True)] * 100, 20) == [(200, b"pong")] * 100


def test_quantiles_and_rates():
    load = Load(2.0, [i / 100 for i in range(100)])
    assert load.rps == 50
    assert load.quantile_s(0.99) == 0.99
    assert load.quantile_s(0) == 0
