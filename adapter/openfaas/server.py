"""Runs a gateway over a host of this machine until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiohttp import web

from adapter.errors import AdapterError, ConfigError
from adapter.files import write_whole
from adapter.hosts.container import ContainerHost
from adapter.hosts.engine import Engine, socket_path
from adapter.hosts.folders import FunctionFolders
from adapter.hosts.ports import BACKLOG, listen
from adapter.hosts.process import ProcessHost
from adapter.keys import GATEWAY_FILE
from adapter.ledger.store import Ledger, ledger_url
from adapter.openfaas.api import make_app
from adapter.openfaas.auth import ensure_credentials
from adapter.openfaas.door import Door
from adapter.openfaas.file_catalog import FileCatalog
from adapter.openfaas.gateway import ConfigOf, Gateway, Look
from adapter.openfaas.logs import file_logs
from adapter.openfaas.recorder import LedgerRecorder
from adapter.openfaas.wire import FunctionDeployment

_KEEPALIVE_S = 75.0
_LAST_ANSWERS_S = 5.0
"""For answers still on their way to their callers when all replicas have ended."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What `gpufn up` was asked for. `port` 0 takes a free one.

    `host` is ``process``: functions are folders below `roots`; or ``container``: they are images, and reach the
    world through the engine's `network`.
    """

    state: Path
    roots: tuple[Path, ...]
    address: str = "127.0.0.1"
    port: int = 8080
    envs: Path | None = None
    auth: bool = True
    host: str = "process"
    network: str = ""


async def serve(settings: ServerSettings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the replicas at once, a third one us.

    `on_ready` gets the address. Raises `Conflict` where the port or the state folder is taken, `ConfigError` or
    `StorageError` where something in the state folder cannot be used.
    """
    stop = asyncio.Event()
    with listen(settings.address, settings.port) as listener:
        with _usable(settings.state):
            host, config_of = await _open_host(settings)
        _watch_signals(stop.set, host.kill)
        try:
            with _usable(settings.state):
                credentials = ensure_credentials(settings.state) if settings.auth else None
                inventory = await host.inventory()
                ledger = Ledger.open(ledger_url(settings.state))
                catalog, recorder = FileCatalog(settings.state), LedgerRecorder(ledger)
                look = None
                if isinstance(host, ContainerHost):
                    await _look_at_all(host, catalog)
                    look = _look_with(host)
                gateway = Gateway(
                    settings.state, host, catalog, recorder, file_logs(host.log_path), config_of, inventory, look=look
                )
        except BaseException:
            await host.close()
            raise
        with _told(settings.state, on_ready) as ready:
            await run_gateway(gateway, credentials, listener, stop, ready)


async def _open_host(settings: ServerSettings) -> tuple[ProcessHost | ContainerHost, ConfigOf]:
    """The host, and how the gateway learns what its functions are."""
    if settings.host == "container":
        engine = Engine(socket_path())
        containers = await ContainerHost.open(settings.state, engine, network=settings.network)
        return containers, containers.config
    folders = FunctionFolders(settings.roots)
    return ProcessHost(settings.state, folders, settings.envs), folders.config


def _look_with(host: ContainerHost) -> Look:
    async def look(wanted: FunctionDeployment) -> None:
        await host.look(wanted.image)

    return look


async def _look_at_all(host: ContainerHost, catalog: FileCatalog) -> None:
    """Those images of an earlier life that are still there; the others say so themselves."""
    for image in {entry.deployment.image for entry in catalog.functions()}:
        with suppress(AdapterError):
            await host.look(image, latest=False)  # a registry that is away must not hold up the start


@contextmanager
def _told(state: Path, on_ready: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """`on_ready`, which also writes the address where commands look for it, for as long as it is true."""
    path = state / GATEWAY_FILE

    def ready(url: str) -> None:
        with _usable(state):
            write_whole(path, url.encode())
        on_ready(url)

    try:
        yield ready
    finally:
        path.unlink(missing_ok=True)


async def run_gateway(
    gateway: Gateway,
    credentials: tuple[str, str] | None,
    listener: socket.socket,
    stop: asyncio.Event,
    on_ready: Callable[[str], None],
) -> None:
    """Serve `gateway` on `listener` until `stop` is set, then drain. Closes the gateway."""
    door = Door()
    app = make_app(gateway, credentials)
    app.middlewares.insert(0, door.watch)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # a caller that goes away gives its slot back
        access_log=None,
        keepalive_timeout=_KEEPALIVE_S,
        shutdown_timeout=_LAST_ANSWERS_S,
    )
    try:
        await runner.setup()
        gateway.start()
        assert runner.server is not None
        let_in = partial(door.let_in, runner.server)
        listening = await asyncio.get_running_loop().create_server(let_in, sock=listener, backlog=BACKLOG)
        on_ready(_url(listener))
        await stop.wait()
        listening.close()
    finally:
        await gateway.close()
        await runner.cleanup()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _usable(state: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigError(
            f"The state folder {state} cannot be used.",
            why=f"{exc.filename or state}: {exc.strerror}.",
            hint="Mend that, or choose another folder with --state.",
            code="bad-state",
        ) from exc


def _watch_signals(*steps: Callable[[], object]) -> None:
    """Each signal takes the next step; the last one ends this process."""
    loop, left = asyncio.get_running_loop(), iter(steps)

    def asked() -> None:
        step = next(left, None)
        if step is not None:
            step()
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        signal.raise_signal(signal.SIGINT)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
