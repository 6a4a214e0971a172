"""Connections that end with the client that opened them, and answers that are no longer than they may be."""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakSet

import aiohttp
from aiohttp.connector import Connection


class Connections(aiohttp.TCPConnector):
    """As many as are asked for; once `close` returns, none is open.

    aiohttp forgets a connection when it begins to close it, as it does where an answer is given up in the middle: a
    watch that is cancelled. Over TLS that end comes when the server has agreed to it, or half a minute later.
    """

    def __init__(self) -> None:
        super().__init__(limit=0)
        self._opened: WeakSet[asyncio.Transport] = WeakSet()

    async def connect(self, *args: Any, **kwargs: Any) -> Connection:
        connection = await super().connect(*args, **kwargs)
        if connection.transport is not None:
            self._opened.add(connection.transport)
        return connection

    async def close(self, **options: Any) -> None:
        await super().close(**options)
        for transport in tuple(self._opened):
            transport.abort()
        await asyncio.sleep(0)  # what is aborted, here or in a handshake, is closed in the loop's next turn


async def body_of(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes | None:
    """None where it is longer. Of a client that does not unpack what it gets: packed, it could be of any length."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > limit_bytes:
            return None
    return bytes(body)
