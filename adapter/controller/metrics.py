"""Prometheus metrics of the webhook and of the controller. No label names a pod, a node or a request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from adapter.cluster.informer import Informer

_ADMISSION_BUCKETS_S = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2)
"""The API server waits for two seconds."""
_LAG_BUCKETS_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 15, 60, 300)


class AdmissionMetrics:
    """Of the webhook. `outcome`: ``patched``, ``untouched``, ``refused`` (a user's error) or ``failed`` (ours)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.reviews = Counter(
            "gpufn_admission_reviews", "Reviews answered", ["kind", "outcome", "code"], registry=registry
        )
        self.seconds = Histogram(
            "gpufn_admission_duration_seconds",
            "From a review's last byte to its answer",
            ["kind"],
            registry=registry,
            buckets=_ADMISSION_BUCKETS_S,
        )
        self.reserved = Gauge(
            "gpufn_admission_reservations", "Choices for pods that have no node yet", registry=registry
        )
        for kind in ("pods", "services"):
            self.seconds.labels(kind)
            self.reviews.labels(kind, "failed", "")


class ControllerMetrics:
    """Of the controller. `reconciler` is one of a few names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.leading = Gauge("gpufn_controller_leading", "1 on the replica that leads", registry=registry)
        self.lag = Histogram(
            "gpufn_controller_lag_seconds",
            "From an event to the end of what it led to",
            ["reconciler"],
            registry=registry,
            buckets=_LAG_BUCKETS_S,
        )
        self.failures = Counter(
            "gpufn_reconcile_failures",
            "Attempts that failed, to be repeated",
            ["reconciler", "code"],
            registry=registry,
        )
        self.unplaced = Gauge(
            "gpufn_unplaced_pods", "Pods of functions that no node fits now, by whether one may later", ["later"],
            registry=registry,
        )  # fmt: skip

    def leads(self, *, does: bool) -> None:
        """Of what only a leader knows, nothing is left for two to tell when it leads no more."""
        self.leading.set(int(does))
        self.unplaced.clear()


class InformerCollector(Collector):
    """What each informer knows of its watch, when it is asked."""

    def __init__(self, informers: Iterable[Informer[Any]], registry: CollectorRegistry) -> None:
        self._informers = list(informers)
        registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        label = ["resource"]
        objects = GaugeMetricFamily("gpufn_cache_objects", "Objects in a cache", labels=label)
        silent = GaugeMetricFamily(
            "gpufn_watch_silent_seconds", "Since the API server last said anything of it", labels=label
        )
        lists = CounterMetricFamily("gpufn_watch_lists", "Times that all was listed", labels=label)
        failures = CounterMetricFamily("gpufn_watch_failures", "Times that a list or watch was cut", labels=label)
        by_resource: dict[str, list[Informer[Any]]] = {}
        for informer in self._informers:
            by_resource.setdefault(informer.path.rsplit("/", 1)[1], []).append(informer)
        for resource, alike in by_resource.items():
            objects.add_metric([resource], sum(map(len, alike)))
            silent.add_metric([resource], max(each.silent_s for each in alike))
            lists.add_metric([resource], sum(each.lists for each in alike))
            failures.add_metric([resource], sum(each.failures for each in alike))
        return objects, silent, lists, failures
