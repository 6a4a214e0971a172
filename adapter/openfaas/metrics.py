"""Prometheus metrics of the gateway: OpenFaaS's names, so that existing boards work, and ours."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from adapter import __version__
from adapter.records import StartRecord

_START_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300)


class Metrics:
    """One registry for one gateway; ``function_name`` is ``<name>.<namespace>``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_code = ("function_name", "code")
        self.started = self._counter("gateway_function_invocation_started", "Invocations begun", ("function_name",))
        self.invocations = self._counter("gateway_function_invocation", "Invocations answered", by_code)
        self.seconds = Histogram(
            "gateway_functions_seconds", "Seconds until an invocation was answered", by_code,
            registry=self.registry, buckets=_START_BUCKETS_S,
        )  # fmt: skip
        self.replicas = Gauge("gateway_service_count", "Replicas", ("function_name",), registry=self.registry)
        self.cold_starts = self._counter("gpufn_cold_starts", "Starts of replicas", ("function", "mode"))
        self.start_phases = Histogram(
            "gpufn_start_phase_duration_seconds", "Seconds of one phase of a start", ("function", "phase"),
            registry=self.registry, buckets=_START_BUCKETS_S,
        )  # fmt: skip
        self.skipped = self._counter("gpufn_rungs_skipped", "Rungs not taken, by reason", ("function", "rung", "reason"))
        self.held = Gauge("gpufn_requests_waiting", "Requests that wait for a replica", ("function",), registry=self.registry)
        build = Gauge("gpufn_build_info", "1", ("version",), registry=self.registry)
        build.labels(__version__).set(1)

    def _counter(self, name: str, help_text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, help_text, labels, registry=self.registry)

    def count_start(self, function: str, record: StartRecord) -> None:
        self.cold_starts.labels(function, record.rung.value).inc()
        for phase in record.phases:
            self.start_phases.labels(function, phase.name.value).observe(phase.seconds)
        for skipped in record.skipped:
            self.skipped.labels(function, skipped.rung.value, skipped.code).inc()

    def forget(self, function: str) -> None:
        """A removed function has no replicas; its counters stay, as counters do."""
        self.replicas.remove(function)
        self.held.remove(function)

    def text(self) -> bytes:
        return generate_latest(self.registry)
