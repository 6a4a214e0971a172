"""Records from the spool to the ledger: at least once, in order, for as long as it takes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress

from adapter.agent.metrics import Metrics
from adapter.agent.spool import Spool
from adapter.cluster.backoff import pause_s
from adapter.errors import AdapterError, Unavailable
from adapter.ledger.connection import LedgerConnection
from adapter.ledger.wire import to_line

logger = logging.getLogger(__name__)

_BATCH = 1000
_FIRST_PAUSE_S, _PAUSE_LIMIT_S = 1.0, 60.0
_LOOK_S = 10.0


class Delivery:
    """One spool's. `on_clock` is told the ledger's time of each answer."""

    def __init__(
        self, spool: Spool, ledger: LedgerConnection, metrics: Metrics, on_clock: Callable[[int], None]
    ) -> None:
        self._spool, self._ledger = spool, ledger
        self._metrics, self._on_clock = metrics, on_clock
        self.more = asyncio.Event()
        """Set by whoever has put records into the spool."""

    async def run(self) -> None:
        """Until it is cancelled."""
        attempt = 0
        while True:
            self.more.clear()  # what comes from here on may not be seen in this look
            try:
                is_done = await self.once()
            except AdapterError as error:
                attempt += 1
                self._metrics.failures.labels("ledger").inc()
                logger.warning("records wait", extra={"fields": {"code": error.code, "why": error.why}})
                await asyncio.sleep(pause_s(attempt, first_s=_FIRST_PAUSE_S, limit_s=_PAUSE_LIMIT_S))
                continue
            attempt = 0
            if is_done:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.more.wait(), _LOOK_S)

    async def once(self) -> bool:
        """Deliver the oldest; whether these were all. Raises `AdapterError`: nothing is acknowledged then."""
        batch = await asyncio.to_thread(self._spool.pending, _BATCH)
        if not batch:
            return True
        answer = await self._ledger.deliver(b"".join(to_line(seq, record) for seq, record in batch))
        said = answer if isinstance(answer, dict) else {}
        acked, rejected, now_ns = said.get("acked"), said.get("rejected"), said.get("now_ns")
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
