"""The asynchronous queue: `/async-function/…` accepted with 202, run later, answered by a callback.

Durable in one SQLite file (synchronous FULL): what was accepted survives a kill. Delivery is at least
once: an invocation that was running when the process died runs again, and so does one that was done but
could not be crossed off, because the disk was full until the process ended. sqlite3 and not the ledger's
SQLAlchemy, because these rows are work, not records: they are deleted when done.

Each function has a lane of its own, so that a slow one holds up no other; bodies stay on the disk until
their turn.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import TypeVar

import aiohttp
from multidict import CIMultiDict

from adapter.errors import AdapterError, ConfigError, Overloaded, StorageError
from adapter.hosts.background import Background
from adapter.keys import CALL_ID_HEADER, CALLBACK_HEADER, DURATION_HEADER
from adapter.openfaas.callbacks import ANYWHERE, Callbacks, Resolver
from adapter.openfaas.invocation import Invocation
from adapter.openfaas.proxy import error_status
from adapter.policy.budget import SPENT_CODE

logger = logging.getLogger(__name__)

LANE_WIDTH = 8
"""Invocations of one function that run at once; each waits for replicas like any other caller."""

LANE_LIMIT = 10_000
"""Invocations of one function that may wait; more get 503."""

RETRY_S = (1.0, 2.0, 5.0, 15.0)
"""Between attempts: of an invocation that found no room, of a callback that was not taken, and (the last one
again and again) of what the disk refuses."""

BUDGET_RETRY_S = 60.0
"""Between attempts while a budget is spent, none of which counts: its day ends, or somebody raises it."""

_RETRIED_STATUSES = frozenset({429, 503})
_CALLBACK_LIMIT_S = 10.0

Result = TypeVar("Result")
Answer = tuple[int, "CIMultiDict[str]", bytes]
Call = Callable[[str, Invocation], Awaitable[Answer]]


@dataclass
class _Lane:
    waiting: deque[int] = field(default_factory=deque)
    running: int = 0


class Queue:
    """`put` accepts. `call` performs an invocation of ``name.namespace`` and may raise `AdapterError`."""

    def __init__(self, path: Path, call: Call, callbacks: Callbacks = ANYWHERE) -> None:
        self._call = call
        self._callbacks = callbacks
        self._jobs = _Jobs(path)
        self._disk = ThreadPoolExecutor(1, "queue")  # one thread, one connection
        self._lanes: dict[str, _Lane] = {}
        self._background = Background()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=Resolver(callbacks)),
            timeout=aiohttp.ClientTimeout(total=_CALLBACK_LIMIT_S),
            cookie_jar=aiohttp.DummyCookieJar(),  # what one function's receiver sets is not for another's
        )

    def start(self) -> None:
        """Take up what an earlier life accepted."""
        for number, function in self._jobs.at_first:
            self._enqueue(function, number)

    async def put(self, function: str, invocation: Invocation) -> None:
        """Returns when it is on the disk. Raises `ConfigError` for a callback that is none, `Overloaded`, `StorageError`."""
        if (url := invocation.headers.get(CALLBACK_HEADER)) is not None:
            self._callbacks.check(url)
        lane = self._lanes.get(function)
        if lane is not None and len(lane.waiting) >= LANE_LIMIT:
            raise Overloaded(
                f"Too many asynchronous invocations of {function} wait.",
                why=f"{LANE_LIMIT} do already.",
                hint="Retry later.",
                code="queue-full",
                retry_after_s=10,
            )
        try:
            number = await self._on_disk(self._jobs.add, function, invocation)
        except sqlite3.Error as exc:
            raise StorageError(
                "The asynchronous queue cannot be written.",
                why=f"{exc}.",
                hint="Make room on the disk of the gateway's state folder, then retry.",
                code="queue-unwritable",
                retry_after_s=10,
            ) from exc
        self._enqueue(function, number)

    async def close(self) -> None:
        """What is not done stays on the disk."""
        self._background.cancel()
        await self._background.join()
        await self._session.close()
        await self._on_disk(self._jobs.close)
        self._disk.shutdown()

    def _enqueue(self, function: str, number: int) -> None:
        self._lanes.setdefault(function, _Lane()).waiting.append(number)
        self._advance(function)

    def _advance(self, function: str) -> None:
        lane = self._lanes[function]
        while lane.waiting and lane.running < LANE_WIDTH:
            lane.running += 1
            self._background.run(self._work(function, lane, lane.waiting.popleft()))
        if not lane.running:
            del self._lanes[function]

    async def _work(self, function: str, lane: _Lane, number: int) -> None:
        try:
            await self._run(function, await self._insist(self._jobs.get, number))
        except Exception:  # boundary: one invocation's trouble is not the lane's
            logger.exception("an asynchronous invocation failed", extra={"fields": {"function": function}})
        lane.running -= 1
        self._advance(function)
        await self._insist(self._jobs.remove, number)

    async def _insist(self, work: Callable[[int], Result], number: int) -> Result:
        """Try until the disk lets it happen: it may be full for a while. What is under way outlives `close`."""
        for wait_s in chain(RETRY_S, repeat(RETRY_S[-1])):
            try:
                return await asyncio.shield(self._on_disk(work, number))
            except sqlite3.OperationalError as exc:
                logger.warning("the queue's disk refuses", extra={"fields": {"job": number, "why": str(exc)}})
            await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    async def _on_disk(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._disk, lambda: work(*arguments))

    # One invocation -----------------------------------------------------------------------------

    async def _run(self, function: str, invocation: Invocation) -> None:
        began = time.monotonic()
        status, headers, body = await self._answer(function, invocation)
        url = invocation.headers.get(CALLBACK_HEADER)
        if not url:
            return
        for name in ("Content-Length", "Date", "Server"):
            headers.popall(name, None)
        headers[CALL_ID_HEADER] = invocation.call_id
        headers[DURATION_HEADER] = f"{time.monotonic() - began:.6f}"
        headers["X-Function-Status"] = str(status)
        headers["X-Function-Name"] = function
        await self._deliver(url, headers, body)

    async def _answer(self, function: str, invocation: Invocation) -> Answer:
        """The function's answer; where there was no room, it is asked again."""
        for wait_s in (*RETRY_S, None):
            try:
                answer = await self._affordable(function, invocation)
                after_s: float | None = _seconds(answer[1].get("Retry-After"))
            except AdapterError as error:
                kind = CIMultiDict({"Content-Type": "application/json"})
                answer = (error_status(error), kind, json.dumps(error.to_json()).encode())
                after_s = error.retry_after_s
            if wait_s is None or answer[0] not in _RETRIED_STATUSES:
                return answer
            await asyncio.sleep(max(wait_s, after_s or 0))
        raise AssertionError("unreachable")

    async def _affordable(self, function: str, invocation: Invocation) -> Answer:
        """What the call gives or raises, once the function's budget is open."""
        while True:
            try:
                return await self._call(function, invocation)
            except AdapterError as error:
                if error.code != SPENT_CODE:
                    raise
                await asyncio.sleep(min(BUDGET_RETRY_S, error.retry_after_s or 0))

    async def _deliver(self, url: str, headers: CIMultiDict[str], body: bytes) -> None:
        problem = ""
        for wait_s in (*RETRY_S, None):
            try:
                self._callbacks.check(url)  # an earlier life may have taken it
                async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                    if _is_taken(response.status):
                        return
                    problem = f"status {response.status}"
            except ConfigError as exc:
                problem = f"{exc.message} {exc.why}"
                break
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
                problem = str(exc) or type(exc).__name__
            if wait_s is not None:
                await asyncio.sleep(wait_s)
        logger.error("a callback was not taken", extra={"fields": {"call_id": headers[CALL_ID_HEADER], "why": problem}})


