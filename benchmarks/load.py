"""A load generator: connections that stay open, each with one request at a time, and their latencies.

Raw asyncio protocols, so that it costs little beside what it measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


def request_bytes(path: str, body: bytes, *, close: bool = False) -> bytes:
    connection = "close" if close else "keep-alive"
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: {connection}\r\n\r\n"
    ).encode() + body


@dataclass
class Load:
    """What came of it: latencies of right answers in seconds, and what else came."""

    seconds: float
    latencies_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def rps(self) -> float:
        return len(self.latencies_s) / self.seconds

    def quantile_s(self, share: float) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    """Send one request; status and body of its answer."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    status = int(head[9:12])
    at = lower.find(b"content-length:")
    if at >= 0:
        return status, await reader.readexactly(int(lower[at + 15 : lower.index(b"\r\n", at)]))
    if b"transfer-encoding: chunked" not in lower:
        return status, await reader.read()
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return status, body


def run_load(port: int, request: bytes, *, connections: int, seconds: float, expected: bytes | None = None) -> Load:
    """Keep `connections` busy for `seconds`. An answer is right with status 200 and, where given, `expected`."""
    return asyncio.run(_run_load(port, request, connections, seconds, expected))


async def _run_load(port: int, request: bytes, connections: int, seconds: float, expected: bytes | None) -> Load:
    load = Load(seconds)
    deadline = time.perf_counter() + seconds

    async def keep_busy() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while (began := time.perf_counter()) < deadline:
                status, body = await exchange(reader, writer, request)
                if status == 200 and expected in (None, body):
                    load.latencies_s.append(time.perf_counter() - began)
                else:
                    load.wrong.append(f"{status} {body[:100]!r}")
        finally:
            writer.close()

    await asyncio.gather(*(keep_busy() for _ in range(connections)))
    return load


def send_at_once(port: int, requests: Sequence[bytes], limit_s: float) -> list[tuple[int, bytes] | str]:
    """One connection for each of `requests`, all sent before any is answered; answers, or what went wrong."""

    async def one(request: bytes) -> tuple[int, bytes] | str:
        writer = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            return await asyncio.wait_for(exchange(reader, writer, request), limit_s)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            return repr(error)
        finally:
            if writer is not None:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def everybody() -> list[tuple[int, bytes] | str]:
        return list(await asyncio.gather(*(one(request) for request in requests)))

    return asyncio.run(everybody())
