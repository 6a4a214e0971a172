"""The gateway's parts put together: catalog, fleets, proxy, queue, GPUs, ledger; and what a deploy does.

One object owns all of it; `api` turns HTTP into its methods. Everything runs on one event loop, only
what waits for a disk is done in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError, ConfigError, HandlerError, NotFound
from adapter.hosts import Deployment, EventSink, Host, Inventory, Replica, Terms
from adapter.hosts.background import Background
from adapter.openfaas import wire
from adapter.openfaas.budgets import FIRST_LOOK_LIMIT_S, Budgets
from adapter.openfaas.callbacks import ANYWHERE, Callbacks
from adapter.openfaas.catalog import Catalog, Entry, ImageFacts
from adapter.openfaas.fleet import Fleet, Observer
from adapter.openfaas.gpus import Gpus
from adapter.openfaas.logs import Logs
from adapter.openfaas.members import Member
from adapter.openfaas.metrics import Metrics
from adapter.openfaas.proxy import Proxy
from adapter.openfaas.queue import Queue
from adapter.openfaas.recorder import Recorder
from adapter.policy.grants import Want
from adapter.records import StartRecord
from adapter.replica import WATCHDOG_VARIABLES, ReplicaSettings
from adapter.spec import FunctionSpec, parse_spec

logger = logging.getLogger(__name__)

ConfigOf = Callable[[str], tuple[Mapping[str, Any], str]]
"""The tables of an image's `gpufn.toml`, and what to call them. Raises `NotFound`, `ConfigError`, `HandlerError`."""

Look = Callable[[wire.FunctionDeployment], Awaitable[ImageFacts | None]]
"""Before a deploy: finds out what its image is, which may have to be fetched. What it returns is kept with the entry;
None where the host, or `ConfigOf`, knows by itself from now on. Raises `AdapterError`."""

_LEAVE_LIMIT_S = 25.0
"""For requests under way when a gateway ends whose replicas stay: less than Kubernetes gives a pod."""


