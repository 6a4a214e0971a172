"""Invocations: from a caller through a replica's slot and back, streamed both ways.

A request that no handler can have seen (its replica refused the connection, or ended while it still held
the request) goes to another replica. One that was sent to a handler is never sent twice, whatever its method,
but for the case that HTTP leaves open: a pooled connection that the replica had closed just before, so that
nothing of an answer came and no model process has ended: what a handler that crashes does, it does once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from adapter.errors import AdapterError, Timeout, Unavailable
from adapter.hosts import ReplicaState
from adapter.keys import CALL_ID_HEADER, DURATION_HEADER, START_PATH_HEADER
from adapter.openfaas.fleet import Fleet
from adapter.openfaas.gpus import RETRY_AFTER_S
from adapter.openfaas.invocation import (
    STALL_LIMIT_S,
    Invocation,
    Upload,
    call_id_of,
    kept_headers,
    read_invocation,
)
from adapter.openfaas.members import Slot
from adapter.openfaas.metrics import Metrics

logger = logging.getLogger(__name__)

METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})

CLIENT_GONE = 499
"""Status under which an invocation is counted whose caller went away (nginx's number)."""

_TRIES = 3
_CONNECT_LIMIT_S = 5.0
_REPLICA_SLACK_S = 5.0
"""A replica ends its requests itself at `exec_timeout`, and says so; here is for replicas that do not."""

_CLOSED_WHILE_IDLE_S = 0.1
"""A pooled connection that was closed already fails at once. A request that took longer was being handled."""

_EVENTS_LIMIT_S = 0.05
"""Until the events of a replica that ended have arrived: whether it ever served, whether its model exited."""

_ANSWER_LIMIT_BYTES = 64 * 2**20
"""Of an asynchronous invocation, whose answer waits here for its callback."""

_FIELD_LIMIT_BYTES = 64 * 2**10
"""Of one header of an answer, and of its first line: tokens and cookies are long, and replicas are ours."""


class _Lost(Exception):
    """A connection that gave no answer. `refused`: the replica never had the request; `begun`: it answered in part."""

    def __init__(self, why: str, *, refused: bool = False, begun: bool = False) -> None:
        super().__init__(why)
        self.refused = refused
        self.begun = begun


class Proxy:
    """Sends invocations to replicas over pooled connections."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            auto_decompress=False,
            trace_configs=[trace],
            cookie_jar=aiohttp.DummyCookieJar(),
            middlewares=[_once],
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=2**18,
            max_line_size=_FIELD_LIMIT_BYTES,
            max_field_size=_FIELD_LIMIT_BYTES,
        )

    async def close(self) -> None:
        await self._session.close()

    async def serve(self, fleet: Fleet, request: web.Request, path: str) -> web.StreamResponse:
        """Answer a caller; our own errors as JSON with the call id."""
        began = time.monotonic()
        key = fleet.deployment.key
        call_id = call_id_of(request)
        status = CLIENT_GONE
        self._metrics.count_begun(key)
        try:
            invocation = await read_invocation(request, path, call_id, fleet.deployment.spec.body_limit_bytes)
            async with self._sent(fleet, invocation) as (slot, upstream):
                status = upstream.status
                return await _pass_on(upstream, request, slot, call_id, began)
        except AdapterError as error:
            response = error_response(error, call_id)
            response.headers[DURATION_HEADER] = f"{time.monotonic() - began:.6f}"
            status = response.status
            return response
        finally:
            self._metrics.count_answered(key, status, time.monotonic() - began)

    async def call(self, fleet: Fleet, invocation: Invocation) -> tuple[int, CIMultiDict[str], bytes]:
        """The whole answer at once: for the asynchronous queue. Raises `AdapterError`."""
        began = time.monotonic()
        key = fleet.deployment.key
        status = CLIENT_GONE
        self._metrics.count_begun(key)
        try:
            async with self._sent(fleet, invocation) as (_, upstream):
                body = await _read_answer(upstream)
                status = upstream.status
                return status, kept_headers(upstream.headers), body
        except AdapterError as error:
            status = error_status(error)
            raise
        finally:
            self._metrics.count_answered(key, status, time.monotonic() - began)

    @asynccontextmanager
    async def _sent(self, fleet: Fleet, invocation: Invocation) -> AsyncIterator[tuple[Slot, aiohttp.ClientResponse]]:
        """A replica's answer that has begun. Raises `AdapterError`."""
        for tries_left in reversed(range(_TRIES)):
            async with fleet.slot() as slot:
                try:
                    upstream = await self._send(fleet, slot, invocation)
                except _Lost as lost:
                    if tries_left and await _may_move(fleet, slot, invocation, lost):
                        continue
                    raise _died(fleet, lost) from lost
                try:
                    yield slot, upstream
                finally:
                    upstream.release() if upstream.content.at_eof() else upstream.close()
                return

    async def _send(self, fleet: Fleet, slot: Slot, invocation: Invocation) -> aiohttp.ClientResponse:
        """Raises `_Lost`, or an `AdapterError`."""
        limit_s = _limit_s(fleet, slot)
        began = time.monotonic()
        exits = slot.member.exits
        notes = SimpleNamespace(reused=False)
        try:
            return await self._request(slot, invocation, notes, limit_s)
        except _Lost as lost:
            was_closed = notes.reused and time.monotonic() - began < _CLOSED_WHILE_IDLE_S
            if lost.refused or lost.begun or not was_closed or not invocation.can_be_sent:
                raise
            await asyncio.sleep(_EVENTS_LIMIT_S)
            if slot.member.exits != exits:
                raise
        except aiohttp.SocketTimeoutError as exc:
            raise _took_too_long(fleet, slot, limit_s) from exc
        try:
            return await self._request(slot, invocation, SimpleNamespace(), limit_s)
        except _Lost as lost:
            raise _Lost(str(lost)) from lost  # the first try may have reached a handler
        except aiohttp.SocketTimeoutError as exc:
            raise _took_too_long(fleet, slot, limit_s) from exc

    async def _request(
        self, slot: Slot, invocation: Invocation, notes: SimpleNamespace, limit_s: float | None
    ) -> aiohttp.ClientResponse:
        replica = slot.member.replica
        try:
            return await self._session.request(
                invocation.method,
                URL(f"http://{replica.host}:{replica.port}{invocation.path}", encoded=True),
                headers=invocation.headers,
                data=invocation.body or None,
                allow_redirects=False,
                trace_request_ctx=notes,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_LIMIT_S, sock_read=limit_s),
            )
        except aiohttp.SocketTimeoutError:
            raise
        except aiohttp.ClientConnectionError as exc:
            if isinstance(invocation.body, Upload) and invocation.body.problem is not None:
                raise invocation.body.problem from None
            raise _lost(exc) from exc
        except aiohttp.ClientError as exc:
            raise _unreadable(slot, exc) from exc


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Hides a broken connection from aiohttp, which would send the request again by itself where its method is
    idempotent: a handler that crashed may have had its effects already."""
    try:
        return await send(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as exc:
        raise _lost(exc) from exc


def _lost(error: aiohttp.ClientConnectionError) -> _Lost:
    return _Lost(
        str(error) or type(error).__name__,
        refused=isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError),
        begun=isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str),
    )


async def _note_reuse(_session: object, context: SimpleNamespace, _params: object) -> None:
    context.trace_request_ctx.reused = True


def _limit_s(fleet: Fleet, slot: Slot) -> float | None:
    spec = fleet.deployment.spec
    if not spec.exec_timeout_s:
        return None
    return spec.exec_timeout_s + _REPLICA_SLACK_S + (spec.start_timeout_s if slot.cold else 0)


async def _may_move(fleet: Fleet, slot: Slot, invocation: Invocation, lost: _Lost) -> bool:
    """Whether a request that got no answer may go to another replica."""
    if lost.refused:
        fleet.discard(slot.member, "refuses connections")
        return invocation.can_be_sent
    await asyncio.sleep(_EVENTS_LIMIT_S)
    return slot.is_held and invocation.can_be_sent


def _died(fleet: Fleet, lost: _Lost) -> Unavailable:
    return Unavailable(
        f"The replica of {fleet.deployment.key} ended before it answered.",
        why=f"{lost}.",
        hint=f"See its log: gpufn logs {fleet.deployment.key}",
        code="replica-died",
    )


def _unreadable(slot: Slot, error: aiohttp.ClientError) -> Unavailable:
    said = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
    return Unavailable(
        f"The answer of {slot.member.replica.deployment.key} cannot be read.",
        why=f"{said.split(':')[0]}.",  # what follows is a piece of the answer, which may be a secret
        hint=f"An answer's headers may have {_FIELD_LIMIT_BYTES // 2**10} KiB each, and must be HTTP.",
        code="answer-unreadable",
    )


def _took_too_long(fleet: Fleet, slot: Slot, limit_s: float | None) -> Timeout:
    """The caller's error. A replica that neither answered in time nor said so is of no use to others either."""
    if slot.member.asleep:
        return Timeout(
            f"{fleet.deployment.key} did not answer in time.",
            why=f"Its replica was parked and waited for a GPU (gpu_wait) when {limit_s:g} s were over.",
            hint="Retry later; see who holds what: gpufn nodes",
            code="gpu-wait-timeout",
            retry_after_s=RETRY_AFTER_S,
        )
    if slot.member.state is not ReplicaState.STARTING:  # its host ends a start that hangs
        fleet.discard(slot.member, "does not answer")
    phase, doing = ("start", "starting") if slot.is_held else ("exec", "executing")
    return Timeout(
        f"{fleet.deployment.key} did not answer in time.",
        why=f"It was {doing} when {limit_s:g} s were over.",
        hint=f"Raise limits.{phase}_timeout.",
        code=f"{phase}-timeout",
    )


