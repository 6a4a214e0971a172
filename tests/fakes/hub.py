"""A model hub on loopback, as far as its own client library asks: the list of a revision, and files.

The real hub cannot be reached from where tests run. What it answers here is what the library reads: field names
and headers are the library's, so a change of the library shows; a change of the hub does not.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository ``org/net`` at the tag ``v1``. `large` are kept as the hub keeps large files.

    `token`: who wants something must have it. `statuses` are answered first, one a request. `damaged` is given
    with a byte changed, `cut` with half of its bytes, once.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes], *, large: frozenset[str] = frozenset(), token: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files)
        self.large = large
        self.token = token
        self.statuses: list[int] = []
        self.damaged: set[str] = set()
        self.cut: set[str] = set()
        self.seen: list[tuple[str, str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def etag(self, name: str) -> str:
        body = self.files[name]
        if name in self.large:
            return hashlib.sha256(body).hexdigest()
        return hashlib.sha1(f"blob {len(body)}\0".encode() + body, usedforsecurity=False).hexdigest()

    def info(self) -> bytes:
        siblings = []
        for name, body in self.files.items():
            item: dict[str, object] = {"rfilename": name, "size": len(body), "blobId": self.etag(name)}
            if name in self.large:
                item["blobId"] = "0" * 40
                item["lfs"] = {"sha256": self.etag(name), "size": len(body), "pointerSize": 134}
            siblings.append(item)
        return json.dumps({"id": "org/net", "sha": COMMIT, "siblings": siblings, "tags": []}).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server, unquote(self.path.partition("?")[0])
        login = self.headers.get("Authorization", "")
        hub.seen.append((self.command, path, login))
        if hub.statuses:
            return self._give(hub.statuses.pop(0), b"{}")
        if hub.token and login != f"Bearer {hub.token}":
            return self._give(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        for revision in ("v1", COMMIT):
            if path == f"/api/models/org/net/revision/{revision}":
                return self._give(200, hub.info())
            name = path.removeprefix(f"/org/net/resolve/{revision}/")
            if name != path and name in hub.files:
                return self._file(name)
        if path.startswith(("/api/models/org/net/revision/", "/org/net/resolve/")):
            kind = "RevisionNotFound" if path.startswith("/api/") else "EntryNotFound"
            return self._give(404, b"{}", **{"X-Error-Code": kind})
        return self._give(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        hub, body = self.server, self.server.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if name in hub.damaged:
            body = body[:-1] + bytes([body[-1] ^ 1])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.etag(name)}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        is_cut = name in hub.cut and self.command == "GET"
        hub.cut -= {name} if is_cut else set()
        self._give(206 if start else 200, body[start:], is_cut=is_cut, **headers)

    def _give(self, status: int, body: bytes, *, is_cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection = self.close_connection or is_cut

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
