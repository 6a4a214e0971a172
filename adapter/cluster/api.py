"""A client of the Kubernetes API: raw JSON, a pace that the API server can bear, and errors that say what to do.

Answers are dicts as they came. What is safe to send twice is sent again after a pause where the server or the network
could not for the moment. Every call has an end: no longer than its `Patience`.
"""

from __future__ import annotations

import asyncio
import copy
import io
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import aiohttp
from yarl import URL

from adapter import __version__
from adapter.cluster.backoff import pause_s
from adapter.cluster.calls import GONE, JSON, Call, code_of, error_of, garbled, may_repeat, unreached
from adapter.cluster.connections import Connections, body_of
from adapter.cluster.credentials import Access, Credentials
from adapter.cluster.listing import ITEM, read_list
from adapter.errors import AdapterError, Conflict, NotFound, Overloaded, Timeout, Unavailable
from adapter.keys import FIELD_MANAGER

T = TypeVar("T")

NOT_LEADER = "not-leader"
"""Code of the error for a write that only a leader may do, by one that is none any more."""

PAGE_ITEMS = 500
_CONNECT_S = 10.0
_ATTEMPT_S = 30.0
_FIRST_PAUSE_S, _PAUSE_LIMIT_S = 0.2, 10.0
_TURN_S = 0.005
"""How long a list may be read before others get a turn."""
_ANSWER_LIMIT_BYTES = 256 * 2**20
_LINE_LIMIT_BYTES = 16 * 2**20
"""An object is 1.5 MiB in etcd; as an event, in JSON, it may be a few times that."""
_PIECE_BYTES = 2**16
_APPLY = "application/apply-patch+yaml"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one call may take, its repetitions and pauses included, and how often it is tried.

    `paced`: it waits for its turn, as all calls of a client do together. What must not wait (a lease that runs out)
    does not.
    """

    total_s: float = 60.0
    attempts: int = 5
    paced: bool = True


PATIENT = Patience()


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """What a list had, and the resource version from which a watch goes on."""

    items: list[T]
    resource_version: str


class Pace:
    """A token bucket: `per_s` calls a second, `burst` of them at once."""

    def __init__(self, per_s: float = 20.0, burst: int = 40, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._free_at = clock() - burst / per_s
        """When the next call's turn would be, were there no burst."""

    def delay_s(self, limit_s: float = math.inf) -> float:
        """Seconds until the next turn; it is taken where that is no more than `limit_s`."""
        now = self._clock()
        turn_at = max(self._free_at, now - self._burst / self._per_s) + 1 / self._per_s
        wait_s = max(0.0, turn_at - now)
        if wait_s <= limit_s:
            self._free_at = turn_at
        return wait_s


