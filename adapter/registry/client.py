"""A client of the OCI distribution protocol: manifests, blobs and referrers of one repository.

What is cut is sent or fetched again, a blob from the byte where it was cut; what the registry or the network
cannot do for the moment is tried again after a pause. Whatever is asked for by digest is checked against it.
Nothing is held in memory beyond what the caller says is the most. Errors name the registry, never an address
with what may be secret in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urljoin, urlsplit

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies

from adapter.errors import AdapterError, ConfigError, NotFound, Overloaded, SnapshotCorrupt, Timeout, Unavailable
from adapter.registry.credentials import Credentials
from adapter.registry.login import Login, refused
from adapter.registry.reference import Reference, is_digest

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_DOCKER_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
_DOCKER_INDEX_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"
_INDEX_TYPES = frozenset({INDEX_TYPE, _DOCKER_INDEX_TYPE})
_ACCEPT = f"{MANIFEST_TYPE}, {INDEX_TYPE}, {_DOCKER_MANIFEST_TYPE}, {_DOCKER_INDEX_TYPE}"

MANIFEST_LIMIT_BYTES = 4 * 2**20
"""The most that the specification asks a registry to take."""

_TIMEOUTS_S = (10.0, 30.0)
"""To connect, and without a byte."""
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.2
_PAUSE_LIMIT_S = 30.0
_PIECE_BYTES = 2**17
_PASSING = frozenset({429, 500, 502, 503, 504})
_PAGES_LIMIT = 20
_PAGE_LINK = re.compile(r'<([^>]+)>\s*;\s*rel="?next"?')
_DECLARED_RANGE = re.compile(r"bytes (\d+)-")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest says of another blob or manifest."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Any) -> Descriptor:
        """Raises `SnapshotCorrupt` for what is none."""
        if not isinstance(data, dict) or not is_digest(data.get("digest")):
            raise SnapshotCorrupt("A descriptor has no usable digest.", code="bad-artifact")
        size, media_type = data.get("size"), data.get("mediaType")
        if type(size) is not int or size < 0 or not isinstance(media_type, str):
            raise SnapshotCorrupt("A descriptor has no usable size and media type.", code="bad-artifact")
        annotations = data.get("annotations")
        texts = annotations.items() if isinstance(annotations, dict) else ()
        return cls(
            media_type,
            data["digest"],
            size,
            str(data.get("artifactType") or ""),
            {str(name): value for name, value in texts if isinstance(value, str)},
        )

    def to_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            said["artifactType"] = self.artifact_type
        if self.annotations:
            said["annotations"] = dict(self.annotations)
        return said


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest as the registry has it: its descriptor, its bytes and what they say."""

    descriptor: Descriptor
    raw: bytes
    data: dict[str, Any]


@dataclass
class Traffic:
    """Bytes of blobs and manifests that came and went, failed attempts included."""

    received_bytes: int = 0
    sent_bytes: int = 0
    requests: int = 0


class _Growing(Protocol):
    """Where the bytes of a blob go, in order."""

    def __len__(self) -> int: ...
    def __iadd__(self, piece: Any, /) -> Any: ...


class _Written:
    """Bytes that are somewhere else by now."""

    def __init__(self, write: Callable[[memoryview], None]) -> None:
        self._write = write
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iadd__(self, piece: Any) -> _Written:
        self._write(memoryview(piece))
        self._count += len(piece)
        return self


