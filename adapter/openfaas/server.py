"""Runs a gateway over the process host until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from adapter.hosts.folders import FunctionFolders
from adapter.hosts.ports import port_conflict
from adapter.hosts.process import ProcessHost
from adapter.ledger.store import Ledger, ledger_url
from adapter.openfaas.api import make_app
from adapter.openfaas.auth import BasicAuth, ensure_password
from adapter.openfaas.gateway import Gateway

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What `gpufn up` was asked for. `port` 0 takes a free one."""

    state: Path
    roots: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    envs: Path | None = None
    auth: bool = True


async def serve(settings: ServerSettings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends it at once.

    `on_ready` gets the address. Raises `Conflict` where the port or the state folder is taken.
    """
    stop = asyncio.Event()
    _watch_signals(stop)
    folders = FunctionFolders(settings.roots)
    host = ProcessHost(settings.state, folders, settings.envs)
    gateway = Gateway(settings.state, host, Ledger.open(ledger_url(settings.state)), folders.resolve)
    auth = BasicAuth(ensure_password(settings.state) if settings.auth else None)
    runner = web.AppRunner(
        make_app(gateway, auth), handler_cancellation=True, access_log=None, keepalive_timeout=75, shutdown_timeout=5
    )
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.port, backlog=1024)
    try:
        await gateway.start()
        await _listen(site, settings)
        on_ready(f"http://{_address(runner)}")
        await stop.wait()
    finally:
        await site.stop() if site in runner.sites else None
        await gateway.close()
        await runner.cleanup()


async def _listen(site: web.TCPSite, settings: ServerSettings) -> None:
    try:
        await site.start()
    except OSError as exc:
        raise port_conflict(settings.host, settings.port, exc) from exc


def _address(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _watch_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            signal.raise_signal(signal.SIGINT)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
