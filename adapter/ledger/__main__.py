"""``python -m adapter.ledger``: the ledger service of a cluster, stateless over its database."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

from adapter.cluster.api import Api
from adapter.cluster.backoff import pause_s
from adapter.cluster.component import run, stop_asked, until
from adapter.cluster.credentials import Credentials
from adapter.cluster.health import Health
from adapter.cluster.serving import served
from adapter.cluster.tls import ServingTls
from adapter.errors import LedgerError
from adapter.ledger.callers import ReviewedCallers
from adapter.ledger.metrics import Metrics
from adapter.ledger.server import LedgerService
from adapter.ledger.settings import LedgerSettings
from adapter.ledger.store import Ledger
from adapter.policy.conservation import HOUR_NS
from adapter.settings import from_environment

logger = logging.getLogger(__name__)

_LOOK_S = 60.0
"""How often this hour's GPU time is added up."""
_PING_S = 5.0
_HOPELESS = frozenset({"ledger-url", "ledger-driver", "ledger-too-new"})
"""Codes of errors that do not pass."""


class Database:
    """The ledger's, as soon as it answers and for as long as it does."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.why_not = "it has not answered yet"

    async def opened(self) -> Ledger:
        """Raises `LedgerError` where waiting would not help."""
        attempt = 0
        while True:
            try:
                ledger = await asyncio.to_thread(Ledger.open, self._url)
            except LedgerError as error:
                if error.code in _HOPELESS:
                    raise
                attempt += 1
                fields = {"why": error.why, "hint": error.hint}
                logger.warning("the database does not answer", extra={"fields": fields})
                await asyncio.sleep(pause_s(attempt, first_s=0.5, limit_s=15.0))
            else:
                self.why_not = ""
                return ledger

    async def watch(self, ledger: Ledger) -> None:
        while True:
            await asyncio.sleep(_PING_S)
            try:
                await asyncio.to_thread(ledger.ping)
                self.why_not = ""
            except LedgerError as error:
                self.why_not = error.why


async def serve(settings: LedgerSettings) -> None:
    """Until SIGTERM or SIGINT."""
    stop = stop_asked()
    metrics, database = Metrics(), Database(settings.url)
    health = Health(metrics.registry)
    health.ready["database"] = lambda: database.why_not
    async with served(health.app(), settings.status_port):
        await until(stop.wait(), _serve(settings, database, health, metrics))


async def _serve(settings: LedgerSettings, database: Database, health: Health, metrics: Metrics) -> None:
    async with AsyncExitStack() as stack:
        ledger = await database.opened()
        stack.callback(ledger.close)
        api = await stack.enter_async_context(Api(Credentials()))
        service = LedgerService(ledger, ReviewedCallers(api), metrics)
        works = [database.watch(ledger), _look(service, metrics)]
        tls = ServingTls(Path(settings.tls_dir)) if settings.tls_dir else None
        if tls is not None:
            tls.look()
            health.ready["certificate"] = lambda: "" if tls.loaded else f"there is none in {settings.tls_dir}"
            works.append(tls.watch())
        context = None if tls is None else tls.context
        await stack.enter_async_context(served(service.application(), settings.port, tls=context))
        logger.info("the ledger serves", extra={"fields": {"port": settings.port, "tls": tls is not None}})
        await asyncio.gather(*works)


async def _look(service: LedgerService, metrics: Metrics) -> None:
    """Add up the GPU time of this hour and the last, again and again."""
    while True:
        now_ns = time.time_ns()
        try:
            found = await asyncio.to_thread(service.conservation, (now_ns // HOUR_NS - 1) * HOUR_NS, now_ns)
            metrics.show(found)
        except LedgerError as error:
            logger.warning("GPU time cannot be added up", extra={"fields": {"why": error.why}})
        await asyncio.sleep(_LOOK_S)


def main() -> int:
    return run(lambda: serve(from_environment(LedgerSettings, os.environ)))


if __name__ == "__main__":
    sys.exit(main())
