"""How long a replica has been busy: its own counter, from the metrics that its entrypoint serves."""

from __future__ import annotations

import asyncio
import math

import aiohttp

BUSY = b"gpufn_busy_seconds_total"
_PORT = 8081
_LIMIT_S = 2.0
_LIMIT_BYTES = 2**20


async def busy_ns(session: aiohttp.ClientSession, ip: str, port: int = _PORT) -> int | None:
    """Nanoseconds; None where it does not say: it sleeps, starts, or is none of ours."""
    host = f"[{ip}]" if ":" in ip else ip
    try:
        async with session.get(
            f"http://{host}:{port}/metrics", timeout=aiohttp.ClientTimeout(total=_LIMIT_S), allow_redirects=False
        ) as response:
            text = await response.content.read(_LIMIT_BYTES) if response.status == 200 else b""
            while not response.content.at_eof() and len(text) < _LIMIT_BYTES:
                text += await response.content.read(_LIMIT_BYTES)
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError):
        return None
    return read_busy(text)


def read_busy(text: bytes) -> int | None:
    """Of an exposition; None where it has none, or no sensible one."""
    for line in text.splitlines():
        name, _, value = line.partition(b" ")
        if name == BUSY:
            try:
                seconds = float(value)
            except ValueError:
                return None
            return round(seconds * 1e9) if math.isfinite(seconds) and 0 <= seconds < 1e9 else None
    return None
