"""Invocations: from a caller through a replica's slot and back, streamed.

The request body is read whole (up to the function's limit), so that a request can be sent again when a
pooled connection turns out to be closed; the answer is passed on as it comes.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from adapter.errors import AdapterError, Timeout, Unavailable
from adapter.keys import CALL_ID_HEADER, DURATION_HEADER, START_PATH_HEADER
from adapter.openfaas.fleet import Fleet, Slot
from adapter.openfaas.metrics import Metrics

METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})

_HOP_HEADERS = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade", "expect"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Invocation:
    """One request for a function, detached from the connection it came on."""

    method: str
    path: str
    headers: CIMultiDict[str]
    body: bytes

    @property
    def call_id(self) -> str:
        return self.headers[CALL_ID_HEADER]


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
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=2**18,
        )

    async def close(self) -> None:
        await self._session.close()

    async def serve(self, fleet: Fleet, request: web.Request, path: str) -> web.StreamResponse:
        """Answer a caller; errors of ours as JSON with the call id."""
        began = time.monotonic()
        key = fleet.deployment.key
        self._metrics.started.labels(key).inc()
        call_id = request.headers.get(CALL_ID_HEADER) or str(uuid.uuid4())
        response: web.StreamResponse
        try:
            invocation = await read_invocation(request, path, call_id, fleet.deployment.spec.body_limit_bytes)
            response = await self._through(fleet, invocation, request)
        except AdapterError as error:
            response = error_response(error, call_id)
        except web.HTTPRequestEntityTooLarge:
            limit = fleet.deployment.spec.body_limit_bytes
            error = AdapterError(
                "The request body is too large.", why=f"{key} takes {limit} bytes at most.",
                hint="Raise limits.body in gpufn.toml.", code="body-too-large",
            )  # fmt: skip
            response = error_response(error, call_id, status=413)
        seconds = time.monotonic() - began
        self._metrics.invocations.labels(key, str(response.status)).inc()
        self._metrics.seconds.labels(key, str(response.status)).observe(seconds)
        return response

    async def _through(self, fleet: Fleet, invocation: Invocation, request: web.Request) -> web.StreamResponse:
        async with fleet.slot() as slot:
            upstream = await self._send(fleet, slot, invocation)
            try:
                return await _pass_on(upstream, request, slot, invocation.call_id)
            finally:
                upstream.close() if not upstream.content.at_eof() else upstream.release()

    async def call(self, fleet: Fleet, invocation: Invocation) -> tuple[int, CIMultiDict[str], bytes]:
        """The whole answer at once: for the asynchronous queue. Raises `AdapterError`."""
        async with fleet.slot() as slot:
            upstream = await self._send(fleet, slot, invocation)
            async with upstream:
                return upstream.status, CIMultiDict(_kept(upstream.headers)), await upstream.read()

    async def _send(self, fleet: Fleet, slot: Slot, invocation: Invocation) -> aiohttp.ClientResponse:
        spec = fleet.deployment.spec
        limit_s = (spec.exec_timeout_s + 5 if spec.exec_timeout_s else None)
        if slot.cold and limit_s is not None:
            limit_s += spec.start_timeout_s
        replica = slot.member.replica
        url = f"http://{replica.host}:{replica.port}{invocation.path}"
        for attempt in (1, 2):
            context: dict[str, bool] = {}
            try:
                return await self._session.request(
                    invocation.method, aiohttp.client.URL(url, encoded=True), headers=invocation.headers,
                    data=invocation.body or None, allow_redirects=False, trace_request_ctx=context,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=limit_s),
                )  # fmt: skip
            except (aiohttp.SocketTimeoutError, asyncio.TimeoutError) as exc:
                doing = "starting" if slot.cold and not slot.member.rung else "executing"
                raise Timeout(
                    f"{fleet.deployment.key} did not answer in time.", why=f"It was {doing} when {limit_s:g} s were over.",
                    hint="Raise limits.exec_timeout or limits.start_timeout.", code=f"{doing}-timeout",
                ) from exc  # fmt: skip
            except aiohttp.ClientError as exc:
                if attempt == 1 and context.get("reused"):
                    continue  # a pooled connection that its replica had closed: nothing was done with the request
                raise Unavailable(
                    f"The replica of {fleet.deployment.key} ended before it answered.", why=f"{exc}.",
                    hint=f"See its log: gpufn logs {fleet.deployment.name}", code="replica-died",
                ) from exc  # fmt: skip
        raise AssertionError("unreachable")


async def _note_reuse(_session: object, context: object, _params: object) -> None:
    request_context = getattr(context, "trace_request_ctx", None)
    if request_context is not None:
        request_context["reused"] = True


async def read_invocation(request: web.Request, path: str, call_id: str, limit_bytes: int) -> Invocation:
    """Raises `web.HTTPRequestEntityTooLarge`."""
    if (request.content_length or 0) > limit_bytes:
        raise web.HTTPRequestEntityTooLarge(limit_bytes, request.content_length or 0)
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > limit_bytes:
            raise web.HTTPRequestEntityTooLarge(limit_bytes, len(body))
    headers = CIMultiDict(_kept(request.headers))
    headers.popall("Content-Length", None)
    headers.setdefault("X-Forwarded-Host", request.headers.get("Host", ""))
    headers.setdefault("X-Forwarded-For", request.remote or "")
    headers.setdefault("X-Start-Time", str(time.time_ns()))
    headers[CALL_ID_HEADER] = call_id
    target = path + (f"?{request.query_string}" if request.query_string else "")
    return Invocation(request.method, target, headers, bytes(body))


def _kept(headers: object) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers.items() if name.lower() not in _HOP_HEADERS]  # type: ignore[attr-defined]


async def _pass_on(
    upstream: aiohttp.ClientResponse, request: web.Request, slot: Slot, call_id: str
) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=CIMultiDict(_kept(upstream.headers)))
    response.headers[CALL_ID_HEADER] = call_id
    if slot.cold and slot.member.rung:
        response.headers[START_PATH_HEADER] = slot.member.rung
    await response.prepare(request)
    async for chunk in upstream.content.iter_any():
        await response.write(chunk)
    await response.write_eof()
    return response


def error_response(error: AdapterError, call_id: str, *, status: int | None = None) -> web.Response:
    """An error of ours on a function's route: JSON, with the call id and, where it helps, Retry-After."""
    status = status or (503 if error.code in ("queue-full", "draining") else error.http_status)
    response = web.json_response(error.to_json(), status=status)
    response.headers[CALL_ID_HEADER] = call_id
    response.headers["X-OpenFaaS-Internal"] = "gpufn"
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return response


__all__ = ["DURATION_HEADER", "METHODS", "Invocation", "Proxy", "error_response", "read_invocation"]
