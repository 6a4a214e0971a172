"""The webhook: serves `Admission` over TLS, as long as it knows the cluster and has a certificate."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web

from adapter.cluster.api import Api
from adapter.cluster.component import stop_asked, until
from adapter.cluster.credentials import Credentials
from adapter.cluster.health import Health, new_registry
from adapter.cluster.serving import served
from adapter.cluster.tls import ServingTls
from adapter.controller.admission import Admission, Answer, Review
from adapter.controller.cluster_view import ClusterView, settle
from adapter.controller.knative_defaults import KnativeDefaults
from adapter.controller.metrics import AdmissionMetrics, InformerCollector
from adapter.errors import ConfigError
from adapter.ledger import client
from adapter.ledger.connection import LedgerConnection
from adapter.ledger.held import HeldToday
from adapter.ledger.traffic import LedgerTraffic
from adapter.policy.activity import Activity

logger = logging.getLogger(__name__)

REVIEW_LIMIT_BYTES = 4 * 2**20
"""The API server takes objects of 3 MB; etcd keeps none longer than 1.5 MiB, so two of them fit as well."""
LARGE_BYTES = 64 * 2**10
LARGE_REVIEWS = 8
"""So many bodies longer than `LARGE_BYTES`, or of unknown length, are in memory at once. Anybody may send one: small
ones, as nearly all are, do not wait for them."""
_READ_LIMIT_S = 2.0
"""The API server waits no longer."""
_DRAIN_S = 5.0
"""From when we are told to stop until we do: the API server may not have heard yet that it should ask another."""


def review_app(admission: Admission, metrics: AdmissionMetrics) -> web.Application:
    """``POST /pods`` and ``/services``."""
    large = asyncio.Semaphore(LARGE_REVIEWS)

    def answering(kind: str, answer: Callable[[Review], Answer]) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.Response:
            length = request.content_length
            async with large if length is None or length > LARGE_BYTES else nullcontext():
                return await reviewed(request)

        async def reviewed(request: web.Request) -> web.Response:
            try:
                body = await asyncio.wait_for(request.read(), _READ_LIMIT_S)
                begun = time.perf_counter()
                review = Review.parse(body)
            except web.HTTPRequestEntityTooLarge:
                metrics.reviews.labels(kind, "unreadable", "too-large").inc()
                raise
            except asyncio.TimeoutError:
                metrics.reviews.labels(kind, "unreadable", "too-slow").inc()
                raise web.HTTPRequestTimeout from None
            except ConfigError as exc:
                metrics.reviews.labels(kind, "unreadable", exc.code).inc()
                return web.json_response(exc.to_json(), status=exc.http_status)
            answered = answer(review)
            response = web.json_response(answered.to_json())
            metrics.seconds.labels(kind).observe(time.perf_counter() - begun)
            metrics.reviews.labels(kind, answered.outcome, answered.code).inc()
            return response

        return handle

    app = web.Application(client_max_size=REVIEW_LIMIT_BYTES)
    app.router.add_post("/pods", answering("pods", admission.pod))
    app.router.add_post("/services", answering("services", admission.service))
    return app


async def run_webhook(*, port: int, probes_port: int, tls_folder: Path) -> None:
    """Until SIGTERM or SIGINT, and then until the API server asks elsewhere."""
    stop = stop_asked()
    registry = new_registry()
    metrics, health, tls = AdmissionMetrics(registry), Health(registry), ServingTls(tls_folder)
    async with Api(Credentials()) as api, LedgerConnection() as ledger:
        view, knative = ClusterView(api), KnativeDefaults(api)
        held = HeldToday(lambda start_ns, end_ns: ledger.ask(client.held(start_ns, end_ns)))
        InformerCollector(view.informers, registry)
        metrics.reserved.set_function(lambda: len(view.reservations))
        health.ready |= {"cluster": view.why_not, "certificate": lambda: "" if tls.loaded else "there is none"}
        traffic = LedgerTraffic(lambda since_ns: _wakes(ledger, since_ns))
        reviews = review_app(Admission(view, knative.read, held, traffic.known), metrics)
        tls.look()
        async with served(health.app(), probes_port), served(reviews, port, tls=tls.context):
            logger.info("serving", extra={"fields": {"port": port, "probes_port": probes_port}})
            caches = (*view.informers, *knative.caches)
            running = asyncio.gather(*(cache.run() for cache in caches), settle(caches))
            asking = asyncio.gather(held.watch(lambda: view.has_budgets), traffic.watch())
            await until(_drained(stop, health), running, tls.watch(), asking)


async def _wakes(ledger: LedgerConnection, since_ns: int) -> list[Activity]:
    """How long functions' wakes took; when they were busy, which is a lot, places nobody."""
    return [replace(each, busy=()) for each in await ledger.ask(client.activity(since_ns))]


async def _drained(stop: asyncio.Event, health: Health) -> None:
    await stop.wait()
    health.draining = True
    logger.info("told to stop", extra={"fields": {"drain_s": _DRAIN_S}})
    await asyncio.sleep(_DRAIN_S)