class Api:
    """One cluster's API, as one identity. Use it as ``async with Api(Credentials()) as api``."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        field_manager: str = FIELD_MANAGER,
        pace: Pace | None = None,
        user_agent: str = f"gpufn/{__version__}",
    ) -> None:
        self._credentials = credentials
        self._manager = field_manager
        self._pace = pace or Pace()
        self._user_agent = user_agent
        self._session: aiohttp.ClientSession | None = None
        self._fence: Callable[[], float] | None = None

    async def __aenter__(self) -> Api:
        self._session = aiohttp.ClientSession(
            connector=Connections(),
            headers={"User-Agent": self._user_agent, "Accept": f"{JSON}, */*", "Accept-Encoding": "identity"},
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *args: object) -> None:
        if self._session is not None:
            await self._session.close()

    def fenced(self, left_s: Callable[[], float]) -> Api:
        """The same client for work that only a leader may do: writes are refused with `NOT_LEADER` once `left_s` says
        that no time is left, and none takes longer than what is left."""
        fenced = copy.copy(self)
        fenced._fence = left_s  # noqa: SLF001  # one of its own kind
        return fenced

    async def namespace(self) -> str:
        """The one of the kubeconfig's context, or of this pod."""
        return (await self._credentials.access()).namespace

    # ------------------------------------------------------------------------------------------------ reading

    async def get(
        self,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        patience: Patience = PATIENT,
    ) -> dict[str, Any]:
        """The object at `path`; raises `NotFound`, and what every call may: `Unavailable`, `Overloaded`, `Timeout`."""
        return await self._json(Call("GET", path, params or {}, headers=headers or {}), patience)

    async def list(
        self,
        path: str,
        project: Callable[[dict[str, Any]], T | None],
        *,
        label_selector: str = "",
        field_selector: str = "",
        page_items: int = PAGE_ITEMS,
        patience: Patience = PATIENT,
    ) -> Listing[T]:
        """What `project` makes of each object below `path`, without those of which it makes None.

        Read page by page, with `patience` for each of them; where the pages' time has run out meanwhile, from the
        beginning. Raises `Unavailable` with the code `GONE` where that happens again and again.
        """
        params = _selected({"limit": str(page_items)}, label_selector, field_selector)
        for _ in range(3):
            found: Listing[T] = Listing([], "")
            try:
                more = ""
                while True:
                    page = params | ({"continue": more} if more else {})
                    text = await self._text(Call("GET", path, page), patience)
                    version, more = await _read_page(text, project, found.items, path)
                    if not more:
                        return replace(found, resource_version=version)
            except Unavailable as exc:
                if exc.code != GONE:
                    raise
        raise Unavailable(f"The list {path} changes faster than it can be read.", code=GONE)

    async def watch(
        self,
        path: str,
        resource_version: str,
        *,
        timeout_s: float,
        silence_s: float,
        label_selector: str = "",
        field_selector: str = "",
        on_open: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """``(type, object)`` of each event after `resource_version`, bookmarks included, until the server ends it.

        It does after `timeout_s`; `on_open` is called when it has agreed. Raises `Timeout` after `silence_s` without a
        byte: bookmarks come about once a minute, so such a watch is dead. Raises `Unavailable` with `GONE` where the
        version is too old.
        """
        params = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": resource_version}
        params["timeoutSeconds"] = str(max(1, round(timeout_s)))
        params = _selected(params, label_selector, field_selector)
        async with aclosing(self.lines(path, params=params, silence_s=silence_s, on_open=on_open)) as lines:
            async for line in lines:
                event = _parsed(line, path)
                kind, value = event.get("type"), event.get("object")
                if not isinstance(kind, str) or not isinstance(value, dict):
                    raise garbled(path)
                if kind == "ERROR":
                    raise error_of(Call("WATCH", path), code_of(value), value, None)
                yield kind, value

    async def lines(
        self,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        silence_s: float | None = None,
        on_open: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[bytes, None]:
        """What the server sends at `path`, line by line without their ends, for as long as it does: watches, logs.

        `on_open` is called when it has agreed to.

        Raises `Timeout` after `silence_s` without a byte.
        """
        call = Call("GET", path, params or {})
        rest = bytearray()
        timeout = aiohttp.ClientTimeout(connect=_CONNECT_S, sock_read=silence_s)
        async with self._streamed(call, timeout) as response:
            on_open()
            try:
                async for piece in response.content.iter_chunked(_PIECE_BYTES):
                    *whole, last = piece.split(b"\n")
                    for line in whole:
                        rest += line
                        if rest:
                            yield bytes(rest)
                        rest.clear()
                    rest += last
                    if len(rest) > _LINE_LIMIT_BYTES:
                        raise garbled(path)
            except (aiohttp.ClientError, OSError, TimeoutError, asyncio.TimeoutError) as exc:
                raise unreached(call, exc) from exc
        if rest:
            yield bytes(rest)

    # ------------------------------------------------------------------------------------------------ writing

    async def create(
        self, path: str, body: Mapping[str, Any], *, patience: Patience = PATIENT, dry_run: bool = False
    ) -> dict[str, Any]:
        """Raises `Conflict` with the code ``exists``. Also for what is asked by creating: tokens, reviews.

        Not sent again where it may have been done.
        """
        params = {"fieldManager": self._manager} | ({"dryRun": "All"} if dry_run else {})
        return await self._json(Call("POST", path, params, body, repeatable=False), patience)

    async def apply(
        self, path: str, body: Mapping[str, Any], *, force: bool = False, patience: Patience = PATIENT
    ) -> dict[str, Any]:
        """Server-side apply: of the object at `path`, exactly the fields in `body` are ours.

        Raises `Conflict` where another manager has one of them, unless `force` takes it.
        """
        params = {"fieldManager": self._manager, "force": "true" if force else "false"}
        return await self._json(Call("PATCH", path, params, body, _APPLY), patience)

    async def patch(
        self, path: str, body: Mapping[str, Any] | Sequence[Any], *, patience: Patience = PATIENT
    ) -> dict[str, Any]:
        """A merge patch where `body` is a mapping, a JSON patch where it is a sequence of operations."""
        is_merge = isinstance(body, Mapping)
        kind = "application/merge-patch+json" if is_merge else "application/json-patch+json"
        call = Call("PATCH", path, {"fieldManager": self._manager}, body, kind, repeatable=is_merge)
        return await self._json(call, patience)

    async def replace(self, path: str, body: Mapping[str, Any], *, patience: Patience = PATIENT) -> dict[str, Any]:
        """The whole object. Raises `Conflict` where it is not at the resource version of `body`."""
        return await self._json(Call("PUT", path, {"fieldManager": self._manager}, body), patience)

    async def delete(
        self,
        path: str,
        *,
        uid: str = "",
        resource_version: str = "",
        grace_s: int | None = None,
        propagation: str = "Background",
        patience: Patience = PATIENT,
    ) -> bool:
        """False where there is none. Raises `Conflict` where it is not the one with `uid` at `resource_version`."""
        body: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        preconditions = {"uid": uid} if uid else {}
        if resource_version:
            preconditions["resourceVersion"] = resource_version
        if preconditions:
            body["preconditions"] = preconditions
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            await self._json(Call("DELETE", path, body=body), patience)
        except NotFound:
            return False
        return True

    # ------------------------------------------------------------------------------------------------ calls

    async def _json(self, call: Call, patience: Patience) -> dict[str, Any]:
        return _parsed(await self._text(call, patience), call.path)

    async def _text(self, call: Call, patience: Patience) -> str:
        """The answer's body. Tries again where that can help and `patience` lasts."""
        end = time.monotonic() + patience.total_s
        for attempt in range(1, patience.attempts + 1):
            if patience.paced:
                left_s = max(0.0, end - time.monotonic())
                await asyncio.sleep(min(self._pace.delay_s(left_s), left_s))
            try:
                return await self._attempt(call, self._limit_s(call, end))
            except (Unavailable, Overloaded, Timeout) as exc:
                wait_s = (exc.retry_after_s or 0.0) + pause_s(attempt, first_s=_FIRST_PAUSE_S, limit_s=_PAUSE_LIMIT_S)
                if not may_repeat(call, exc) or attempt == patience.attempts or time.monotonic() + wait_s >= end:
                    raise
            await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    def _limit_s(self, call: Call, end: float) -> float:
        limit_s = min(_ATTEMPT_S, end - time.monotonic())
        if self._fence is not None and call.method != "GET":
            limit_s = min(limit_s, self._fence())
            if limit_s <= 0:
                raise Conflict(f"{call} was not sent.", why="Another replica may lead by now.", code=NOT_LEADER)
        if limit_s <= 0:
            raise Timeout(f"{call}: its turn did not come in time.", code="api-timed-out")
        return limit_s

    async def _attempt(self, call: Call, limit_s: float) -> str:
        async with self._streamed(call, aiohttp.ClientTimeout(total=limit_s, connect=_CONNECT_S)) as response:
            try:
                return (await _body(response, call)).decode()
            except UnicodeDecodeError:
                raise garbled(call.path) from None
            except (aiohttp.ClientError, OSError, TimeoutError, asyncio.TimeoutError) as exc:
                raise unreached(call, exc) from exc

    @asynccontextmanager
    async def _streamed(self, call: Call, timeout: aiohttp.ClientTimeout) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to a call that the server agreed to. Credentials that it refuses are asked for anew, once."""
        access = await self._credentials.access()
        try:
            response = await self._send(call, access, timeout)
            if response.status == 401:
                response.close()
                response = await self._send(call, await self._credentials.access(refused=access), timeout)
        except aiohttp.ClientConnectorCertificateError:  # the cluster's CA may have been rotated
            try:
                response = await self._send(call, await self._credentials.access(refused=access), timeout)
            except (aiohttp.ClientError, OSError, TimeoutError, asyncio.TimeoutError) as exc:
                raise unreached(call, exc) from exc
        except (aiohttp.ClientError, OSError, TimeoutError, asyncio.TimeoutError) as exc:
            raise unreached(call, exc) from exc
        try:
            if response.status >= 400:
                raise await _refused(response, call)
            yield response
        finally:
            response.release() if response.content.at_eof() else response.close()

    async def _send(self, call: Call, access: Access, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        assert self._session is not None, "Api is used with `async with`"
        content = {} if call.body is None else {"Content-Type": call.content_type}
        return await self._session.request(
            call.method,
            URL(access.url + call.path, encoded=True).update_query(call.params),
            data=None if call.body is None else io.BytesIO(json.dumps(call.body, separators=(",", ":")).encode()),
            headers={**access.headers, **call.headers, **content},
            ssl=access.tls or True,
            server_hostname=access.server_name,
            proxy=access.proxy,
            timeout=timeout,
            allow_redirects=False,
        )


def _selected(params: dict[str, str], label_selector: str, field_selector: str) -> dict[str, str]:
    selectors = {"labelSelector": label_selector, "fieldSelector": field_selector}
    return params | {name: value for name, value in selectors.items() if value}


async def _read_page(
    text: str, project: Callable[[dict[str, Any]], T | None], items: list[T], path: str
) -> tuple[str, str]:
    """Adds to `items`; the page's resource version, and what asks for the next one."""
    metadata: Any = None
    turn_ends = time.monotonic() + _TURN_S
    try:
        for name, value in read_list(text):
            if name == "metadata":
                metadata = value
            elif name == ITEM and isinstance(value, dict) and (made := project(value)) is not None:
                items.append(made)
            if time.monotonic() > turn_ends:
                await asyncio.sleep(0)
                turn_ends = time.monotonic() + _TURN_S
    except (ValueError, RecursionError):
        raise garbled(path) from None
    if not isinstance(metadata, dict) or not metadata.get("resourceVersion"):
        raise garbled(path)
    return str(metadata["resourceVersion"]), str(metadata.get("continue") or "")


async def _body(response: aiohttp.ClientResponse, call: Call, limit_bytes: int = _ANSWER_LIMIT_BYTES) -> bytes:
    body = await body_of(response, limit_bytes)
    if body is None:
        raise garbled(call.path)
    return body


def _parsed(text: str | bytes, path: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise garbled(path) from None
    if not isinstance(value, dict):
        raise garbled(path)
    return value


async def _refused(response: aiohttp.ClientResponse, call: Call) -> AdapterError:
    """What an answer of 400 or more means."""
    try:
        status = json.loads(await _body(response, call, 2**20))
    except (ValueError, RecursionError, AdapterError, aiohttp.ClientError, OSError, asyncio.TimeoutError):
        status = {}
    after = response.headers.get("Retry-After", "")
    return error_of(call, response.status, status if isinstance(status, dict) else {}, after)
