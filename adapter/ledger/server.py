"""The ledger service: agents deliver records to it, and who may read asks it. JSON over HTTP.

    POST /v1/records        NDJSON, see `adapter.ledger.wire`       {"acked", "rejected": [{"seq", "code", "why"}], "now_ns"}
    GET  /v1/leases         ?start_ns&end_ns[&function][&namespace][&summary=true]          {"leases": […]}
    GET  /v1/held         ?start_ns&end_ns                                {"gpu_seconds": {"name.namespace": …}}
    GET  /v1/starts         [?function][&namespace][&since_ns][&limit]                       {"starts": […]}
    GET  /v1/activity       ?since_ns                                                       {"functions": […]}
    GET  /v1/capacity       ?start_ns&end_ns, of whole hours                    {"hours": […], "findings": […]}

What is acknowledged is committed: an answer that does not come means nothing, and the delivery is repeated; rows have
deterministic ids, so that it counts once. A record that cannot be true is refused alone, by its code.

The caller's token comes in ``Authorization: Bearer``, or in `TOKEN_HEADER` where that one is the API server's own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from aiohttp import web

from adapter.errors import AdapterError, ConfigError, LedgerError, Overloaded
from adapter.keys import LEDGER_TOKEN_HEADER as TOKEN_HEADER
from adapter.ledger.callers import Caller, Callers
from adapter.ledger.metrics import Metrics
from adapter.ledger.store import Ledger
from adapter.ledger.wire import read_batch
from adapter.policy.activity import Activity, activity
from adapter.policy.budget import held_gpu_s
from adapter.policy.conservation import HOUR_NS, Conservation, conserve
from adapter.records import LeaseInterval

logger = logging.getLogger(__name__)

BODY_LIMIT_BYTES = 8 * 2**20
ROWS_LIMIT = 100_000
"""Of one answer. A longer range is asked for in parts, or as a summary."""
_WRITERS = 4
"""Deliveries that are stored at once: more wait, as the database would make them."""
_READERS = 2
"""Answers that are made at once: what one may have in memory is bounded, and so is all of it."""
_ACTIVITY_LIMIT_NS = 3 * 24 * HOUR_NS
"""How far back: more than anybody looks."""
_CAPACITY_LIMIT_NS = 31 * 24 * HOUR_NS

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LedgerService:
    """Routes over one ledger. `clock_ns` is the calendar that records are judged by."""

    def __init__(
        self, ledger: Ledger, callers: Callers, metrics: Metrics, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._ledger, self._callers, self._metrics, self._clock_ns = ledger, callers, metrics, clock_ns
        self._writing = asyncio.Semaphore(_WRITERS)
        self._answering = asyncio.Semaphore(_READERS)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_LIMIT_BYTES, middlewares=[_errors])
        app.router.add_post("/v1/records", self._take)
        app.router.add_get("/v1/leases", self._reading(self._leases))
        app.router.add_get("/v1/held", self._reading(self._held))
        app.router.add_get("/v1/starts", self._reading(self._starts))
        app.router.add_get("/v1/activity", self._reading(self._activity))
        app.router.add_get("/v1/capacity", self._reading(self._capacity))
        return app

    # Writing ------------------------------------------------------------------------------------

    async def _take(self, request: web.Request) -> web.Response:
        caller = await self._caller(request)
        if not caller.writes:
            raise _Denied("Only agents write records.", why=f"The token is {caller.namespace}/{caller.account}'s.")
        body = await request.read()
        now_ns = self._clock_ns()
        async with self._writing:
            batch = await asyncio.to_thread(read_batch, body, caller.node, now_ns)
            new = await asyncio.to_thread(self._ledger.add, batch.intervals, batch.starts, batch.devices)
        self._metrics.count_delivery(batch, new)
        for refusal in batch.refused:
            fields = {"node": caller.node, "seq": refusal.seq, "code": refusal.code.value, "why": refusal.why}
            logger.warning("a record is refused", extra={"fields": fields})
        rejected = [{"seq": r.seq, "code": r.code.value, "why": r.why} for r in batch.refused]
        return _json({"acked": batch.acked, "rejected": rejected, "now_ns": now_ns})

    # Reading ------------------------------------------------------------------------------------

    def _reading(self, answer: Callable[[Mapping[str, str]], object]) -> _Handler:
        async def handle(request: web.Request) -> web.Response:
            caller = await self._caller(request)
            if not caller.reads:
                raise _Denied("This account may not read.", why=f"The token is {caller.namespace}/{caller.account}'s.")
            async with self._answering:
                text = await asyncio.to_thread(lambda: json.dumps(answer(request.query)))
            return web.Response(text=text, content_type="application/json")

        return handle

    def _leases(self, query: Mapping[str, str]) -> object:
        start_ns, end_ns = _range(query)
        function, namespace = query.get("function"), query.get("namespace")
        if query.get("summary") == "true":
            found = self._ledger.summary(start_ns, end_ns)
            chosen = [
                i for i in found
                if function in (None, i.function) and namespace in (None, i.namespace)
            ]  # fmt: skip
            return {"leases": [lease_json(i) for i in chosen]}
        rows = self._ledger.intervals(start_ns, end_ns, function, namespace=namespace, limit=ROWS_LIMIT + 1)
        if len(rows) > ROWS_LIMIT:
            raise Overloaded(
                f"The range has more than {ROWS_LIMIT} intervals.",
                hint="Ask for a shorter one, for one function, or for summary=true.",
                code="too-many-rows",
            )
        return {"leases": [lease_json(i) for i in rows]}

    def _held(self, query: Mapping[str, str]) -> object:
        start_ns, end_ns = _range(query)
        return {"gpu_seconds": held_gpu_s(self._ledger.summary(start_ns, end_ns), start_ns, end_ns)}

    def _starts(self, query: Mapping[str, str]) -> object:
        limit = min(_number(query, "limit", ROWS_LIMIT), ROWS_LIMIT)
        found = self._ledger.starts(
            query.get("function"), query.get("namespace"), limit, since_ns=_number(query, "since_ns", 0)
        )
        return {"starts": [record.to_json() for record in found]}

    def _activity(self, query: Mapping[str, str]) -> object:
        now_ns = self._clock_ns()
        since_ns = max(_number(query, "since_ns"), now_ns - _ACTIVITY_LIMIT_NS)
        runs = self._ledger.runs(since_ns, now_ns + HOUR_NS)
        starts = self._ledger.each_start(limit=ROWS_LIMIT, since_ns=since_ns)
        return {"functions": [activity_json(each) for each in activity(runs, starts)]}

    def _capacity(self, query: Mapping[str, str]) -> object:
        start_ns, end_ns = _range(query)
        if end_ns - start_ns > _CAPACITY_LIMIT_NS:
            raise ConfigError("The range is longer than 31 days.", hint="Ask for it in parts.", code="bad-query")
        return capacity_json(self.conservation(start_ns // HOUR_NS * HOUR_NS, -(-end_ns // HOUR_NS) * HOUR_NS))

    def conservation(self, start_ns: int, end_ns: int) -> Conservation:
        """Of hours up to now: later ones have not been. Blocks, and goes day by day, so that memory is bounded."""
        end_ns = min(end_ns, self._clock_ns())
        day_ns = 24 * HOUR_NS
        parts = []
        while start_ns < end_ns:
            until_ns = min(end_ns, (start_ns // day_ns + 1) * day_ns)
            leases = self._ledger.intervals(start_ns, until_ns, on_gpus=True)
            parts.append(conserve(leases, self._ledger.devices(start_ns, until_ns), start_ns=start_ns, end_ns=until_ns))
            start_ns = until_ns
        return Conservation(tuple(h for p in parts for h in p.hours), tuple(f for p in parts for f in p.findings))

    async def _caller(self, request: web.Request) -> Caller:
        token = request.headers.get(TOKEN_HEADER, "")
        if not token:
            kind, _, token = request.headers.get("Authorization", "").partition(" ")
            token = token.strip() if kind.lower() == "bearer" else ""
        caller = await self._callers.of(token) if token else None
        if caller is None:
            raise _NotAuthenticated("The ledger does not know you.", why="There is no token for it, or it has ended.")
        return caller


# JSON forms; `adapter.ledger.client` reads them back -------------------------------------------------------------


def lease_json(interval: LeaseInterval) -> dict[str, Any]:
    return {**asdict(interval), "phase": interval.phase.value}


def activity_json(of: Activity) -> dict[str, Any]:
    return {
        "function": of.function,
        "namespace": of.namespace,
        "busy": [list(each) for each in of.busy],
        "last_busy_end_ns": of.last_busy_end_ns,
        "wakes_s": {rung.value: list(seconds) for rung, seconds in of.wakes_s.items()},
    }


def capacity_json(found: Conservation) -> dict[str, Any]:
    return {
        "hours": [{**asdict(hour), "tenants_ns": dict(hour.tenants_ns)} for hour in found.hours],
        "findings": [{**asdict(finding), "kind": finding.kind.value} for finding in found.findings],
    }


# Queries and errors -------------------------------------------------------------------------------------------


class _Denied(AdapterError):
    http_status = 403
    default_code = "forbidden"


class _NotAuthenticated(_Denied):
    http_status = 401
    default_code = "not-authenticated"


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except _Denied as error:
        return _json(error.to_json(), status=error.http_status)
    except LedgerError as error:  # the database is away: the same will do later
        logger.error("the ledger cannot be reached", extra={"fields": {"why": error.why, "hint": error.hint}})  # noqa: TRY400
        return _json(error.to_json(), status=503, headers={"Retry-After": "1"})
    except AdapterError as error:
        return _json(error.to_json(), status=error.http_status)
    except web.HTTPException as exc:
        body = {"error": {"code": "http", "message": exc.reason, "why": "", "hint": ""}}
        return _json(body, status=exc.status)


def _range(query: Mapping[str, str]) -> tuple[int, int]:
    start_ns, end_ns = _number(query, "start_ns"), _number(query, "end_ns")
    if start_ns >= end_ns:
        raise ConfigError("end_ns is not after start_ns.", code="bad-query")
    return start_ns, end_ns


def _number(query: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Raises `ConfigError` where it is missing, or no whole number that databases have."""
    text = query.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 18 + 1 or int(text) >= 2**63:
        raise ConfigError(f"{name} is {text!r}.", why="It has to be a whole number, zero or more.", code="bad-query")
    return int(text)


def _json(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.json_response(body, status=status, headers=headers)
