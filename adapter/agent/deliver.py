"""Records from the spool to the ledger: at least once, in order, for as long as it takes."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from adapter.agent.metrics import Metrics
from adapter.agent.spool import Spool
from adapter.cluster.backoff import pause_s
from adapter.errors import AdapterError, Unavailable
from adapter.ledger.wire import to_line

logger = logging.getLogger(__name__)

_BATCH = 1000
_LIMIT_S = 30.0
_FIRST_PAUSE_S, _PAUSE_LIMIT_S = 1.0, 60.0
_LOOK_S = 10.0


class Ledger:
    """The service. Its token and authority are files that others renew: they are read for each call."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder
        self._tls: tuple[bytes, ssl.SSLContext] | None = None

    async def send(self, session: aiohttp.ClientSession, body: bytes) -> dict[str, Any]:
        """Its answer. Raises `Unavailable`."""
        try:
            token = (self._folder / "token").read_text().strip()
            async with session.post(
                f"{self._url}/v1/records",
                data=body,
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/x-ndjson"},
                ssl=self._context(),
                timeout=aiohttp.ClientTimeout(total=_LIMIT_S),
                allow_redirects=False,
            ) as response:
                answer = await response.json(content_type=None)
                if response.status != 200 or not isinstance(answer, dict):
                    raise _refused(response.status, answer)
                return answer
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as exc:
            raise Unavailable(
                "The ledger cannot be reached.", why=f"{type(exc).__name__}: {exc}"[:300], code="ledger-unreachable"
            ) from exc

    def _context(self) -> ssl.SSLContext | bool:
        """Trusts the ledger's own authority and nobody else's."""
        if urlsplit(self._url).scheme != "https":
            return True
        authority = (self._folder / "ca.crt").read_bytes()
        if self._tls is None or self._tls[0] != authority:
            context = ssl.create_default_context(cadata=authority.decode())
            self._tls = authority, context
        return self._tls[1]


def _refused(status: int, answer: object) -> Unavailable:
    error = answer.get("error") if isinstance(answer, dict) else None
    said = error if isinstance(error, dict) else {}
    why = " ".join(str(said.get(name) or "") for name in ("message", "why")).strip()
    return Unavailable("The ledger takes no records.", why=f"{status}: {why}"[:300], code="ledger-refused")


class Delivery:
    """One spool's. `on_clock` is told the ledger's time of each answer."""

    def __init__(self, spool: Spool, ledger: Ledger, metrics: Metrics, on_clock: Callable[[int], None]) -> None:
        self._spool, self._ledger = spool, ledger
        self._metrics, self._on_clock = metrics, on_clock
        self.more = asyncio.Event()
        """Set by whoever has put records into the spool."""

    async def run(self) -> None:
        """Until it is cancelled."""
        attempt = 0
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    is_done = await self.once(session)
                except AdapterError as error:
                    attempt += 1
                    self._metrics.failures.labels("ledger").inc()
                    logger.warning("records wait", extra={"fields": {"code": error.code, "why": error.why}})
                    await asyncio.sleep(pause_s(attempt, first_s=_FIRST_PAUSE_S, limit_s=_PAUSE_LIMIT_S))
                    continue
                attempt = 0
                if is_done:
                    self.more.clear()
                    try:
                        await asyncio.wait_for(self.more.wait(), _LOOK_S)
                    except asyncio.TimeoutError:
                        pass

    async def once(self, session: aiohttp.ClientSession) -> bool:
        """Deliver the oldest; whether these were all. Raises `AdapterError`: nothing is acknowledged then."""
        batch = await asyncio.to_thread(self._spool.pending, _BATCH)
        if not batch:
            return True
        answer = await self._ledger.send(session, b"".join(to_line(seq, record) for seq, record in batch))
        acked, rejected, now_ns = answer.get("acked"), answer.get("rejected"), answer.get("now_ns")
        if not isinstance(acked, int) or acked < batch[0][0] or not isinstance(rejected, list):
            raise Unavailable("The ledger's answer makes no sense.", why=json.dumps(answer)[:200], code="ledger-answer")
        await asyncio.to_thread(self._spool.ack, acked)
        left = self._spool.unacked
        self._metrics.unacked.set(left)
        self._metrics.spool_bytes.set(self._spool.size_bytes)
        for refusal in rejected:
            code = str(refusal.get("code") if isinstance(refusal, dict) else "unknown")[:40]
            self._metrics.refused.labels(code).inc()
            logger.error("the ledger refuses a record", extra={"fields": {"refusal": refusal}})
        if isinstance(now_ns, int):
            self._on_clock(now_ns)
        return not left