async def _read_answer(upstream: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    try:
        async for chunk in upstream.content.iter_any():
            body += chunk
            if len(body) > _ANSWER_LIMIT_BYTES:
                raise Unavailable(
                    "The answer is too large for a callback.",
                    why=f"It has more than {_ANSWER_LIMIT_BYTES} bytes.",
                    code="answer-too-large",
                )
    except (aiohttp.ClientError, asyncio.TimeoutError) as exc:
        raise Unavailable("The answer broke off.", why=f"{exc}.", code="answer-broken") from exc
    return bytes(body)


async def _pass_on(
    upstream: aiohttp.ClientResponse, request: web.Request, slot: Slot, call_id: str, began: float
) -> web.StreamResponse:
    """Send an answer on as it comes. One that breaks off breaks off for the caller too."""
    response = web.StreamResponse(
        status=upstream.status, reason=upstream.reason, headers=kept_headers(upstream.headers)
    )
    response.headers[CALL_ID_HEADER] = call_id
    response.headers.setdefault(DURATION_HEADER, f"{time.monotonic() - began:.6f}")
    rung = await slot.rung()
    if rung:
        response.headers[START_PATH_HEADER] = rung
    await response.prepare(request)
    try:
        async for chunk in upstream.content.iter_any():
            await _write(response, request, chunk)
    except aiohttp.ClientConnectionResetError:
        return response  # it is the caller who went away
    except (aiohttp.ClientError, asyncio.TimeoutError) as exc:
        logger.warning(
            "an answer broke off", extra={"fields": {"call_id": call_id, "why": str(exc) or type(exc).__name__}}
        )
        if request.transport is not None:
            request.transport.abort()  # a proper end would make half an answer look whole
        return response
    await response.write_eof()
    return response


async def _write(response: web.StreamResponse, request: web.Request, chunk: bytes) -> None:
    if request.transport is None or not request.transport.get_write_buffer_size():
        await response.write(chunk)
    else:
        await asyncio.wait_for(response.write(chunk), STALL_LIMIT_S)


def error_status(error: AdapterError) -> int:
    """On a function's route: what passes is 503, so that callers and load balancers try again."""
    return 503 if error.code in ("queue-full", "draining", "gpu-wait") else error.http_status


def error_response(error: AdapterError, call_id: str) -> web.Response:
    """An error of ours on a function's route: JSON, with the call id and, where it helps, Retry-After."""
    response = web.Response(
        status=error_status(error), body=json.dumps(error.to_json()).encode(), content_type="application/json"
    )
    response.headers[CALL_ID_HEADER] = call_id
    response.headers["X-OpenFaaS-Internal"] = "gpufn"
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return response
