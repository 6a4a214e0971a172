"""Hosts: where replicas run. A host starts, parks and stops replicas; it decides nothing.

Implementations: `adapter.hosts.process` (this machine, no containers). Callers know only what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from adapter.policy.grants import Device
from adapter.records import Event
from adapter.spec import FunctionSpec


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


class Host(Protocol):
    """Starts replicas. Every method may raise `adapter.errors.AdapterError`."""

    async def prepare(self, deployment: Deployment) -> None:
        """Make `deployment` startable: find its folder, build its environment. May take minutes; idempotent."""

    async def start(self, deployment: Deployment, sink: EventSink, devices: tuple[str, ...] = ()) -> Replica:
        """Start a replica on these GPUs (UUIDs), the only ones it sees; returns as soon as requests can be sent
        to it. Its events go to `sink`, and after the last of them, when the replica has ended for whatever
        reason, an Event STOPPED always does."""

    async def inventory(self) -> Inventory:
        """Its GPUs as they are now. Never raises: what hinders is `why_not`."""

    async def remove(self, deployment: Deployment) -> None:
        """Forget what `prepare` made for this deployment alone (its logs, not shared environments)."""

    def log_path(self, deployment: Deployment) -> Path:
        """File of JSON lines ``{"timestamp", "instance", "text"}`` that all its replicas append to."""

    async def close(self) -> None:
        """Stop every replica; nothing of this host is left running."""
