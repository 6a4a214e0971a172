"""One request for a function, detached from the way it came; and the headers that must not travel on."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from aiohttp import StreamReader, web
from multidict import CIMultiDict

from adapter.errors import AdapterError
from adapter.keys import CALL_ID_HEADER

_AT_HAND_BYTES = 256 * 1024
"""Of a body: so much is read before a replica is asked for, and can be sent again; more is passed on as it comes."""

STALL_LIMIT_S = 60.0
"""A caller of whom nothing comes, or who takes nothing, for so long is gone: his place is others'."""

_HOP_HEADERS = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade", "expect"}
)  # fmt: skip


class BodyTooLarge(AdapterError):
    """More than `limits.body`."""

    http_status = 413
    default_code = "body-too-large"


class BodyStalled(AdapterError):
    """A caller stopped in the middle of a body."""

    http_status = 408
    default_code = "body-stalled"


class Upload:
    """A body that is too long to keep: what is `at_hand`, then the rest as the caller sends it, once.

    `problem` is what was wrong with it, once it is known: whoever sends it on hears only that it broke off.
    """

    def __init__(self, at_hand: bytes, content: StreamReader, limit_bytes: int) -> None:
        self._at_hand = at_hand
        self._content = content
        self._limit_bytes = limit_bytes
        self.is_begun = False
        self.problem: AdapterError | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.is_begun = True
        yield self._at_hand
        size = len(self._at_hand)
        try:
            while chunk := await _next_of(self._content):
                size += len(chunk)
                if size > self._limit_bytes:
                    raise _too_large(self._limit_bytes)
                yield chunk
        except AdapterError as error:
            self.problem = error
            raise

    async def read(self) -> bytes:
        return b"".join([chunk async for chunk in self])


@dataclass(frozen=True, slots=True)
class Invocation:
    """`path` is what the function sees, query included; `headers` have a call id."""

    method: str
    path: str
    headers: CIMultiDict[str]
    body: bytes | Upload = b""

    @property
    def call_id(self) -> str:
        return self.headers[CALL_ID_HEADER]

    @property
    def can_be_sent(self) -> bool:
        """Once more, after an attempt."""
        return isinstance(self.body, bytes) or not self.body.is_begun

    async def whole(self) -> Invocation:
        """The same with its body at hand. Raises `BodyTooLarge`, `BodyStalled`."""
        if isinstance(self.body, bytes):
            return self
        body = await self.body.read()
        headers = self.headers.copy()
        headers.popall("Content-Length", None)
        return Invocation(self.method, self.path, headers, body)


async def read_invocation(request: web.Request, path: str, call_id: str, limit_bytes: int) -> Invocation:
    """Raises `BodyTooLarge`, at once where the request says how long it is, and `BodyStalled`."""
    length = request.content_length
    if (length or 0) > limit_bytes:
        raise _too_large(limit_bytes)
    at_hand = bytearray()
    while len(at_hand) < _AT_HAND_BYTES and not request.content.at_eof():
        at_hand += await _next_of(request.content)
    if len(at_hand) > limit_bytes:
        raise _too_large(limit_bytes)
    body: bytes | Upload = bytes(at_hand)
    headers = _headers(request, call_id)
    if not request.content.at_eof():
        body = Upload(bytes(at_hand), request.content, limit_bytes)
        if length is not None:
            headers["Content-Length"] = str(length)
    _, mark, query = request.raw_path.partition("?")  # as it was sent: `request.query_string` is decoded in part
    return Invocation(request.method, path + mark + query, headers, body)


async def _next_of(content: StreamReader) -> bytes:
    """What there is, or what comes next; empty at the end. Raises `BodyStalled`."""
    try:
        return content.read_nowait() or await asyncio.wait_for(content.readany(), STALL_LIMIT_S)
    except asyncio.TimeoutError as exc:
        raise BodyStalled("The request body stopped coming.", why=f"Nothing came for {STALL_LIMIT_S:g} s.") from exc


def call_id_of(request: web.Request) -> str:
    """The caller's, or a new one."""
    given = request.headers.get(CALL_ID_HEADER)
    return _readable(given) if given else str(uuid.uuid4())


def _headers(request: web.Request, call_id: str) -> CIMultiDict[str]:
    headers = kept_headers(request.headers)
    headers.popall("Content-Length", None)  # the client library's business
    headers.setdefault("X-Forwarded-Host", request.headers.get("Host", ""))
    headers.setdefault("X-Forwarded-For", request.remote or "")
    headers.setdefault("X-Forwarded-Proto", request.scheme)
    headers.setdefault("X-Start-Time", str(time.time_ns()))
    headers[CALL_ID_HEADER] = call_id
    return headers


def kept_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Without those that belong to one connection (RFC 9110, 7.6.1)."""
    named = {word.strip().lower() for word in headers.get("Connection", "").split(",")}
    dropped = _HOP_HEADERS | named
    return CIMultiDict((name, _readable(value)) for name, value in headers.items() if name.lower() not in dropped)


def _readable(value: str) -> str:
    """Bytes that are no UTF-8 (surrogates here, which aiohttp would drop) read as Latin-1, as HTTP once had it."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode(errors="surrogateescape").decode("latin-1")
    return value


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        "The request body is too large.",
        why=f"The function takes {limit_bytes} bytes at most.",
        hint="Raise limits.body in gpufn.toml.",
    )
