"""``python -m adapter.agent``: the agent of one node of a cluster."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any

import aiohttp
from aiohttp import web

from adapter import logs
from adapter.agent.agent import Agent
from adapter.agent.deliver import Delivery, Ledger
from adapter.agent.metrics import Metrics
from adapter.agent.pods import read_pod
from adapter.agent.settings import AgentSettings
from adapter.agent.spool import Spool
from adapter.cluster.api import Api
from adapter.cluster.credentials import Credentials
from adapter.cluster.informer import Informer
from adapter.cluster.resources import NAMESPACES, PODS
from adapter.errors import AdapterError
from adapter.files import write_whole
from adapter.hosts import criu, seccomp
from adapter.keys import ENV_CRIU, SECCOMP_PROFILE

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 3.0
"""For the ledger to take them; what it does not take waits in the spool for the next agent."""


def prepare_node(settings: AgentSettings) -> str:
    """What functions' containers need of their node: our system-call profile, and a CRIU. Returns why no process can be
    restored here; empty: it can. Blocks."""
    try:
        settings.seccomp_dir.mkdir(parents=True, exist_ok=True)
        profile = settings.seccomp_dir / SECCOMP_PROFILE
        write_whole(profile, json.dumps(seccomp.profile()).encode())
        profile.chmod(0o644)
        settings.lent_criu_dir.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        settings.snapshot_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as exc:
        return f"{exc}"
    environ = {**os.environ, **({ENV_CRIU: settings.criu} if settings.criu else {})}
    return criu.lend(settings.lent_criu_dir, environ)


async def serve(settings: AgentSettings) -> None:
    """Until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    why_no_restore = await asyncio.to_thread(prepare_node, settings)
    logger.info("the node is prepared", extra={"fields": {"node": settings.node, "why_no_restore": why_no_restore}})
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        spool = await asyncio.to_thread(Spool.open, settings.state_dir)
        stack.callback(spool.close)
        api = await stack.enter_async_context(Api(Credentials()))
        pods = Informer(api, PODS.path(), read_pod, field_selector=f"spec.nodeName={settings.node}")
        namespaces = Informer(api, NAMESPACES.path(), _labels)
        agent = Agent(settings, api, spool, metrics, pods, namespaces)
        delivery = Delivery(spool, Ledger(settings.ledger_url, settings.ledger_dir), metrics, agent.on_clock)
        agent.on_append = delivery.more.set
        informers = (pods, namespaces)
        await _listen(stack, _status(metrics, informers), settings.status_port)
        tasks = [asyncio.create_task(work) for work in (*(each.run() for each in informers), delivery.run())]
        tasks.append(asyncio.create_task(_rounds(agent, informers)))
        tasks.append(asyncio.create_task(agent.look_after_node(why_no_restore)))
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in (stop, *tasks):
            task.cancel()
        for ended in await asyncio.gather(stop, *tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        await _last_words(agent, delivery, informers)


async def _rounds(agent: Agent, informers: tuple[Informer[Any], ...]) -> None:
    for each in informers:
        await each.synced.wait()
    await agent.run()


async def _last_words(agent: Agent, delivery: Delivery, informers: tuple[Informer[Any], ...]) -> None:
    """A last heartbeat."""
    if not all(each.synced.is_set() for each in informers):
        return
    async with aiohttp.ClientSession() as session:
        await agent.beat(session)
        with suppress(AdapterError, asyncio.TimeoutError):
            while not await asyncio.wait_for(delivery.once(session), _LAST_WORDS_S):
                pass


def _labels(namespace: Mapping[str, Any]) -> Mapping[str, str]:
    return dict(namespace["metadata"].get("labels") or {})


def _status(metrics: Metrics, informers: tuple[Informer[Any], ...]) -> web.Application:
    """What the kubelet and Prometheus ask."""

    async def alive(_request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def ready(_request: web.Request) -> web.Response:
        late = [each.path for each in informers if not each.healthy]
        return web.Response(status=503 if late else 200, text=f"not heard of lately: {late}" if late else "ok")

    async def text(_request: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.router.add_get("/healthz", alive)
    app.router.add_get("/readyz", ready)
    app.router.add_get("/metrics", text)
    return app


async def _listen(stack: AsyncExitStack, app: web.Application, port: int) -> None:
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, port=port).start()


def main() -> int:
    logs.setup()
    try:
        asyncio.run(serve(AgentSettings.from_env(os.environ)))
    except AdapterError as error:
        print(error.to_text(), file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
