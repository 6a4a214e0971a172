"""One file over HTTP onto the disk, gone on with where a connection was cut, and as its digest says or not at all.

An address that a server names (a redirect) is trusted less than the one a user wrote: never from https to http,
and never into a private network. Errors show no query, which may hold a signature.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from adapter.errors import AdapterError, ConfigError, NotFound, Timeout, Unavailable
from adapter.packaging.weights_source import Progress, disk_error, other_digest, unsafe

_ATTEMPTS = 5
"""In a row without a byte more; what brings bytes may be cut as often as it likes."""
_FIRST_PAUSE_S = 0.2
_PAUSE_LIMIT_S = 10.0
_REDIRECTS = 5
_PIECE_BYTES = 2**16
"""What a read that runs into its time-out can lose."""
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class _Cut(Exception):
    """The connection ended before the file did; `error` is what to say when it is given up."""

    def __init__(self, error: AdapterError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass
class Downloader:
    """Fetches files with one session. `timeouts_s`: to connect, and without a byte. Close it when done."""

    timeouts_s: tuple[float, float] = (10.0, 30.0)
    pause: Callable[[float], None] = time.sleep
    session: Any = field(default_factory=lambda: _session())  # noqa: PLW0108  # defined below

    def fetch(self, url: str, path: Path, *, name: str, sha256: str, progress: Progress) -> None:
        """Write what `url` gives to `path`, which is there when this returns, and only then.

        Raises `AdapterError`: unreachable, refused, missing, of another digest, the disk is full.
        """
        self.session.trust_env = not is_loopback(urlsplit(url).hostname or "")  # this machine is behind no proxy
        part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w+b") as file:
                found = self._all(url, file, name, progress)
            if found != sha256:
                raise other_digest(name, f"sha256:{found}", f"sha256:{sha256}")
            part.replace(path)
        except OSError as exc:
            raise disk_error(exc, name) from exc
        finally:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        self.session.close()

    def _all(self, url: str, file: Any, name: str, progress: Progress) -> str:
        """The whole of it into the open `file`; returns its SHA-256 in hex."""
        state = _State(file, name, progress)
        failures = 0
        while True:
            before = state.done
            try:
                with self._answer(url, state) as response:
                    state.receive(response)
                return state.digest.hexdigest()
            except _Cut as cut:
                failures = 0 if state.done > before else failures + 1
                if failures == _ATTEMPTS:
                    raise cut.error from cut
            self.pause(min(_PAUSE_LIMIT_S, _FIRST_PAUSE_S * 2**failures))

    @contextmanager
    def _answer(self, url: str, state: _State) -> Iterator[Any]:
        """The answer after redirects, its status good. Raises `_Cut` for what may be better in a moment."""
        import requests

        asked = urlsplit(url)
        here = asked
        for _ in range(_REDIRECTS + 1):
            try:
                response = self.session.get(
                    here.geturl(), headers=state.headers, stream=True, timeout=self.timeouts_s, allow_redirects=False
                )
            except (requests.Timeout, requests.ConnectionError) as exc:
                raise _Cut(_unreachable(here, exc)) from None
            except requests.RequestException as exc:
                raise _unreachable(here, exc) from None
            try:
                if response.is_redirect:
                    here = _next(asked, here, response.headers["Location"])
                    continue
                _check_status(here, response, state)
                yield response
                return
            finally:
                response.close()
        raise Unavailable(
            f"{_shown(asked)} leads from one address to the next.",
            why=f"More than {_REDIRECTS} redirects.",
            hint="Name the address at their end.",
            code="weights-redirects",
        )


class _State:
    """What has come so far: the file's first `done` bytes, in `digest` too."""

    def __init__(self, file: Any, name: str, progress: Progress) -> None:
        self._file = file
        self._name = name
        self._progress = progress
        self._tag = ""
        self._total = 0
        self.restart()

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.done = 0
        self.digest = hashlib.sha256()

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        if self.done:
            headers["Range"] = f"bytes={self.done}-"
            if self._tag:
                headers["If-Range"] = self._tag
        return headers

    def receive(self, response: Any) -> None:
        """Add what comes. Raises `_Cut` where it ends early, `AdapterError` where there is no room for it."""
        import requests
        import urllib3

        if response.status_code == 200 or not self._goes_on(response):
            self.restart()
        length = response.headers.get("Content-Length", "")
        self._total = self.done + int(length) if length.isdecimal() else 0
        tag = response.headers.get("ETag", "")
        self._tag = "" if tag.startswith("W/") else tag
        self._check_room()
        here = urlsplit(response.url)
        try:
            for piece in response.raw.stream(_PIECE_BYTES, decode_content=False):
                self._file.write(piece)
                self.digest.update(piece)
                self.done += len(piece)
                self._progress(self._name, self.done, self._total)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as exc:
            raise _Cut(_cut_short(here, exc, self.done, self._total)) from None
        if self._total and self.done < self._total:
            raise _Cut(_cut_short(here, None, self.done, self._total))
        self._file.flush()

    def _goes_on(self, response: Any) -> bool:
        """Whether a part begins where ours ends."""
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        return found is not None and int(found[1]) == self.done

    def _check_room(self) -> None:
        left = self._total - self.done
        if left > shutil.disk_usage(self._file.name).free:
            raise disk_error(OSError(28, ""), self._name)


