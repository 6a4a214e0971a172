"""``python -m adapter.ledger``: the ledger service of a cluster, stateless over its database."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import AsyncExitStack

from aiohttp import web

from adapter import logs
from adapter.cluster.api import Api
from adapter.cluster.backoff import pause_s
from adapter.cluster.credentials import Credentials
from adapter.errors import AdapterError, LedgerError
from adapter.ledger.callers import ReviewedCallers
from adapter.ledger.metrics import Metrics
from adapter.ledger.server import LedgerService
from adapter.ledger.settings import LedgerSettings
from adapter.ledger.store import Ledger
from adapter.policy.conservation import HOUR_NS

logger = logging.getLogger(__name__)

_LOOK_S = 60.0
"""How often this hour's GPU time is added up."""
_FRESH_S = 15.0
"""How long the database's last answer says that it is there."""


async def serve(settings: LedgerSettings) -> None:
    """Until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    metrics = Metrics()
    status = Status(metrics)
    async with AsyncExitStack() as stack:
        await _listen(stack, status.application(), settings.status_port)
        opening = asyncio.ensure_future(_opened(settings.url))
        stop = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({opening, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            opening.cancel()
            return
        ledger = opening.result()
        stack.callback(ledger.close)
        api = await stack.enter_async_context(Api(Credentials()))
        service = LedgerService(ledger, ReviewedCallers(api), metrics)
        status.ledger = ledger
        looking = asyncio.ensure_future(_look(service, metrics))
        stack.callback(looking.cancel)
        await _listen(stack, service.application(), settings.port, tls_dir=settings.tls_dir)
        logger.info("the ledger serves", extra={"fields": {"port": settings.port}})
        await stop


class Status:
    """What kubelets and Prometheus ask."""

    def __init__(self, metrics: Metrics) -> None:
        self.ledger: Ledger | None = None
        self._metrics = metrics
        self._answered_at = float("-inf")

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/healthz", self._alive)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._text)
        return app

    async def _alive(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _ready(self, _request: web.Request) -> web.Response:
        if self.ledger is None:
            return web.Response(status=503, text="the database has not answered yet")
        if time.monotonic() - self._answered_at > _FRESH_S:
            try:
                await asyncio.to_thread(self.ledger.ping)
            except LedgerError as error:
                return web.Response(status=503, text=f"{error.message} {error.why}")
            self._answered_at = time.monotonic()
        return web.Response(text="ok")

    async def _text(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), content_type="text/plain", charset="utf-8")


async def _opened(url: str) -> Ledger:
    """The ledger, as soon as its database lets us."""
    attempt = 0
    while True:
        try:
            return await asyncio.to_thread(Ledger.open, url)
        except LedgerError as error:
            if error.code in ("ledger-url", "ledger-driver", "ledger-too-new"):
                raise
            attempt += 1
            logger.warning("the database does not answer", extra={"fields": {"why": error.why, "hint": error.hint}})
            await asyncio.sleep(pause_s(attempt, first_s=0.5, limit_s=15.0))


async def _look(service: LedgerService, metrics: Metrics) -> None:
    while True:
        now_ns = time.time_ns()
        try:
            found = await asyncio.to_thread(service.conservation, (now_ns // HOUR_NS - 1) * HOUR_NS, now_ns)
            metrics.show(found)
        except LedgerError as error:
            logger.warning("GPU time cannot be added up", extra={"fields": {"why": error.why}})
        await asyncio.sleep(_LOOK_S)


async def _listen(stack: AsyncExitStack, app: web.Application, port: int, *, tls_dir: str = "") -> None:
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, port=port).start()


def main() -> int:
    logs.setup()
    try:
        asyncio.run(serve(LedgerSettings.from_env(os.environ)))
    except AdapterError as error:
        print(error.to_text(), file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
