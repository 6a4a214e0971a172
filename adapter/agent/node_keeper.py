"""What the node has, looked at again and again: published as its `GpuNode`, and its snapshots kept below their limit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapter.agent import node
from adapter.agent.cache import Cached, Savings, disk_bytes_per_s, evict
from adapter.agent.due import SnapshotsDue
from adapter.agent.metrics import Metrics
from adapter.agent.settings import AgentSettings
from adapter.cluster.api import Api
from adapter.errors import AdapterError
from adapter.hosts import Inventory
from adapter.hosts.inventory import read_inventory

logger = logging.getLogger(__name__)

_INVENTORY_S, _CACHE_S, _WRITE_S = 60.0, 30.0, 10.0
_AGAIN_S = 600.0
"""How often it is written though nothing has changed: somebody may have deleted it."""


class NodeKeeper:
    """`allocatable`: UUIDs of the devices that the kubelet hands out. `savings` and `due` are told what is heard."""

    def __init__(
        self, settings: AgentSettings, api: Api, metrics: Metrics, allocatable: Callable[[], Iterable[str]]
    ) -> None:
        self._settings, self._api, self._metrics, self._allocatable = settings, api, metrics, allocatable
        self.savings = Savings()
        self.due = SnapshotsDue()
        self._inventory = Inventory(why_not="Nobody has looked yet.")
        self._labels: Mapping[str, str] = {}
        self._cached: list[Cached] = []

    def gpus(self) -> list[node.Gpu]:
        return node.gpus_of(self._inventory, self._allocatable(), self._labels)

    async def run(self, why_no_restore: str) -> None:
        """Read what the node has, keep its snapshots below their limit, and publish both. Until it is cancelled."""
        disk = await asyncio.to_thread(disk_bytes_per_s, self._settings.snapshot_dir.parent)
        written: Mapping[str, Any] | None = None
        inventory_at = cache_at = written_at = float("-inf")
        while True:
            try:
                if time.monotonic() - inventory_at > _INVENTORY_S:
                    inventory_at = time.monotonic()
                    self._inventory = await asyncio.to_thread(read_inventory)
                    self._labels = await node.labels(self._api, self._settings.node)
                if time.monotonic() - cache_at > _CACHE_S:
                    cache_at = time.monotonic()
                    await self._look_at_cache()
                status = node.status_of(
                    self.gpus(),
                    self._inventory,
                    self._cached,
                    self.due.listed(self._cached),
                    disk_bytes_per_s=disk,
                    why_no_restore=why_no_restore,
                )
                if status != written or time.monotonic() - written_at > _AGAIN_S:
                    await node.write(self._api, self._settings.node, status, time.time_ns())
                    written, written_at = status, time.monotonic()
            except AdapterError as error:
                self._metrics.failures.labels("api").inc()
                logger.warning("the node is not described", extra={"fields": {"code": error.code, "why": error.why}})
            except Exception:  # boundary: nothing here may end the agent
                logger.exception("looking at the node failed")
            await asyncio.sleep(_WRITE_S)

    async def _look_at_cache(self) -> None:
        settings = self._settings
        self._cached, left = await asyncio.to_thread(
            evict, settings.snapshot_dir, settings.snapshot_limit_bytes, self.savings
        )
        self._metrics.snapshot_bytes.set(sum(one.bytes for one in self._cached))
        self._metrics.evicted.inc(len(left))
        for one in left:
            logger.info("a snapshot is removed", extra={"fields": {"name": one.name, "key": one.key}})