def _session() -> Any:
    try:
        import requests
    except ImportError as exc:
        raise ConfigError(
            "Weights cannot be downloaded.",
            why=f"{exc.name} is not installed here.",
            hint="Install gpufn[build] where images are built.",
            code="build-extra",
        ) from exc
    session = requests.Session()
    session.auth = lambda request: request  # else ~/.netrc would be sent to whatever host a function names
    logging.getLogger("urllib3").setLevel(logging.INFO)  # below that it logs whole addresses
    return session


def _check_status(here: SplitResult, response: Any, state: _State) -> None:
    status = response.status_code
    if status == 200 or (status == 206 and state.done):
        return
    if status == 416 and state.done:  # it is another file by now: from its beginning
        state.restart()
        raise _Cut(_refused(here, status))
    if status in _PASSING:
        raise _Cut(_refused(here, status))
    raise _refused(here, status)


def _next(asked: SplitResult, here: SplitResult, location: str) -> SplitResult:
    """Where a redirect leads. Raises `SnapshotError` where a server may not send us."""
    there = urlsplit(urljoin(here.geturl(), location))
    home = is_loopback(asked.hostname or "")
    if there.scheme not in {"http", "https"} or not there.hostname:
        raise unsafe(_shown(asked), f"It leads to an address of the kind {there.scheme or location[:40]!r}.")
    if there.scheme == "http" and not (home and is_loopback(there.hostname)):
        raise unsafe(
            _shown(asked), f"It leads to {_shown(there)}, which is not encrypted.", "Name an https:// address."
        )
    if not home and (private := _private_address(there.hostname)):
        raise unsafe(
            _shown(asked),
            f"It leads to {there.hostname}, which is {private}, in a private network.",
            "Name the address at the end of its redirects, if it is meant.",
        )
    return there


def _private_address(host: str) -> str:
    """An address of `host` that is not one of the public internet; empty: all are, or the name is unknown."""
    try:
        found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError):
        return ""
    addresses = [str(item[4][0]).partition("%")[0] for item in found]
    return next((address for address in addresses if not ipaddress.ip_address(address).is_global), "")


def is_loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def _shown(url: SplitResult) -> str:
    """An address for people: without its query."""
    return f"{url.scheme}://{url.hostname}{f':{url.port}' if url.port else ''}{url.path}"


def _refused(url: SplitResult, status: int) -> AdapterError:
    message = f"{_shown(url)} gives no weights."
    if status in {404, 410}:
        return NotFound(message, why=f"The server says {status}.", hint="See whether it moved.", code="weights-missing")
    if status in {401, 403}:
        hint = "Name an address that needs no login, or a registry (oci://), which has logins."
        return Unavailable(
            message, why=f"The server says {status}: not for everybody.", hint=hint, code="weights-denied"
        )
    return Unavailable(message, why=f"The server says {status}.", hint="Try again later.", code="weights-unreachable")


def _unreachable(url: SplitResult, exc: Exception) -> AdapterError:
    import requests

    if isinstance(exc, requests.ReadTimeout):
        return Timeout(
            f"{_shown(url)} does not answer.",
            why="No byte came in time.",
            hint="Try again later.",
            code="weights-timeout",
        )
    return Unavailable(
        f"{url.hostname} cannot be reached.",
        why=f"{_reason(exc)}.",
        hint="See its name, the network, HTTPS_PROXY and SSL_CERT_FILE of the builder.",
        code="weights-unreachable",
    )


def _cut_short(url: SplitResult, exc: Exception | None, done: int, total: int) -> AdapterError:
    import urllib3

    if isinstance(exc, urllib3.exceptions.ReadTimeoutError):
        return Timeout(
            f"{_shown(url)} stopped.",
            why=f"No byte came in time after {done}.",
            hint="Try again later.",
            code="weights-timeout",
        )
    return Unavailable(
        f"{_shown(url)} ends early, again and again.",
        why=f"{done} of {total or 'an unknown number of'} bytes came.",
        hint="Try again later, or bring the file in the function folder.",
        code="weights-truncated",
    )


def _reason(exc: BaseException) -> str:
    """The innermost reason, which has no address in it, where there is one."""
    inner: BaseException | None = exc
    for _ in range(10):
        if inner is None:
            break
        if isinstance(inner, OSError) and inner.strerror and not type(inner).__module__.startswith("requests"):
            return str(inner.strerror)
        reason = getattr(inner, "reason", None) or next((arg for arg in inner.args if isinstance(arg, Exception)), None)
        inner = reason if isinstance(reason, BaseException) else inner.__cause__ or inner.__context__
    return type(exc).__name__
