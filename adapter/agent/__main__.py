"""``python -m adapter.agent``: the agent of one node of a cluster."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import aiohttp

from adapter.agent.agent import Agent
from adapter.agent.deliver import Delivery
from adapter.agent.metrics import Metrics
from adapter.agent.pods import read_pod
from adapter.agent.settings import AgentSettings
from adapter.agent.spool import Spool
from adapter.cluster.api import Api
from adapter.cluster.component import run, stop_asked, until
from adapter.cluster.credentials import Credentials
from adapter.cluster.health import Health
from adapter.cluster.informer import Informer
from adapter.cluster.resources import NAMESPACES, PODS
from adapter.cluster.serving import served
from adapter.errors import AdapterError
from adapter.files import write_whole
from adapter.hosts import criu, seccomp
from adapter.keys import ENV_CRIU, SECCOMP_PROFILE
from adapter.ledger.connection import LedgerConnection
from adapter.settings import from_environment

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
        settings.snapshot_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings.snapshot_dir.chmod(0o700)  # the kubelet makes it for all to enter
    except OSError as exc:
        return f"{exc}"
    environ = {**os.environ, **({ENV_CRIU: settings.criu} if settings.criu else {})}
    return criu.lend(settings.lent_criu_dir, environ)


async def serve(settings: AgentSettings) -> None:
    """Until SIGTERM or SIGINT."""
    stop = stop_asked()
    metrics = Metrics()
    health = Health(metrics.registry)
    health.ready["agent"] = lambda: "it prepares the node"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(served(health.app(), settings.status_port))  # a slow disk is no reason to end
        why_no_restore = await asyncio.to_thread(prepare_node, settings)
        logger.info("the node is prepared", extra={"fields": {"node": settings.node, "why_no_restore": why_no_restore}})
        spool = await asyncio.to_thread(Spool.open, settings.state_dir)
        stack.callback(spool.close)
        api = await stack.enter_async_context(Api(Credentials()))
        pods = Informer(api, PODS.path(), read_pod, field_selector=f"spec.nodeName={settings.node}")
        namespaces = Informer(api, NAMESPACES.path(), _labels)
        informers: tuple[Informer[Any], ...] = (pods, namespaces)
        agent = Agent(settings, api, spool, metrics, pods, namespaces)
        ledger = await stack.enter_async_context(LedgerConnection(settings.ledger_url, settings.ledger_dir))
        delivery = Delivery(spool, ledger, metrics, agent.on_clock)
        agent.on_append = delivery.more.set
        for each in informers:
            health.ready[each.path] = partial(_why_late, each)
        del health.ready["agent"]
        works = (*(each.run() for each in informers), delivery.run(), agent.node.run(why_no_restore))
        await until(stop.wait(), *works, _rounds(agent, informers))
        await _last_words(agent, delivery, informers)


def _why_late(informer: Informer[Any]) -> str:
    return "" if informer.healthy else "the API server has said nothing lately"


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
        while not await asyncio.wait_for(delivery.once(), _LAST_WORDS_S):
            pass


def _labels(namespace: Mapping[str, Any]) -> Mapping[str, str]:
    return dict(namespace["metadata"].get("labels") or {})


def main() -> int:
    return run(lambda: serve(from_environment(AgentSettings, os.environ)))


if __name__ == "__main__":
    sys.exit(main())
