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
from adapter.hosts import Deployment, Host, Inventory
from adapter.ledger.store import Ledger
from adapter.openfaas import wire
from adapter.openfaas.background import Background
from adapter.openfaas.catalog import Catalog, Entry
from adapter.openfaas.fleet import Fleet, Observer
from adapter.openfaas.gpus import Gpus
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

Look = Callable[[str, bool], Awaitable[object]]
"""Makes `ConfigOf` know an image, which may have to be fetched; the flag: as its registry has it now, even where the
machine has one of that name. Raises `AdapterError`."""


class Gateway(Observer):
    """See the module. Make it inside a running event loop. `inventory`: the host's, as it was when this began."""

    def __init__(
        self,
        state: Path,
        host: Host,
        ledger: Ledger,
        config_of: ConfigOf,
        inventory: Inventory | None = None,
        *,
        look: Look | None = None,
    ) -> None:
        self.host = host
        self.gpus = Gpus(inventory)
        self.ledger = ledger
        self.catalog = Catalog(state)
        self.metrics = Metrics()
        self.queue = Queue(state / "queue.sqlite", lambda key, invocation: self.proxy.call(self.fleet(key), invocation))
        self.proxy = Proxy(self.metrics)
        self.fleets: dict[str, Fleet] = {}
        self.stopping = asyncio.Event()
        """Set when the gateway ends: what would never end by itself (followed logs) ends with it."""
        self._config_of = config_of
        self._look = look
        self._recorder = Recorder(ledger)
        self._background = Background()

    def start(self) -> None:
        """Take up the functions and the queue of an earlier life; replicas begin at their minimum."""
        self._recorder.start()
        for entry in self.catalog.functions():
            self._take_up(entry)
        self.queue.start()

    async def close(self) -> None:
        """Drain: the queue's rest stays on the disk, running requests finish, replicas end."""
        self.stopping.set()
        await self.queue.close()
        await asyncio.gather(*(fleet.close() for fleet in self.fleets.values()))
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

    async def look(self, image: str) -> None:
        """Before a deploy: know the image, which may have to be fetched. Raises `ConfigError`, `Unavailable`."""
        self.check_open()
        if self._look is None:
            return
        try:
            await self._look(image, True)
        except NotFound as exc:  # 404 would tell faas-cli that there is nothing to update
            raise ConfigError(exc.message, why=exc.why, hint=exc.hint, code=exc.code) from exc

    async def look_at_all(self) -> None:
        """Before `start`: those images of an earlier life that are still there; the others say so themselves."""
        if self._look is None:
            return
        for image in {entry.deployment.image for entry in self.catalog.functions()}:
            with suppress(AdapterError):
                await self._look(image, False)  # a registry that is away must not hold up the start

    def deploy(self, wanted: wire.FunctionDeployment) -> Entry:
        """Validate, remember, prepare in the background. Raises `ConfigError`, `NotFound`, `Unavailable`."""
        self.check_open()
        try:
            spec = self._spec(wanted)
        except (NotFound, HandlerError) as exc:  # 404 would tell faas-cli that there is nothing to update
            raise ConfigError(exc.message, why=exc.why, hint=exc.hint, code=exc.code) from exc
        self.catalog.namespace(wanted.namespace)
        there = self.catalog.secrets(wanted.namespace)
        missing = [name for name in wanted.secrets if name not in there]
        if missing:
            raise ConfigError(
                f"{wanted.key} needs secrets that do not exist: {', '.join(missing)}.",
                why=f"The namespace {wanted.namespace} has: {', '.join(there) or 'none'}.",
                hint=f"Create them with: {wire.secret_command('create', missing[0], wanted.namespace)}",
                code="secret-missing",
            )
        entry = self.catalog.put(wanted, datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
        logger.info("a function is deployed", extra={"fields": {"function": wanted.key, "revision": entry.revision}})
        if wanted.without_effect:
            logger.warning(
                "parts of a deploy have no effect",
                extra={"fields": {"function": wanted.key, "why": wanted.without_effect}},
            )
        self._install(entry, spec, first=True)
        return entry

    def remove(self, key: str) -> None:
        """Raises `NotFound`, `Unavailable`."""
        self.check_open()
        self.catalog.remove(key)
        logger.info("a function is removed", extra={"fields": {"function": key}})
        self._background.run(self._retire(self.fleets.pop(key)))

    async def _retire(self, fleet: Fleet) -> None:
        await fleet.close(removed=True)
        if fleet.deployment.key not in self.fleets:  # not deployed anew meanwhile
            await self.host.remove(fleet.deployment)

    def _spec(self, wanted: wire.FunctionDeployment) -> FunctionSpec:
        config, source = self._config_of(wanted.image)
        spec = parse_spec(config, wanted.policy(), source=source)
        if spec.gpus:
            self.gpus.check(Want.of(wanted.key, spec))
        return _as_watchdog_says(spec, wanted.env_vars)

    def _take_up(self, entry: Entry) -> None:
        """A function of an earlier life; one that cannot run any more is there all the same, and says why."""
        try:
            self._install(entry, self._spec(entry.deployment), first=False)
        except AdapterError as error:
            fields = {"function": entry.deployment.key, "why": error.message}
            logger.warning("a function cannot be taken up", extra={"fields": fields})
            deployment = _deployment(entry, parse_spec({}, {}))
            fleet = self.fleets[deployment.key] = Fleet(self.host, deployment, self, self.gpus)
            fleet.prepared(deployment, error, initial=0)

    def _install(self, entry: Entry, spec: FunctionSpec, *, first: bool) -> None:
        deployment = _deployment(entry, spec)
        fleet = self.fleets.get(deployment.key)
        if fleet is None:
            fleet = self.fleets[deployment.key] = Fleet(self.host, deployment, self, self.gpus)
        else:
            fleet.update(deployment)
        self._background.run(self._prepare(fleet, deployment, initial=spec.initial_replicas if first else 0))

    async def _prepare(self, fleet: Fleet, deployment: Deployment, *, initial: int) -> None:
        problem: AdapterError | None = None
        began = time.monotonic()
        try:
            await self.host.prepare(deployment)
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
        await self._recorder.flush()
        return await asyncio.to_thread(self.ledger.starts, function, namespace, limit)

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
    wanted = entry.deployment
    return Deployment(
        name=wanted.service,
        namespace=wanted.namespace,
        revision=str(entry.revision),
        image=wanted.image,
        spec=spec,
        env=tuple(wanted.env_vars.items()),
        secrets=wanted.secrets,
    )
