"""Prometheus metrics of an agent."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from adapter.cluster.health import new_registry


class Metrics:
    """One registry for one agent; no name of a pod or a function is in it."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or new_registry()
        self.leases = self._gauge("gpufn_agent_leases", "Devices, and places on the node, that functions hold")
        self.unacked = self._gauge("gpufn_ledger_unacked_events", "Records that the ledger has not acknowledged")
        self.spool_bytes = self._gauge("gpufn_agent_spool_bytes", "Bytes that they and the agent's state take")
        self.spool_full = self._gauge(
            "gpufn_agent_spool_full", "1 while the spool has no room: heartbeats are merged, and a crash loses more"
        )
        self.clock_offset = self._gauge(
            "gpufn_agent_clock_offset_seconds", "How far the ledger's clock is ahead of what records are dated by"
        )
        self.told = self._counter("gpufn_agent_records", "Records that were put into the spool")
        self.unspooled = self._counter("gpufn_agent_spool_failures", "Times that the spool could not be written")
        self.starts_dropped = self._counter(
            "gpufn_agent_starts_dropped", "Start records that were left out: too long, or too many of one pod"
        )
        self.refused = self._counter("gpufn_agent_refused", "Records that the ledger refused, by reason", "code")
        self.failures = self._counter("gpufn_agent_failures", "Calls that failed", "peer")
        for peer in ("ledger", "kubelet", "replica", "api"):
            self.failures.labels(peer)
        self.snapshot_bytes = self._gauge("gpufn_snapshot_cache_bytes", "Bytes of snapshots on the node")
        self.evicted = self._counter("gpufn_snapshots_evicted", "Snapshots that were removed to make room")

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)
