"""The gateway's parts put together: catalog, fleets, proxy, queue, ledger; and what a deploy does.

One object owns all of it; `api` turns HTTP into its methods. Everything runs on one event loop, only
what waits for a disk is done in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from adapter.errors import AdapterError, ConfigError, NotFound
from adapter.hosts import Deployment, Host
from adapter.ledger.store import Ledger
from adapter.openfaas.catalog import Catalog, Entry
from adapter.openfaas.fleet import Fleet, Member, Observer
from adapter.openfaas.metrics import Metrics
from adapter.openfaas.proxy import Proxy
from adapter.openfaas.queue import Queue
from adapter.openfaas.wire import FunctionDeployment
from adapter.policy.leases import CPU_DEVICE, Holder, LeaseTracker
from adapter.records import LeaseInterval, StartRecord
from adapter.spec import FunctionSpec, parse_spec, read_config

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
"""Open leases are written this often: what a crash can lose."""


class Gateway(Observer):
    """See the module. `folder_of` finds an image's function folder, to read its `gpufn.toml`."""

    def __init__(self, state: Path, host: Host, ledger: Ledger, folder_of: Callable[[str], Path]) -> None:
        self.state = state
        self.host = host
        self.catalog = Catalog(state)
        self.metrics = Metrics()
        self.ledger = ledger
        self.fleets: dict[str, Fleet] = {}
        self._folder_of = folder_of
        self._leases = LeaseTracker(time.time_ns(), time.monotonic_ns())
        self._to_write: asyncio.Queue[list[LeaseInterval] | StartRecord | None] = asyncio.Queue()
        self._background: set[asyncio.Task[None]] = set()
        self.proxy = Proxy(self.metrics)
        self.queue = Queue(state / "queue.sqlite", lambda key, invocation: self.proxy.call(self.fleet(key), invocation))

    async def start(self) -> None:
        """Take up the functions of an earlier life; they begin at zero (or their minimum)."""
        self._writer = asyncio.create_task(self._write())
        self._heart = asyncio.create_task(self._beat())
        for entry in self.catalog.functions():
            try:
                self._install(entry, self._spec(entry.deployment), first=False)
            except AdapterError as error:
                logger.warning(
                    "a function cannot be taken up", extra={"fields": {"function": entry.deployment.key, "why": str(error)}}
                )
        self.queue.start()

    async def close(self) -> None:
        """Drain: the queue's rest stays on the disk, running requests finish, replicas end."""
        await self.queue.close()
        await asyncio.gather(*(fleet.close() for fleet in self.fleets.values()))
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.host.close()
        await self.proxy.close()
        self._heart.cancel()
        self._to_write.put_nowait(self._leases.heartbeat(time.monotonic_ns()))
        self._to_write.put_nowait(None)
        await self._writer
        self.ledger.close()

    # Functions ----------------------------------------------------------------------------------

    def fleet(self, key: str) -> Fleet:
        """Raises `NotFound`."""
        fleet = self.fleets.get(key)
        if fleet is None:
            self.catalog.get(key)
            raise NotFound(f"{key} is deployed but cannot run.", hint="See: gpufn describe", code="function-broken")
        return fleet

    def deploy(self, deployment: FunctionDeployment) -> Entry:
        """Validate, remember, prepare in the background. Raises `ConfigError`, `NotFound`."""
        spec = self._spec(deployment)
        self.catalog.namespace(deployment.namespace)
        there = self.catalog.secrets(deployment.namespace)
        missing = [name for name in deployment.secrets if name not in there]
        if missing:
            raise ConfigError(
                f"{deployment.key} needs secrets that do not exist: {', '.join(missing)}.",
                hint=f"Create them with: faas-cli secret create {missing[0]}",
                code="secret-missing",
            )
        entry = self.catalog.put(deployment, datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
        self._install(entry, spec, first=True)
        return entry

    def remove(self, key: str) -> None:
        """Raises `NotFound`."""
        self.catalog.remove(key)
        fleet = self.fleets.pop(key, None)
        if fleet is not None:
            self._run(self._retire(fleet))

    async def _retire(self, fleet: Fleet) -> None:
        await fleet.close()
        await self.host.remove(fleet.deployment)
        self.metrics.forget(fleet.deployment.key)

    def _spec(self, deployment: FunctionDeployment) -> FunctionSpec:
        folder = self._folder_of(deployment.image)
        annotations = dict(deployment.annotations)
        gpus = deployment.limits.get("nvidia.com/gpu") or deployment.requests.get("nvidia.com/gpu")
        if gpus:
            annotations.setdefault("gpufn.dev/gpu", gpus)
        return parse_spec(read_config(folder), annotations, source=str(folder / "gpufn.toml"))

    def _install(self, entry: Entry, spec: FunctionSpec, *, first: bool) -> None:
        wanted = entry.deployment
        deployment = Deployment(
            name=wanted.service,
            namespace=wanted.namespace,
            revision=str(entry.revision),
            image=wanted.image,
            spec=spec,
            env=tuple(wanted.env_vars.items()),
            secrets=wanted.secrets,
        )
        fleet = self.fleets.get(deployment.key)
        if fleet is None:
            fleet = self.fleets[deployment.key] = Fleet(self.host, deployment, self)
            self.metrics.replicas.labels(deployment.key).set(0)
        else:
            fleet.update(deployment)
        self._run(self._prepare(fleet, deployment, first=first))

    async def _prepare(self, fleet: Fleet, deployment: Deployment, *, first: bool) -> None:
        fleet.preparing = "its environment is being built"
        problem: AdapterError | None = None
        try:
            await self.host.prepare(deployment)
        except AdapterError as error:
            problem = error
            logger.warning("a function cannot be prepared", extra={"fields": {"function": deployment.key, "why": str(error)}})
        except OSError as error:
            problem = ConfigError(f"{deployment.key} cannot be prepared.", why=f"{error}.")
        if fleet.deployment is deployment:  # not superseded meanwhile
            fleet.prepared(problem, initial=deployment.spec.initial_replicas if first else 0)

    def _run(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[arg-type, var-annotated]
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # Records ------------------------------------------------------------------------------------

    def started(self, fleet: Fleet, record: StartRecord) -> None:
        self.metrics.count_start(fleet.deployment.key, record)
        logger.info(
            "a replica is up" if not record.error else "a replica is not up",
            extra={"fields": {"function": fleet.deployment.key, "rung": record.rung.value, "seconds": record.total_ns / 1e9}},
        )
        self._to_write.put_nowait(record)

    def changed(self, fleet: Fleet, member: Member) -> None:
        deployment = fleet.deployment
        holder = Holder(
            function=deployment.name,
            namespace=deployment.namespace,
            revision=member.replica.deployment.revision,
            replica=member.replica.id,
            tenant=deployment.spec.tenant,
            price_class=deployment.spec.price_class,
            device="gpu" if deployment.spec.gpus else CPU_DEVICE,
            share=deployment.spec.gpus or 1.0,
        )
        self._keep(self._leases.observe(holder, member.lease_phase, time.monotonic_ns()))
        self._gauge(fleet)

    def ended(self, fleet: Fleet, member: Member) -> None:
        self._keep(self._leases.end(member.replica.id, time.monotonic_ns()))
        self._gauge(fleet)

    def _gauge(self, fleet: Fleet) -> None:
        if fleet.deployment.key in self.fleets:
            self.metrics.replicas.labels(fleet.deployment.key).set(fleet.desired)
            self.metrics.held.labels(fleet.deployment.key).set(fleet.waiting)

    def invocations(self, key: str) -> int:
        """Invocations answered in this life of the gateway, of any status."""
        samples = (sample for metric in self.metrics.invocations.collect() for sample in metric.samples)
        return int(sum(s.value for s in samples if s.name.endswith("_total") and s.labels["function_name"] == key))

    def _keep(self, intervals: list[LeaseInterval]) -> None:
        if intervals:
            self._to_write.put_nowait(intervals)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._keep(self._leases.heartbeat(time.monotonic_ns()))

    async def _write(self) -> None:
        """Everything goes to the ledger from here, batch by batch, so that no request waits for its disk."""
        while True:
            batch = [await self._to_write.get()]
            while not self._to_write.empty():
                batch.append(self._to_write.get_nowait())
            try:
                await asyncio.to_thread(self._append, batch)
            except AdapterError as error:
                logger.error("the ledger refuses", extra={"fields": {"why": error.why, "hint": error.hint}})
                await asyncio.sleep(1)
                for item in batch:  # intervals have ids: what did get in counts once
                    self._to_write.put_nowait(item)
                continue
            if None in batch:
                return

    def _append(self, batch: list[list[LeaseInterval] | StartRecord | None]) -> None:
        self.ledger.add_intervals(interval for item in batch if isinstance(item, list) for interval in item)
        for item in batch:
            if isinstance(item, StartRecord):
                self.ledger.add_start(item)
