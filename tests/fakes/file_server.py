"""An HTTP server on loopback that gives files, with faults in the order in which they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Gives what `pages` has at a path, else `body`; no body: 404. `faults` are taken one a request; when they are used up, all is well.

    "cut" ends the connection in the middle, "hang" says nothing more there until `go_on` is set, "whole" does not
    know ranges, "hole" answers a range with a later one, "changed" gives another file under another tag, a number is a
    status, "-> URL" a redirect. `asked` are the ranges asked for.
    """

    daemon_threads = True

    def __init__(self, body: bytes, *faults: str, pages: Mapping[str, bytes] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body = body
        self.pages = dict(pages or {})
        self.faults = list(faults)
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        fault = server.faults.pop(0) if server.faults else ""
        if not fault and self.path not in server.pages and not server.body:
            fault = "404"
        server.asked.append(self.headers.get("Range", ""))
        server.headers.append(dict(self.headers.items()))
        if fault.isdecimal() or fault.startswith("->"):
            self.send_response(int(fault) if fault.isdecimal() else 302)
            if not fault.isdecimal():
                self.send_header("Location", fault.removeprefix("->").strip())
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "changed":
            server.body = bytes(reversed(server.body))
        self._give(fault)

    def _give(self, fault: str) -> None:
        body = self.server.pages.get(self.path, self.server.body)
        tag = f'"{hash(body)}"'
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if fault == "whole" or self.headers.get("If-Range", tag) != tag:
            start = 0
        if fault == "hole":
            start += 1
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if fault in {"cut", "hang"}:
            self.wfile.write(body[start : start + (len(body) - start) // 2])
            self.wfile.flush()
            if fault == "hang":
                self.server.go_on.wait(60)
            self.close_connection = True
            return
        self.wfile.write(body[start:])

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextmanager
def serving(server: FileServer) -> Iterator[FileServer]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
