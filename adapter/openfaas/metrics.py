"""Prometheus metrics of the gateway: OpenFaaS's names, so that existing boards work, and ours."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from adapter import __version__
from adapter.openfaas.fleet import Fleet
from adapter.openfaas.gpus import Gpus
from adapter.records import StartRecord

_SECONDS_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300)
"""From a restored wake to a large model's plain start."""


class Metrics:
    """One registry for one gateway; ``function_name`` is ``<name>.<namespace>``."""

    def __init__(self) -> None:
        # A series more for each one, which OpenFaaS has not and no board asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        by_name, by_code = ("function_name",), ("function_name", "code")
        # OpenFaaS counts these without `_total`, which the client library would add to a counter.
        self.started = self._gauge("gateway_function_invocation_started", "Invocations begun", *by_name)
        self.invocations = self._counter("gateway_function_invocation", "Invocations answered", *by_code)
        self.seconds = self._histogram(
            "gateway_functions_seconds", "Seconds until an invocation was answered", *by_code
        )
        self.service_count = self._gauge("gateway_service_count", "Replicas that are wanted", *by_name)
        self.replicas = self._gauge("gpufn_replicas", "Replicas", "function", "state")
        self.waiting = self._gauge("gpufn_requests_waiting", "Requests that wait for a replica", "function")
        device = ("uuid", "model")
        self.gpu_memory = self._gauge("gpufn_gpu_memory_bytes", "Memory of a GPU or MIG slice", *device)
        self.gpu_held = self._gauge("gpufn_gpu_memory_held_bytes", "Of it, what replicas hold", *device)
        self.gpu_waiting = self._gauge("gpufn_gpu_waiting", "Replicas that wait for a GPU")
        self.cold_starts = self._counter(
            "gpufn_cold_starts", "Starts of replicas, by the rung that served", "function", "mode"
        )
        self.start_phases = self._histogram(
            "gpufn_start_phase_duration_seconds", "Seconds of one phase of a start", "function", "phase"
        )
        self.skipped = self._counter(
            "gpufn_rung_skipped", "Faster rungs that were not taken", "function", "rung", "reason"
        )
        self._gauge("gpufn_build_info", "Always 1; the version is the label", "version").labels(__version__).set(1)
        self._answered: Tally[str] = Tally()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=_SECONDS_BUCKETS)

    def count_begun(self, function: str) -> None:
        self.started.labels(function).inc()

    def count_answered(self, function: str, status: int, seconds: float) -> None:
        self._answered[function] += 1
        self.invocations.labels(function, str(status)).inc()
        self.seconds.labels(function, str(status)).observe(seconds)

    def answered(self, function: str) -> int:
        """Invocations of any status since this gateway runs."""
        return self._answered[function]

    def count_start(self, function: str, record: StartRecord) -> None:
        self.cold_starts.labels(function, "failed" if record.error else record.rung.value).inc()
        for phase in record.phases:
            self.start_phases.labels(function, phase.name.value).observe(phase.seconds)
        for skipped in record.skipped:
            self.skipped.labels(function, skipped.rung.value, skipped.code).inc()

    def text(self, fleets: Iterable[Fleet], gpus: Gpus) -> bytes:
        """The exposition, with what `fleets` and `gpus` are at this moment."""
        for gauge in (self.service_count, self.replicas, self.waiting):
            gauge.clear()
        for fleet in fleets:
            name = fleet.deployment.key
            self.service_count.labels(name).set(fleet.desired)
            self.waiting.labels(name).set(fleet.waiting)
            for state, count in Tally(member.state.value for member in fleet.members.values()).items():
                self.replicas.labels(name, state).set(count)
        for row in gpus.rows():
            device = row["uuid"], row["model"]
            self.gpu_memory.labels(*device).set(row["memory_bytes"])
            self.gpu_held.labels(*device).set(row["memory_bytes"] - row["free_bytes"])
        self.gpu_waiting.set(len(gpus.waiting()))
        return generate_latest(self.registry)
