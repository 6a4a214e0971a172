"""How many connections a gateway holds: whoever comes is let in, and where it is full somebody idle goes for him.

Without a bound, whoever opens connections and says nothing takes every descriptor, and neither callers nor
health checks get in any more. A connection with a request is never closed.
"""

from __future__ import annotations

import asyncio
import resource

from aiohttp import web
from aiohttp.typedefs import Handler

_RATIO = 0.5
"""Of the descriptors that this process may open: replicas, and the connections to them, need the rest."""


class Door:
    """Makes the protocol of each new connection of `server`, and knows which ones are busy."""

    def __init__(self) -> None:
        self._limit = int(_RATIO * resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._busy: set[asyncio.Transport | None] = set()

    @web.middleware
    async def watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The outermost middleware."""
        transport = request.transport
        self._busy.add(transport)
        try:
            return await handler(request)
        finally:
            self._busy.discard(transport)

    def let_in(self, server: web.Server) -> asyncio.Protocol:
        """The protocol of a connection that was just accepted."""
        held = server.connections  # oldest first
        if len(held) >= self._limit:
            idle = next((one for one in held if one.transport is not None and one.transport not in self._busy), None)
            if idle is not None:
                idle.force_close()
        return server()
