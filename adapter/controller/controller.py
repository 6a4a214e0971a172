"""The controller: caches, an election, and the reconcilers of whoever leads."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.component import stop_asked, until
from adapter.cluster.credentials import Credentials
from adapter.cluster.election import Election
from adapter.cluster.events import EventRecorder
from adapter.cluster.health import Health, new_registry
from adapter.cluster.informer import Informer
from adapter.cluster.serving import served
from adapter.controller.budget_events import BudgetEvents
from adapter.controller.certificate_keeper import CertificateKeeper
from adapter.controller.cluster_view import ClusterView, settle
from adapter.controller.knative_defaults import KnativeDefaults
from adapter.controller.metrics import ControllerMetrics, InformerCollector
from adapter.controller.reconcilers import Reconciler, Reconcilers
from adapter.controller.snapshot_taker import SnapshotTaker
from adapter.controller.unplaced import UnplacedPods
from adapter.knative.tuner import Tuner, autoscalers_of, revisions_of
from adapter.knative.tuning import Revision
from adapter.ledger import client
from adapter.ledger.connection import LedgerConnection
from adapter.ledger.held import HeldToday
from adapter.ledger.traffic import LedgerTraffic
from adapter.policy.budget import BudgetState

logger = logging.getLogger(__name__)

LEASE = "gpufn-controller"


@dataclass(frozen=True, slots=True)
class Work:
    """What the leader does, and the caches of its own that run beside it on every replica."""

    reconcilers: tuple[Reconciler, ...]
    caches: tuple[Informer[Any], ...]


def make_work(api: Api, ledger: LedgerConnection, view: ClusterView, metrics: ControllerMetrics) -> Work:
    """`api` writes only while this replica leads."""
    events = EventRecorder(api, "controller")
    knative, revisions, autoscalers = KnativeDefaults(api), revisions_of(api), autoscalers_of(api)
    certificates, taker = CertificateKeeper(api), SnapshotTaker(api, view, events)
    held = HeldToday(lambda start_ns, end_ns: ledger.ask(client.held(start_ns, end_ns)))
    traffic = LedgerTraffic(lambda since_ns: ledger.ask(client.activity(since_ns)))

    async def is_spent(revision: Revision) -> bool:
        if not revision.spec.budget_gpu_s:
            return False
        await held.look()
        budget = held.budget(f"{revision.function}.{revision.namespace}", revision.spec.budget_gpu_s)
        return budget.state(time.time_ns()) is BudgetState.SPENT

    tuner = Tuner(api, revisions, autoscalers, traffic, defaults=knative.read, nodes=view.inventory, is_spent=is_spent)
    return Work(
        (certificates, UnplacedPods(view, events, metrics), BudgetEvents(view, held, events), taker, tuner),
        (certificates.unknown, taker.takings, *knative.caches, revisions, autoscalers),
    )


async def run_controller(*, probes_port: int) -> None:
    """Until SIGTERM or SIGINT. A leader gives its lease back when its work has ended."""
    stop = stop_asked()
    registry = new_registry()
    metrics, health = ControllerMetrics(registry), Health(registry)
    async with Api(Credentials()) as api, LedgerConnection() as ledger:
        view = ClusterView(api, hears_promises=False)  # else a pod's own would keep it from fitting
        health.ready["cluster"] = view.why_not
        election = Election(api, LEASE, f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}")
        work = make_work(api.fenced(election.left_s), ledger, view, metrics)
        caches = (*view.informers, *work.caches)
        InformerCollector(caches, registry)
        reconcilers = Reconcilers(work.reconcilers, metrics)
        async with served(health.app(), probes_port):
            logger.info("running", extra={"fields": {"identity": election.identity, "probes_port": probes_port}})
            await until(stop.wait(), *(cache.run() for cache in caches), _lead(election, reconcilers, caches))


async def _lead(election: Election, reconcilers: Reconcilers, caches: Iterable[Informer[Any]]) -> None:
    """Who does not know the cluster yet does not stand for election."""
    await settle(caches)
    await election.run(reconcilers.lead)