class Client:
    """One repository of a registry. Safe to share between as many threads as `connections`.

    Every method raises `Unavailable` (down, or refuses), `Overloaded` (429 to the end), `Timeout`, and
    `NotFound` for what is not there.
    """

    def __init__(
        self,
        reference: Reference,
        credentials: Credentials | None = None,
        *,
        plain_http: bool = False,
        connections: int = 8,
        timeouts_s: tuple[float, float] = _TIMEOUTS_S,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.reference = reference
        self.traffic = Traffic()
        scheme = "http" if plain_http or reference.is_local else "https"
        self._base = f"{scheme}://{reference.api_host}"
        self._timeouts_s = timeouts_s
        self._pause = pause
        self._session = requests.Session()
        self._session.trust_env = False  # else ~/.netrc would be sent; what we want of the environment follows
        if not reference.is_local:
            self._session.proxies = dict(get_environ_proxies(self._base))
            self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or True
        for prefix in ("http://", "https://"):
            self._session.mount(prefix, HTTPAdapter(pool_connections=4, pool_maxsize=connections))
        self._login = Login(self._base, credentials, self._exchange, reference.host)
        self._session.auth = self._login
        logging.getLogger("urllib3").setLevel(logging.INFO)  # below that it logs addresses with what is secret in them

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Manifests

    def get_manifest(self, wanted: str, accept: str = _ACCEPT) -> Manifest:
        """The manifest or index at a tag or digest."""
        raw, response = self._read(f"manifests/{wanted}", headers={"Accept": accept})
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        if is_digest(wanted) and digest != wanted:
            raise _not_as_asked(self._where, wanted)
        data = _json_object(raw, self._where)
        media_type = str(data.get("mediaType") or response.headers.get("Content-Type", "").partition(";")[0])
        return Manifest(Descriptor(media_type, digest, len(raw)), raw, data)

    def put_manifest(self, name: str, data: Mapping[str, Any]) -> tuple[Descriptor, bool]:
        """Store a manifest under a tag, or under its own digest where `name` is empty.

        Returns its descriptor, and whether the registry keeps track of its subject.
        """
        raw = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
        if len(raw) > MANIFEST_LIMIT_BYTES:
            raise ConfigError("The manifest is larger than a registry takes.", code="too-large")
        descriptor = Descriptor(str(data["mediaType"]), "sha256:" + hashlib.sha256(raw).hexdigest(), len(raw))
        headers = {"Content-Type": descriptor.media_type}
        response = self._ask("PUT", f"manifests/{name or descriptor.digest}", data=raw, headers=headers, ok=(201, 202))
        self.traffic.sent_bytes += len(raw)
        return descriptor, bool(response.headers.get("OCI-Subject"))

    def resolve(self, architecture: str) -> Descriptor:
        """The image manifest that the reference means: of an index, the one for Linux on `architecture`."""
        manifest = self.get_manifest(self.reference.wanted)
        if manifest.descriptor.media_type not in _INDEX_TYPES:
            return manifest.descriptor
        entries = manifest.data.get("manifests")
        for entry in entries if isinstance(entries, list) else ():
            platform = entry.get("platform") if isinstance(entry, dict) else None
            if isinstance(platform, dict) and (platform.get("os"), platform.get("architecture")) == (
                "linux",
                architecture,
            ):
                return self.get_manifest(Descriptor.from_json(entry).digest).descriptor
        raise NotFound(
            f"{self.reference} has no image for linux/{architecture}.",
            why="It is an index of images for other platforms.",
            code="no-image",
        )

    # Referrers

    def referrers(self, subject: str, artifact_type: str) -> list[Descriptor]:
        """Manifests of one type whose subject is the manifest with the digest `subject`; none where none is known."""
        entries = self._referrers_by_api(subject, artifact_type)
        if entries is None:
            entries = self._referrers_by_tag(subject)
        return [entry for entry in entries if entry.artifact_type == artifact_type]

    def _referrers_by_api(self, subject: str, artifact_type: str) -> list[Descriptor] | None:
        """None where the registry has no such thing."""
        found: list[Descriptor] = []
        path, query = f"referrers/{subject}", {"artifactType": artifact_type}
        for _ in range(_PAGES_LIMIT):
            try:
                raw, response = self._read(path, params=query)
            except NotFound:
                return None
            if INDEX_TYPE not in response.headers.get("Content-Type", ""):
                return None
            found += _entries(_json_object(raw, self._where))
            link = _PAGE_LINK.search(response.headers.get("Link", ""))
            if link is None:
                break
            path, query = urljoin(response.url, link[1]), {}
        return found

    def _referrers_by_tag(self, subject: str) -> list[Descriptor]:
        try:
            return _entries(self.get_manifest(_tag_of(subject), INDEX_TYPE).data)
        except NotFound:
            return []

    def add_referrer(self, subject: str, referrer: Descriptor, replaces: Callable[[Descriptor], bool]) -> None:
        """Enter `referrer` into the index at the tag of `subject`, where the registry has no referrers of its own.

        Entries for which `replaces` is true go. Two that do this at once may each overwrite the other's entry: it
        is read again afterwards, and entered again where it is missing. Raises `Unavailable` where that goes on.
        """
        for attempt in range(_ATTEMPTS):
            others = [e for e in self._referrers_by_tag(subject) if e.digest != referrer.digest and not replaces(e)]
            index = {
                "schemaVersion": 2,
                "mediaType": INDEX_TYPE,
                "manifests": [entry.to_json() for entry in (*others, referrer)],
            }
            self.put_manifest(_tag_of(subject), index)
            if any(entry.digest == referrer.digest for entry in self._referrers_by_tag(subject)):
                return
            self._wait(attempt, None)
        raise Unavailable(
            f"The list of snapshots at {self._where} does not keep a new entry.",
            why="Others write to it at the same time.",
            hint="Push again.",
            code="referrers-contended",
        )

    # Blobs

    def has_blob(self, digest: str) -> bool:
        try:
            self._ask("HEAD", f"blobs/{digest}")
            return True
        except NotFound:
            return False

    def push_blob(self, digest: str, data: bytes) -> None:
        """Store a blob that is not there yet."""
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            started = self._ask("POST", "blobs/uploads/", ok=(202,))
            target = self._own(urljoin(started.url, started.headers.get("Location", "")))
            target += f"{'&' if urlsplit(target).query else '?'}digest={digest}"
            headers = {"Content-Type": "application/octet-stream"}
            try:
                self._ask("PUT", target, data=data, headers=headers, ok=(201,), attempts=1)
            except (NotFound, Overloaded, Timeout, Unavailable) as error:
                # A broken upload cannot be trusted to go on: it begins anew, and is small.
                if last or error.code == "registry-denied":
                    raise
                self._wait(attempt, error.retry_after_s)
                continue
            finally:
                self.traffic.sent_bytes += len(data)
            return

    def get_blob(self, digest: str, size: int) -> bytearray:
        """The blob of exactly `size` bytes. A cut connection goes on where it was cut.

        Raises `SnapshotCorrupt` where it is longer, or is not what the digest says.
        """
        data = bytearray()
        self._fill(digest, size, data)
        return data

    def save_blob(self, digest: str, size: int, write: Callable[[memoryview], None]) -> None:
        """Give a blob of any size to `write`, piece by piece; only when this returns is it what the digest says.

        Raises as `get_blob`, and what `write` raises, which is no `OSError`.
        """
        self._fill(digest, size, _Written(write))

    def _fill(self, digest: str, size: int, data: _Growing) -> None:
        hasher = hashlib.sha256()
        failures = 0
        while True:
            before = len(data)
            error = self._receive(digest, size, data, hasher)
            if len(data) > size:
                raise _not_as_asked(self._where, digest)
            if len(data) == size:
                break
            failures = 0 if len(data) > before else failures + 1
            if failures == _ATTEMPTS:
                raise error or Unavailable(
                    f"The registry {self.reference.host} sends a blob incompletely.",
                    why=f"{len(data)} of {size} bytes came.",
                    hint="Try again: what has come is kept.",
                    code="registry-cut",
                )
            self._wait(failures, None)
        if "sha256:" + hasher.hexdigest() != digest:
            raise _not_as_asked(self._where, digest)

    def _receive(self, digest: str, size: int, data: _Growing, hasher: Any) -> AdapterError | None:
        """Add what comes to `data` and to `hasher`; returns what cut it, if anything did."""
        headers = {"Range": f"bytes={len(data)}-"} if data else {}
        response = self._ask("GET", f"blobs/{digest}", headers=headers, ok=(200, 206), stream=True)
        try:
            skip = _first_byte(response)
            if skip > len(data):
                return None  # a range that leaves a hole is none
            skip = len(data) - skip
            for piece in response.raw.stream(_PIECE_BYTES, decode_content=False):
                self.traffic.received_bytes += len(piece)
                if skip >= len(piece):
                    skip -= len(piece)
                    continue
                fresh = memoryview(piece)[skip:] if skip else piece
                skip = 0
                data += fresh
                hasher.update(fresh)
                if len(data) > size:
                    break
            return None
        except (urllib3.exceptions.HTTPError, OSError) as exc:
            return self._failed(exc)
        finally:
            response.close()

    # Requests

    @property
    def _where(self) -> str:
        return f"{self.reference.host}/{self.reference.repository}"

    def _own(self, url: str) -> str:
        """An address on the registry's own host keeps the registry's scheme: behind a proxy it may not know it."""
        parts = urlsplit(url)
        return self._base + url.split(parts.netloc, 1)[1] if parts.netloc == self.reference.api_host else url

    def _ask(
        self, method: str, path: str, *, ok: tuple[int, ...] = (200,), attempts: int = _ATTEMPTS, **options: Any
    ) -> requests.Response:
        """An answer with a status of `ok`, after as many attempts as it takes. `path` is below the repository, or whole."""
        url = path if "://" in path else f"{self._base}/v2/{self.reference.repository}/{path}"
        logins = 0
        attempt = 0
        while True:
            try:
                response = self._send(method, url, **options)
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as exc:
                error: AdapterError = self._failed(exc)
            else:
                if response.status_code in ok:
                    return response
                used = response.request.headers.get("Authorization", "")
                challenge = response.headers.get("WWW-Authenticate", "")
                error = self._error_of(response, path)
                response.close()
                is_ours = response.url.startswith(self._base + "/")  # not where a redirect led: it gets no login
                if response.status_code == 401 and is_ours and logins < 2 and self._login.answer(challenge, used):
                    logins += 1
                    continue
                if response.status_code not in _PASSING:
                    raise error
            attempt += 1
            if attempt >= attempts:
                raise error
            self._wait(attempt - 1, error.retry_after_s)

    def _read(self, path: str, **options: Any) -> tuple[bytes, requests.Response]:
        """A small body, whole, and its headers."""
        for attempt in range(_ATTEMPTS):
            response = self._ask("GET", path, stream=True, **options)
            try:
                raw = _read_limited(response, MANIFEST_LIMIT_BYTES, self._where)
                self.traffic.received_bytes += len(raw)
                return raw, response
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as exc:
                if attempt == _ATTEMPTS - 1:
                    raise self._failed(exc) from None
            finally:
                response.close()
            self._wait(attempt, None)
        raise AssertionError("unreachable")

    def _send(self, method: str, url: str, **options: Any) -> requests.Response:
        self.traffic.requests += 1
        return self._session.request(
            method, url, timeout=self._timeouts_s, allow_redirects=method in ("GET", "HEAD"), **options
        )

    def _exchange(self, method: str, url: str, **options: Any) -> requests.Response:
        """For tokens: another service's, so without our `Authorization`."""
        try:
            return self._send(method, url, auth=lambda request: request, **options)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as exc:
            raise self._failed(exc) from None

    def _wait(self, attempt: int, asked_s: float | None) -> None:
        pause_s = _FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311  # spreads clients, hides nothing
        self._pause(min(_PAUSE_LIMIT_S, max(pause_s, asked_s or 0.0)))

    def _failed(self, exc: Exception) -> AdapterError:
        """For a request without an answer. The exception's own text may hold an address, so its kind is told."""
        host = self.reference.host
        if isinstance(exc, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
            return Timeout(
                f"The registry {host} does not answer in time.",
                why=f"No byte came in {self._timeouts_s[1]:g} s.",
                hint="Try again: what has arrived is kept.",
                code="registry-timeout",
            )
        if isinstance(exc, requests.exceptions.SSLError | urllib3.exceptions.SSLError):
            return Unavailable(
                f"The registry {host} cannot be trusted.",
                why="Its certificate does not check, or it speaks plain HTTP.",
                hint="Name its authority's certificate with SSL_CERT_FILE; for plain HTTP say --plain-http.",
                code="registry-untrusted",
            )
        return Unavailable(
            f"The registry {host} does not answer.",
            why=_root_words(exc),
            hint="Check its address, and that it runs.",
            code="registry-down",
        )

    def _error_of(self, response: requests.Response, path: str) -> AdapterError:
        status = response.status_code
        said = _registry_words(response)
        if status in (401, 403):
            why = f"It answered {status}{said}."
            return refused(self.reference.host, why, anonymous=self._login.is_anonymous)
        if status == 404:
            wanted = path.rsplit("/", 1)[-1].partition("?")[0]
            named = wanted if is_digest(wanted) or path.startswith("manifests/") else "the repository"
            return NotFound(
                f"{self._where} has no {named}.",
                why=f"The registry answered 404{said}.",
                hint="Check the name, and that the image was pushed.",
                code="no-image",
            )
        if status == 429:
            return Overloaded(
                f"The registry {self.reference.host} limits how often it is asked.",
                why="It answered 429.",
                hint="Try again later.",
                code="registry-busy",
                retry_after_s=_retry_after_s(response),
            )
        return Unavailable(
            f"The registry {self.reference.host} cannot do what it was asked.",
            why=f"It answered {status}{said}.",
            hint="Try again; its own log says more.",
            code="registry-failed",
            retry_after_s=_retry_after_s(response),
        )


def _entries(index: Mapping[str, Any]) -> list[Descriptor]:
    """The usable descriptors of an index."""
    found = []
    entries = index.get("manifests")
    for entry in entries if isinstance(entries, list) else ():
        try:
            found.append(Descriptor.from_json(entry))
        except SnapshotCorrupt:
            continue
    return found


def _tag_of(digest: str) -> str:
    """The tag under which the specification keeps referrers where a registry has no API for them."""
    return digest.replace(":", "-")


def _read_limited(response: requests.Response, limit: int, where: str) -> bytes:
    raw = bytearray()
    for piece in response.iter_content(65536):
        raw += piece
        if len(raw) > limit:
            raise SnapshotCorrupt(f"{where} sends a manifest above {limit} bytes.", code="bad-artifact")
    return bytes(raw)


def _json_object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(raw)
        if isinstance(data, dict):
            return data
    except (ValueError, RecursionError):
        pass
    raise SnapshotCorrupt(f"{where} sends a manifest that is no JSON object.", code="bad-artifact")


def _not_as_asked(where: str, digest: str) -> SnapshotCorrupt:
    return SnapshotCorrupt(
        f"{where} sends other bytes than were asked for.",
        why=f"They are not those of {digest}.",
        hint="The registry, or what is between, damages data: nothing of it was used.",
        code="wrong-digest",
    )


def _first_byte(response: requests.Response) -> int:
    """Where in the blob the body begins."""
    match = _DECLARED_RANGE.match(response.headers.get("Content-Range", "")) if response.status_code == 206 else None
    return int(match[1]) if match else 0


def _retry_after_s(response: requests.Response) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else None


def _registry_words(response: requests.Response) -> str:
    """The registry's own error code, where it is one: words of the specification, nothing of the request."""
    try:
        code = json.loads(next(response.iter_content(4096), b""))["errors"][0]["code"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, OSError):  # requests' own are OSErrors
        return ""
    return f" ({code})" if isinstance(code, str) and re.fullmatch(r"[A-Z_]{1,40}", code) else ""


def _root_words(exc: BaseException) -> str:
    """The system's own words at the bottom of an exception, else its kind."""
    seen = 0
    inner: BaseException | None = exc
    while inner is not None and seen < 10:
        if isinstance(inner, OSError) and inner.strerror:
            return f"{inner.strerror}."
        reason = getattr(inner, "reason", None)
        first = inner.args[0] if inner.args else None
        inner = next(
            (e for e in (reason, first, inner.__cause__, inner.__context__) if isinstance(e, BaseException)), None
        )
        seen += 1
    return "The connection was cut."
