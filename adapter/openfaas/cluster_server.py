"""Runs a gateway over the pods of a cluster until it is told to stop.

It serves requests as soon as it knows which functions and pods there are (`/readyz` on the status port says so). When it
is told to stop, it takes no more (a preStop hook gives Services the time to know), and ends when what came is answered,
or after half a minute. Functions' pods stay, and the next provider takes them back.

Rights: `adapter.openfaas.cluster_catalog` and `adapter.hosts.kubernetes` say which.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from aiohttp import web

from adapter.cluster.api import Api, Pace
from adapter.cluster.credentials import Credentials
from adapter.errors import ConfigError
from adapter.hosts.kubernetes import Facts, KubernetesHost
from adapter.hosts.ports import listen
from adapter.keys import PASSWORD_FILE, USER_FILE
from adapter.ledger import client
from adapter.ledger.connection import LedgerConnection
from adapter.openfaas.callbacks import Callbacks
from adapter.openfaas.cluster_catalog import ClusterCatalog, Membership
from adapter.openfaas.cluster_logs import pod_logs
from adapter.openfaas.cluster_secrets import ClusterSecrets
from adapter.openfaas.cluster_settings import ProviderSettings
from adapter.openfaas.gateway import Gateway
from adapter.openfaas.images import Images
from adapter.openfaas.recorder import RecentStarts
from adapter.openfaas.server import run_gateway
from adapter.openfaas.wire import DEFAULT_NAMESPACE

logger = logging.getLogger(__name__)

_PACE = 100.0, 400
"""Calls of the API server a second, and at once: a wake must not wait for its turn behind a rollout of many functions."""


async def serve(settings: ProviderSettings, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then leave; a second signal ends us at once.

    `on_ready` gets the address. Raises `ConfigError`, `Conflict`.
    """
    stop = asyncio.Event()
    _watch_signals(stop)
    credentials = _credentials(Path(settings.credentials)) if settings.auth else None
    state = Path(settings.state)
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"The state folder {state} cannot be used.", why=f"{exc.strerror}.") from exc
    async with Api(Credentials(Path(settings.kubeconfig) if settings.kubeconfig else None), pace=Pace(*_PACE)) as api:
        with listen(settings.address, settings.port) as listener:
            async with opened(api, settings) as (gateway, is_current):
                ready = _Readiness(is_current, stop)
                async with _status(settings, gateway, ready):

                    def now_ready(url: str) -> None:
                        ready.serves = True
                        logger.info("the provider serves", extra={"fields": {"address": url}})
                        if on_ready is not None:
                            on_ready(url)

                    await run_gateway(gateway, credentials, listener, stop, now_ready)


@asynccontextmanager
async def opened(api: Api, settings: ProviderSettings) -> AsyncIterator[tuple[Gateway, Callable[[], bool]]]:
    """The gateway, not started yet, once what there is in the cluster is known; and whether that is not old."""
    secrets = ClusterSecrets(api)
    images = Images(secrets.docker_configs, settings.insecure_registries)
    membership = Membership(settings.function_role, settings.service_account, await api.namespace())
    catalog = ClusterCatalog(api, secrets, DEFAULT_NAMESPACE, images.look, membership)
    facts = Facts(catalog.uid, catalog.keeps_snapshots, secrets.for_pulling)
    host = KubernetesHost(api, facts, pull_policy=settings.pull_policy)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(host.close)
        stack.push_async_callback(catalog.close)
        ledger = await stack.enter_async_context(LedgerConnection())
        await catalog.open(host.add_namespace, host.drop_namespace)
        await host.synced()
        gateway = Gateway(
            Path(settings.state),
            host,
            catalog,
            RecentStarts(lambda start_ns, end_ns: ledger.ask(client.held(start_ns, end_ns))),
            pod_logs(api, host.pods),
            _without_image,
            look=images.look,
            callbacks=Callbacks(is_guarded=True, hosts=settings.callback_hosts),
        )
        yield gateway, lambda: catalog.is_current and host.is_current


def _without_image(image: str) -> tuple[dict[str, object], str]:
    """Of a record that somebody else wrote, without what its image says."""
    return {}, f"gpufn.toml of {image}"


def _credentials(folder: Path) -> tuple[str, str]:
    try:
        user, password = ((folder / name).read_text(encoding="utf-8").strip() for name in (USER_FILE, PASSWORD_FILE))
    except (OSError, UnicodeDecodeError) as exc:
        why = f"{exc.filename}: {exc.strerror}." if isinstance(exc, OSError) else "One of its files is no UTF-8 text."
        raise ConfigError(
            f"The folder {folder} has no user and password.",
            why=why,
            hint=f"Mount a Secret with {USER_FILE} and {PASSWORD_FILE} there, or ask nobody: --basic-auth false",
            code="no-credentials",
        ) from exc
    if not user or not password:
        raise ConfigError(f"User or password in {folder} is empty.", code="no-credentials")
    return user, password


# Whether it is well ------------------------------------------------------------------------------


class _Readiness:
    """Why requests should not be sent here; empty where they should."""

    def __init__(self, is_current: Callable[[], bool], stopping: asyncio.Event) -> None:
        self.serves = False
        self._is_current = is_current
        self._stopping = stopping

    def why_not(self) -> str:
        if self._stopping.is_set():
            return "it is told to stop"
        if not self.serves:
            return "it does not know yet what there is"
        return "" if self._is_current() else "it has not heard of the API server for a while"


@asynccontextmanager
async def _status(settings: ProviderSettings, gateway: Gateway, ready: _Readiness) -> AsyncIterator[None]:
    async def alive(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readiness(_: web.Request) -> web.Response:
        why = ready.why_not()
        return web.Response(status=503 if why else 200, text=(why or "ok") + "\n")

    async def metrics(_: web.Request) -> web.Response:
        body = gateway.metrics.text(gateway.fleets.values(), gateway.gpus)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application()
    app.add_routes([web.get("/healthz", alive), web.get("/readyz", readiness), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.address, settings.status_port).start()
        yield
    finally:
        await runner.cleanup()


# Its end -----------------------------------------------------------------------------------------


def _watch_signals(stopping: asyncio.Event) -> None:
    def asked() -> None:
        if stopping.is_set():
            os._exit(1)  # what is desired is in the cluster, and what was accepted on the disk
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked)
