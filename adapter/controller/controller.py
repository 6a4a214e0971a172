"""The controller: caches, an election, and the reconcilers of whoever leads."""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field

from adapter.cluster.api import Api
from adapter.cluster.credentials import Credentials
from adapter.cluster.election import Election
from adapter.cluster.events import EventRecorder
from adapter.cluster.health import Health
from adapter.cluster.serving import served, stop_asked, until
from adapter.controller.certificate_keeper import CertificateKeeper
from adapter.controller.cluster_view import ClusterView
from adapter.controller.ledger_reader import LedgerReader
from adapter.controller.metrics import ControllerMetrics, InformerCollector, new_registry
from adapter.controller.reconcilers import Reconciler, Reconcilers
from adapter.controller.snapshot_taker import SnapshotTaker
from adapter.controller.unplaced import UnplacedPods
from adapter.controller.webhook import KnativeDefaults
from adapter.knative.traffic import LedgerTraffic
from adapter.knative.tuner import Tuner, autoscalers_of, revisions_of, until_there

logger = logging.getLogger(__name__)

LEASE = "gpufn-controller"


@dataclass(frozen=True)
class Surroundings:
    """What a reconciler is made of. `api` writes only while this replica leads."""

    api: Api
    view: ClusterView
    events: EventRecorder
    metrics: ControllerMetrics
    caches: list[Awaitable[object]] = field(default_factory=list)
    """What runs beside it: caches of its own."""


def make_reconcilers(around: Surroundings) -> Sequence[Reconciler]:
    """All that the leader does."""
    snapshots = SnapshotTaker(around.api, around.view.namespaces, around.events)
    around.caches.extend(cache.run() for cache in snapshots.caches)
    return [
        CertificateKeeper(around.api),
        UnplacedPods(around.view, around.events, around.metrics),
        snapshots,
        _tuner(around),
    ]


def _tuner(around: Surroundings) -> Tuner:
    """Its caches run where there is a Knative; until then it has nothing to do."""
    api, settings = around.api, KnativeDefaults(around.api)
    revisions, autoscalers = revisions_of(api), autoscalers_of(api)

    async def run() -> None:
        await until_there(api)
        await asyncio.gather(settings.run(), revisions.run(), autoscalers.run())

    around.caches.append(run())
    traffic = LedgerTraffic(LedgerReader().activity)
    return Tuner(api, revisions, autoscalers, traffic, defaults=settings.read, nodes=around.view.inventory)


async def run_controller(*, probes_port: int) -> None:
    """Until SIGTERM or SIGINT. A leader gives its lease back when its work has ended."""
    stop = stop_asked()
    registry = new_registry()
    metrics, health = ControllerMetrics(registry), Health(registry)
    async with Api(Credentials()) as api:
        view = ClusterView(api)
        InformerCollector(view.informers, registry)
        health.ready["cluster"] = view.why_not
        election = Election(api, LEASE, f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}")
        fenced = api.fenced(election.left_s)
        around = Surroundings(fenced, view, EventRecorder(fenced, "controller"), metrics)
        reconcilers = Reconcilers(make_reconcilers(around), metrics)
        async with served(health.app(), probes_port):
            logger.info("running", extra={"fields": {"identity": election.identity, "probes_port": probes_port}})
            await until(stop.wait(), view.run(), *around.caches, _lead(election, reconcilers, view))


async def _lead(election: Election, reconcilers: Reconcilers, view: ClusterView) -> None:
    """Who does not know the cluster yet does not stand for election."""
    await asyncio.gather(*(informer.synced.wait() for informer in view.informers))
    await election.run(reconcilers.lead)