class _Jobs:
    """Accepted invocations on the disk. One connection; used by one thread at a time.

    Raises `StorageError` where the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._database = sqlite3.connect(path, timeout=10, check_same_thread=False)
            path.chmod(0o600)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            with self._database as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, function TEXT NOT NULL,"
                    " method TEXT NOT NULL, path TEXT NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL)"
                )
            self.at_first = list(database.execute("SELECT number, function FROM jobs ORDER BY number"))
            """Numbers and functions of an earlier life, oldest first."""
        except sqlite3.Error as exc:
            raise StorageError(
                f"The asynchronous queue {path} cannot be opened.",
                why=f"{exc}.",
                hint="Move it away to begin with an empty one; what was accepted and is not done yet is lost then.",
                code="queue-damaged",
            ) from exc

    def add(self, function: str, invocation: Invocation) -> int:
        row = (
            function,
            invocation.method,
            invocation.path,
            json.dumps(list(invocation.headers.items())),
            invocation.body,
        )
        with self._database as database:
            done = database.execute("INSERT INTO jobs (function, method, path, headers, body) VALUES (?,?,?,?,?)", row)
        assert done.lastrowid is not None
        return done.lastrowid

    def get(self, number: int) -> Invocation:
        query = "SELECT method, path, headers, body FROM jobs WHERE number = ?"
        method, path, headers, body = self._database.execute(query, (number,)).fetchone()
        return Invocation(method, path, CIMultiDict(json.loads(headers)), body)

    def remove(self, number: int) -> None:
        with self._database as database:
            database.execute("DELETE FROM jobs WHERE number = ?", (number,))

    def close(self) -> None:
        self._database.close()


def _is_taken(status: int) -> bool:
    """A refusal is an answer too. A redirect is none: following it would lose the body, or send it to strangers."""
    return status < 300 or (400 <= status < 500 and status != 429)


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdecimal() else 0.0
