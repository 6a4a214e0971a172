"""A registry in this process: as much of the OCI distribution protocol as is used, and faults on demand.

It keeps the same contract tests as the real `docker-registry` (tests/unit/registry/test_contract.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter, deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

INDEX = "application/vnd.oci.image.index.v1+json"


class FakeRegistry:
    """`answers` are given first, one each: (status, headers). `requests` counts (method, kind of path)."""

    def __init__(self, *, has_referrers: bool = False, password: str = "", tokens: bool = False) -> None:
        self.has_referrers = has_referrers
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.answers: deque[tuple[int, dict[str, str]]] = deque()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.seen: list[tuple[str, str, str]] = []
        self.after_index = lambda: None
        self._password, self._tokens = password, tokens
        self._uploads = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that leave early are what some tests are about
        self.port = self._server.server_address[1]

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def put_manifest(self, name: str, media_type: str, raw: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        self.manifests[name] = self.manifests[digest] = (media_type, raw)
        return digest

    def referrers(self, subject: str) -> bytes:
        found = {}
        for digest, (media_type, raw) in self.manifests.items():
            data = json.loads(raw)
            if digest.startswith("sha256:") and (data.get("subject") or {}).get("digest") == subject:
                found[digest] = {
                    "mediaType": media_type, "digest": digest, "size": len(raw),
                    "artifactType": data.get("artifactType"), "annotations": data.get("annotations", {}),
                }  # fmt: skip
        return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(found.values())}).encode()

    def _challenge(self, given: str) -> str:
        """What is asked for where `given` does not open; empty where it does."""
        if not self._password:
            return ""
        basic = "Basic " + base64.b64encode(self._password.encode()).decode()
        if self._tokens:
            wanted = f'Bearer realm="http://{self.host}/token",service="fake",scope="repository:team/fn:pull,push"'
            return "" if given == "Bearer good-token" else wanted
        return "" if given == basic else 'Basic realm="fake"'

    def _handler(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args):
                pass

            def say(self, status, body=b"", **headers):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def handle_one(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                given = self.headers.get("Authorization", "")
                fake.seen.append((self.command, self.path, given))
                if parts.path == "/token":
                    basic = "Basic " + base64.b64encode(fake._password.encode()).decode()
                    good = given == basic or b"refresh_token=long-lived" in body
                    return self.say(200 if good else 401, json.dumps({"token": "good-token"}).encode())
                challenge = fake._challenge(given)
                if challenge:
                    return self.say(401, b'{"errors":[{"code":"UNAUTHORIZED"}]}', WWW_Authenticate=challenge)
                _, kind, name = ("/" + parts.path.removeprefix("/v2/team/fn/")).split("/", 2)
                fake.requests[self.command, kind] += 1
                if fake.answers:
                    status, headers = fake.answers.popleft()
                    return self.say(status, **headers)
                return getattr(self, f"do_{kind}")(name, query, body)

            def do_blobs(self, name, query, body):
                if name.startswith("uploads/") and self.command == "POST":
                    fake._uploads += 1
                    return self.say(202, Location=f"/v2/team/fn/blobs/uploads/{fake._uploads}?_state=secret-state")
                if name.startswith("uploads/"):
                    if "sha256:" + hashlib.sha256(body).hexdigest() != query["digest"]:
                        return self.say(400, b'{"errors":[{"code":"DIGEST_INVALID"}]}')
                    fake.blobs[query["digest"]] = body
                    return self.say(201)
                if name not in fake.blobs:
                    return self.say(404, b'{"errors":[{"code":"BLOB_UNKNOWN"}]}')
                data, wanted = fake.blobs[name], self.headers.get("Range", "")
                if not wanted:
                    return self.say(200, data)
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                return self.say(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")

            def do_manifests(self, name, query, body):
                if self.command == "PUT":
                    digest = fake.put_manifest(name, self.headers["Content-Type"], body)
                    subject = (json.loads(body).get("subject") or {}).get("digest")
                    headers = {"OCI_Subject": subject} if subject and fake.has_referrers else {}
                    self.say(201, Docker_Content_Digest=digest, **headers)
                    if name.startswith("sha256-"):
                        fake.after_index()
                    return None
                if name not in fake.manifests:
                    return self.say(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}')
                media_type, raw = fake.manifests[name]
                return self.say(200, raw, Content_Type=media_type)

            def do_referrers(self, name, query, body):
                if not fake.has_referrers:
                    return self.say(404, b"404 page not found")
                return self.say(200, fake.referrers(name), Content_Type=INDEX)

        for method in ("GET", "PUT", "POST", "HEAD"):
            setattr(Handler, f"do_{method}", Handler.handle_one)
        return Handler