class Gateway(Observer):
    """See the module. Make it inside a running event loop. `inventory`: the host's, as it was when this began."""

    def __init__(
        self,
        state: Path,
        host: Host,
        catalog: Catalog,
        recorder: Recorder,
        logs: Logs,
        config_of: ConfigOf,
        inventory: Inventory | None = None,
        *,
        look: Look | None = None,
        callbacks: Callbacks = ANYWHERE,
    ) -> None:
        self.host = host
        self.gpus = Gpus(inventory, is_ours=host.traits.grants_gpus)
        self.catalog = catalog
        self.logs = logs
        self.metrics = Metrics()
        self.queue = Queue(
            state / "queue.sqlite", lambda key, invocation: self.proxy.call(self.fleet(key), invocation), callbacks
        )
        self.proxy = Proxy(self.metrics)
        self.fleets: dict[str, Fleet] = {}
        self.stopping = asyncio.Event()
        """Set when the gateway ends: what would never end by itself (followed logs) ends with it."""
        self._revisions: dict[str, int] = {}
        self._config_of = config_of
        self._look = look
        self._recorder = recorder
        self.budgets = Budgets(self.fleets, recorder.held)
        self._background = Background()

    def start(self) -> None:
        """Take up the functions and the queue of an earlier life; replicas begin at their minimum."""
        self._recorder.start()
        for entry in self.catalog.functions():
            self._take_up(entry, first=False)
        self.catalog.listen(self)
        self.host.adopt(self)
        self.queue.start()
        self._background.run(self.budgets.watch())

    async def close(self) -> None:
        """Drain: the queue's rest stays on the disk, running requests finish, replicas end where they do not outlive us."""
        self.stopping.set()
        await self.queue.close()
        leaves = self.host.traits.outlives_us
        ends = (fleet.leave(_LEAVE_LIMIT_S) if leaves else fleet.close() for fleet in self.fleets.values())
        await asyncio.gather(*ends)
        self._background.cancel()
        await self._background.join()
        await self.host.close()
        await self.proxy.close()
        await self._recorder.close()

    def check_open(self) -> None:
        """Raises `Unavailable` once it drains: nobody would do what is accepted now."""
        if self.stopping.is_set():
            raise wire.shutting_down()

    # Functions ----------------------------------------------------------------------------------

    def fleet(self, key: str) -> Fleet:
        """Raises `NotFound`."""
        try:
            return self.fleets[key]
        except KeyError:
            raise wire.unknown_function(key) from None

    async def deploy(self, wanted: wire.FunctionDeployment) -> Entry:
        """Look at its image, validate, remember, prepare in the background. Raises `ConfigError`, `NotFound`,
        `Unavailable`."""
        self.check_open()
        self.catalog.namespace(wanted.namespace)
        try:
            image = await self._look(wanted) if self._look is not None else None
            spec = self._spec(wanted, image)
            await self._check_secrets(wanted)
            await self.host.check(_deployment(Entry(wanted, 0, "", image), spec))
        except (NotFound, HandlerError) as exc:  # 404 would tell faas-cli that there is nothing to update
            raise ConfigError(exc.message, why=exc.why, hint=exc.hint, code=exc.code) from exc
        self.check_open()
        entry = await self.catalog.put(wanted, datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), image)
        logger.info("a function is deployed", extra={"fields": {"function": wanted.key, "revision": entry.revision}})
        if unkept := self.unkept(wanted):
            logger.warning("not all has effect", extra={"fields": {"function": wanted.key, "why": unkept}})
        self.deployed(entry, first=True)
        return entry

    async def _check_secrets(self, wanted: wire.FunctionDeployment) -> None:
        missing = await self.catalog.missing_secrets(wanted.namespace, wanted.secrets)
        if missing:
            there = await self.catalog.secrets(wanted.namespace)
            raise ConfigError(
                f"{wanted.key} needs secrets that do not exist: {', '.join(missing)}.",
                why=f"The namespace {wanted.namespace} has: {', '.join(there) or 'none'}.",
                hint=f"Create them with: {wire.secret_command('create', missing[0], wanted.namespace)}",
                code="secret-missing",
            )

    def unkept(self, wanted: wire.FunctionDeployment) -> str:
        """What a deployment asks for and does not get here, for people."""
        return wanted.without_effect(bounded=self.host.traits.bounds_replicas)

    async def remove(self, key: str) -> None:
        """Raises `NotFound`, `Unavailable`."""
        self.check_open()
        await self.catalog.remove(key)
        self.removed(key)

    # Listener: also told of what others changed -------------------------------------------------

    def deployed(self, entry: Entry, *, first: bool = False) -> None:
        self._take_up(entry, first=first)

    def removed(self, key: str) -> None:
        fleet = self.fleets.pop(key, None)
        self._revisions.pop(key, None)
        if fleet is not None:
            logger.info("a function is removed", extra={"fields": {"function": key}})
            self._background.run(self._retire(fleet))

    # Keeper: replicas of another life -----------------------------------------------------------

    def deployment_of(self, key: str, revision: str) -> Deployment | None:
        fleet = self.fleets.get(key)
        return None if fleet is None else fleet.deployment_of(revision)

    def take(self, replica: Replica) -> EventSink:
        return self.fleet(replica.deployment.key).adopt(replica)

    async def _retire(self, fleet: Fleet) -> None:
        await fleet.close(removed=True)
        if fleet.deployment.key not in self.fleets:  # not deployed anew meanwhile
            await self.host.remove(fleet.deployment)

    def _spec(self, wanted: wire.FunctionDeployment, image: ImageFacts | None) -> FunctionSpec:
        if image is None:
            config, source = self._config_of(wanted.image)
        else:
            config, source = image.config, f"gpufn.toml of {wanted.image}"
        spec = parse_spec(config, wanted.policy(), source=source)
        if spec.gpus and self.host.traits.grants_gpus:
            self.gpus.check(Want.of(wanted.key, spec))
        if not self.host.traits.parks:
            spec = replace(spec, park_after_s=0.0)
        return _as_watchdog_says(spec, wanted.env_vars)

    def _take_up(self, entry: Entry, *, first: bool) -> None:
        """A revision that is new to us; one that cannot run (any more) is there all the same, and says why."""
        key = entry.deployment.key
        if self._revisions.get(key, 0) >= entry.revision:
            return  # we are told of what we did ourselves, too
        self._revisions[key] = entry.revision
        try:
            self._install(entry, self._spec(entry.deployment, entry.image), first=first)
        except AdapterError as error:
            logger.warning("a function cannot be taken up", extra={"fields": {"function": key, "why": error.message}})
            deployment = _deployment(entry, parse_spec({}, {}))
            self._fleet_for(deployment).prepared(deployment, error, initial=0)

    def _install(self, entry: Entry, spec: FunctionSpec, *, first: bool) -> None:
        deployment = _deployment(entry, spec)
        fleet = self._fleet_for(deployment)
        self._background.run(self._prepare(fleet, deployment, initial=spec.initial_replicas if first else 0))

    def _fleet_for(self, deployment: Deployment) -> Fleet:
        """The function's, which knows of the deployment from now on."""
        fleet = self.fleets.get(deployment.key)
        if fleet is None:
            fleet = self.fleets[deployment.key] = Fleet(self.host, deployment, self, self.gpus, self.budgets.of)
            self.host.adopt(self, deployment.key)
        else:
            fleet.update(deployment)
        return fleet

    async def _prepare(self, fleet: Fleet, deployment: Deployment, *, initial: int) -> None:
        problem: AdapterError | None = None
        began = time.monotonic()
        try:
            await self.host.prepare(deployment)
            if deployment.spec.budget_gpu_s:  # an earlier life may have spent it
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.budgets.look(), FIRST_LOOK_LIMIT_S)
        except AdapterError as error:
            problem = error
        except Exception as error:  # boundary: whatever it was, nobody may wait for this function for ever
            logger.exception("a preparation failed", extra={"fields": {"function": deployment.key}})
            problem = ConfigError(f"{deployment.key} cannot be prepared.", why=f"{type(error).__name__}: {error}.")
        if problem is not None:
            fields = {"function": deployment.key, "why": str(problem)}
            logger.warning("a function cannot be prepared", extra={"fields": fields})
        else:
            ready = {"function": deployment.key, "seconds": time.monotonic() - began}
            logger.info("a function is ready", extra={"fields": ready})
        fleet.prepared(deployment, problem, initial=initial)

    async def starts(self, function: str | None, namespace: str | None, limit: int) -> list[StartRecord]:
        """The latest first."""
        return await self._recorder.starts(function, namespace, limit)

    # Observer -----------------------------------------------------------------------------------

    def started(self, fleet: Fleet, record: StartRecord) -> None:
        fields = {"function": fleet.deployment.key, "rung": record.rung.value, "seconds": record.total_ns / 1e9}
        logger.info("a replica is not up" if record.error else "a replica is up", extra={"fields": fields})
        self.metrics.count_start(fleet.deployment.key, record)
        self._recorder.started(record)

    def changed(self, fleet: Fleet, member: Member) -> None:
        self._recorder.observe(member)

    def ended(self, fleet: Fleet, member: Member) -> None:
        self._recorder.ended(member)


