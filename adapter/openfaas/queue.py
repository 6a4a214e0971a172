"""The asynchronous queue: `/async-function/…` accepted with 202, run later, answered by a callback.

Durable in one SQLite file (synchronous FULL): what was accepted survives a kill. Delivery is at least
once: an invocation that was running when the process died runs again. sqlite3 and not the ledger's
SQLAlchemy, because these rows are work, not records: they are deleted when done.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from multidict import CIMultiDict

from adapter.errors import AdapterError
from adapter.keys import CALL_ID_HEADER, CALLBACK_HEADER, DURATION_HEADER
from adapter.openfaas.proxy import Invocation

logger = logging.getLogger(__name__)

WORKERS = 8
"""Invocations that run at once; each waits for its function's replicas like any other caller."""

_ATTEMPTS = 5
_RETRY_S = (1.0, 2.0, 5.0, 15.0)
_CALLBACK_TIMEOUT_S = 10.0

Call = Callable[[str, Invocation], Awaitable[tuple[int, "CIMultiDict[str]", bytes]]]


@dataclass(frozen=True, slots=True)
class Job:
    """An accepted invocation of `function` (``name.namespace``)."""

    number: int
    function: str
    invocation: Invocation


class Queue:
    """`put` accepts, workers run. `call` performs an invocation and may raise `AdapterError`."""

    def __init__(self, path: Path, call: Call) -> None:
        self._path = path
        self._call = call
        self._ready: asyncio.Queue[Job] = asyncio.Queue()
        self._workers: list[asyncio.Task[None]] = []
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_CALLBACK_TIMEOUT_S))
        with closing(self._connect()) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, function TEXT NOT NULL,"
                " method TEXT NOT NULL, path TEXT NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL)"
            )
        path.chmod(0o600)

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=10)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        return database

    def start(self) -> None:
        """Take up what an earlier life accepted, then work."""
        with closing(self._connect()) as database:
            for number, function, method, path, headers, body in database.execute(
                "SELECT number, function, method, path, headers, body FROM jobs ORDER BY number"
            ):
                kept = CIMultiDict((name, value) for name, value in json.loads(headers))
                self._ready.put_nowait(Job(number, function, Invocation(method, path, kept, body)))
        self._workers = [asyncio.create_task(self._work()) for _ in range(WORKERS)]

    async def put(self, function: str, invocation: Invocation) -> None:
        """Returns when it is on the disk."""
        number = await asyncio.to_thread(self._store, function, invocation)
        self._ready.put_nowait(Job(number, function, invocation))

    def _store(self, function: str, invocation: Invocation) -> int:
        headers = json.dumps(list(invocation.headers.items()))
        row = (function, invocation.method, invocation.path, headers, invocation.body)
        with closing(self._connect()) as database, database:
            done = database.execute("INSERT INTO jobs (function, method, path, headers, body) VALUES (?,?,?,?,?)", row)
            return int(done.lastrowid or 0)

    def _forget(self, number: int) -> None:
        with closing(self._connect()) as database, database:
            database.execute("DELETE FROM jobs WHERE number = ?", (number,))

    async def close(self) -> None:
        """What is not done stays on the disk."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await self._session.close()

    async def _work(self) -> None:
        while True:
            job = await self._ready.get()
            try:
                await self._run(job)
            except Exception:
                logger.exception("an asynchronous invocation failed", extra={"fields": {"function": job.function}})
            await asyncio.to_thread(self._forget, job.number)

    async def _run(self, job: Job) -> None:
        began = time.monotonic()
        status, headers, body = await self._answer(job)
        callback = job.invocation.headers.get(CALLBACK_HEADER)
        if not callback:
            return
        facts = {
            CALL_ID_HEADER: job.invocation.call_id,
            DURATION_HEADER: f"{time.monotonic() - began:.6f}",
            "X-Function-Status": str(status),
            "X-Function-Name": job.function,
            "Content-Type": headers.get("Content-Type", "application/octet-stream"),
        }
        await self._deliver(callback, facts, body)

    async def _answer(self, job: Job) -> tuple[int, CIMultiDict[str], bytes]:
        """The function's answer; errors that pass (no room, a start that failed) are tried again."""
        for attempt in range(_ATTEMPTS):
            try:
                return await self._call(job.function, job.invocation)
            except AdapterError as error:
                if error.retry_after_s is None or attempt == _ATTEMPTS - 1:
                    kind = CIMultiDict({"Content-Type": "application/json"})
                    return error.http_status, kind, json.dumps(error.to_json()).encode()
                await asyncio.sleep(error.retry_after_s)
        raise AssertionError("unreachable")

    async def _deliver(self, url: str, headers: dict[str, str], body: bytes) -> None:
        for wait_s in (*_RETRY_S, None):
            try:
                async with self._session.post(url, data=body, headers=headers) as response:
                    if response.status < 500:
                        return
                    problem = f"status {response.status}"
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
                problem = str(exc) or type(exc).__name__
            if wait_s is None:
                fields = {"fields": {"call_id": headers[CALL_ID_HEADER], "why": problem}}
                logger.error("a callback was not taken", extra=fields)
                return
            await asyncio.sleep(wait_s)
