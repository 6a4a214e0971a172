"""Serving HTTP from a pod: listening, and ending without cutting off who is being answered."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

KEEPALIVE_S = 120.0
"""Longer than the API server keeps a connection it does not use, so that it never sends on one that we just closed."""
_LAST_ANSWERS_S = 10.0


@asynccontextmanager
async def served(
    app: web.Application, port: int, *, address: str | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """`app` on `port` (0: a free one), at all addresses or one; the port. At the end what was asked is answered."""
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        keepalive_timeout=KEEPALIVE_S,
        shutdown_timeout=_LAST_ANSWERS_S,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, address, port, ssl_context=tls, reuse_address=True).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
