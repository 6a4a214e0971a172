"""Hosts: where replicas run. A host starts, parks and stops replicas; it decides nothing.

Implementations: `adapter.hosts.process` (this machine, no containers), `adapter.hosts.container` (this machine's
container engine), `adapter.hosts.kubernetes` (a cluster's pods). Callers know only what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from adapter.policy.grants import Device
from adapter.records import Event
from adapter.spec import FunctionSpec


@dataclass(frozen=True, slots=True)
class Terms:
    """What a deploy says about where and how replicas run, beside the spec: a cluster's business.

    `limits` and `requests` are Kubernetes quantities by resource name, `constraints` are ``label=value`` of nodes.
    """

    labels: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    constraints: tuple[str, ...] = ()
    limits: tuple[tuple[str, str], ...] = ()
    requests: tuple[tuple[str, str], ...] = ()
    read_only_root: bool = False
    command: str = ""
    """OpenFaaS's `envProcess`: what of-watchdog starts, in images that have it."""
    holds_requests: bool = False
    """The image has our entrypoint: requests can be sent to it as soon as it listens."""
    user: str = ""
    """Whom the image runs as by itself; empty: root, or not known."""
    python_path: str = ""
    """The image's own PYTHONPATH."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """One revision of one function, as a host needs it. Secret values are never here, only names."""

    name: str
    namespace: str
    revision: str
    image: str
    spec: FunctionSpec
    env: tuple[tuple[str, str], ...] = ()
    secrets: tuple[str, ...] = ()
    terms: Terms = field(default_factory=Terms)

    @property
    def key(self) -> str:
        """``name.namespace``: how OpenFaaS's routes and metrics name a function."""
        return f"{self.name}.{self.namespace}"


@dataclass(frozen=True, slots=True)
class Inventory:
    """The GPUs of a host, MIG slices in the place of the GPU they are cut from. `why_not`: why there are none.

    `asleep`: UUIDs of those without persistence mode, whose driver comes up anew when nobody uses them.
    """

    devices: tuple[Device, ...] = ()
    driver: str = ""
    why_not: str = ""
    asleep: tuple[str, ...] = ()


class ReplicaState(str, Enum):
    STARTING = "starting"
    """Its socket listens and requests sent to it are held; no model process serves yet."""
    SERVING = "serving"
    PARKED = "parked"
    """Frozen, memory kept; a request sent to it wakes it. One that was given GPUs holds none: `resume` wakes it."""
    STOPPING = "stopping"
    GONE = "gone"


class Replica(Protocol):
    """One replica that a host has started. `state` changes as its entrypoint's events arrive."""

    id: str
    deployment: Deployment
    host: str
    port: int
    state: ReplicaState
    building_snapshot: bool
    """A process snapshot is being taken beside it: stopping it now would waste that work."""

    def park(self) -> None:
        """Ask it to freeze; the PARKED event follows once no request is in flight, or nothing happens."""

    def resume(self, devices: Sequence[str]) -> None:
        """Wake a parked replica on these GPUs (UUIDs), its own from now on; the SERVING event follows."""

    async def stop(self, grace_s: float) -> None:
        """Drain, exit; killed after `grace_s` seconds. Returns when nothing of it is left."""


EventSink = Callable[[Replica, Event], None]


@dataclass(frozen=True, slots=True)
class Traits:
    """What kind of host it is, as far as a gateway has to know.

    `orchestration` is its name in OpenFaaS's `/system/info`. `parks`: replicas can give their GPU memory back and stay.
    `grants_gpus`: who gets which GPU is the gateway's to decide. `bounds_replicas`: limits of memory and CPU are kept.
    `outlives_us`: its replicas stay when a gateway ends, and are taken back by the next one.
    """

    orchestration: str = "process"
    parks: bool = True
    grants_gpus: bool = True
    bounds_replicas: bool = False
    outlives_us: bool = False


class Keeper(Protocol):
    """Who takes back replicas that another life of the gateway started."""

    def deployment_of(self, key: str, revision: str) -> Deployment | None:
        """What such a replica is of: the function's own object where the revision runs still or will, a copy with
        the old revision where it is past. None where there is no such function (yet)."""

    def take(self, replica: Replica) -> EventSink:
        """It is a member from now on; its events go to the sink that is returned."""


class Host(Protocol):
    """Starts replicas. Every method may raise `adapter.errors.AdapterError`."""

    traits: Traits

    async def check(self, deployment: Deployment) -> None:
        """Before a deploy is accepted: raises `ConfigError` where no replica of it could ever be started here."""

    async def prepare(self, deployment: Deployment) -> None:
        """Make `deployment` startable: find its folder, build its environment. May take minutes; idempotent."""

    async def start(self, deployment: Deployment, sink: EventSink, devices: tuple[str, ...] = ()) -> Replica:
        """Start a replica on these GPUs (UUIDs), the only ones it sees; returns as soon as requests can be sent
        to it. Its events go to `sink`, and after the last of them, when the replica has ended for whatever
        reason, an Event STOPPED always does."""

    def adopt(self, keeper: Keeper, key: str = "") -> None:
        """Give `keeper` the replicas that run and that nobody here started, those of the function `key` or of all;
        and from now on those that appear."""

    def hindrance(self, key: str) -> str:
        """What the starts under way of a function wait for, for people; empty where all goes well."""

    async def inventory(self) -> Inventory:
        """Its GPUs as they are now. Never raises: what hinders is `why_not`."""

    async def remove(self, deployment: Deployment) -> None:
        """Forget what `prepare` made for this deployment alone (its logs, not shared environments)."""

    async def close(self) -> None:
        """Stop every replica, nothing of this host is left running; or where they outlive us, let go of them."""


class LocalHost:
    """What hosts of one machine have in common: their replicas end with them, and GPUs are the gateway's to give."""

    traits = Traits()

    async def check(self, deployment: Deployment) -> None:
        """Whatever it is, `prepare` finds out."""

    def adopt(self, keeper: Keeper, key: str = "") -> None:
        """Nothing outlives a gateway here."""

    def hindrance(self, key: str) -> str:
        """A start is under way or has failed: it waits for nothing."""
        return ""