def _as_watchdog_says(spec: FunctionSpec, env: Mapping[str, str]) -> FunctionSpec:
    """The spec that a replica will follow: of-watchdog's variables win. Raises `ConfigError`."""
    asked = {name: value for name, value in env.items() if name in WATCHDOG_VARIABLES}
    settings = ReplicaSettings.from_env(asked)
    if "exec_timeout" in asked:
        spec = replace(spec, exec_timeout_s=settings.exec_timeout_s)
    if "max_inflight" in asked:
        spec = replace(spec, in_flight=settings.in_flight)
    return spec


def _deployment(entry: Entry, spec: FunctionSpec) -> Deployment:
    wanted, image = entry.deployment, entry.image
    return Deployment(
        name=wanted.service,
        namespace=wanted.namespace,
        revision=str(entry.revision),
        image=wanted.image if image is None else image.reference,
        spec=spec,
        env=tuple(wanted.env_vars.items()),
        secrets=wanted.secrets,
        terms=Terms(
            labels=tuple(wanted.labels.items()),
            annotations=tuple(wanted.annotations.items()),
            constraints=wanted.constraints,
            limits=tuple(wanted.limits.items()),
            requests=tuple(wanted.requests.items()),
            read_only_root=wanted.read_only_root_filesystem,
            command=wanted.env_process,
            holds_requests=image is not None and image.is_ours,
            user="" if image is None else image.user,
            python_path="" if image is None else image.python_path,
        ),
    )
