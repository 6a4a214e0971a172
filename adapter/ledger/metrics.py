"""Prometheus metrics of the ledger service. Counters start at nought with it: bills rest on the ledger, never on these."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from adapter.cluster.health import new_registry
from adapter.ledger.wire import Batch, RefusalCode
from adapter.policy.conservation import Conservation, FindingKind


class Metrics:
    """One registry for one service."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or new_registry()
        self._records = Counter(
            "gpufn_ledger_records",
            "Records that agents delivered, by what became of them",
            ("outcome",),
            registry=self.registry,
        )
        self._refused = Counter(
            "gpufn_ledger_refused", "Records that were kept out, by reason", ("code",), registry=self.registry
        )
        self._residual = Gauge(
            "gpufn_metering_residual_seconds",
            "GPU-seconds of this hour and the last that do not add up, whichever way",
            registry=self.registry,
        )
        self._findings = Gauge(
            "gpufn_metering_findings",
            "Places in this hour and the last where GPU time does not add up",
            ("kind",),
            registry=self.registry,
        )
        for outcome in ("new", "repeated", "refused"):
            self._records.labels(outcome)
        for code in RefusalCode:
            self._refused.labels(code.value)

    def count_delivery(self, batch: Batch, new: int) -> None:
        sent = len(batch.intervals) + len(batch.starts) + len(batch.devices)
        self._records.labels("new").inc(new)
        self._records.labels("repeated").inc(sent - new)
        self._records.labels("refused").inc(len(batch.refused))
        for refusal in batch.refused:
            self._refused.labels(refusal.code.value).inc()

    def show(self, found: Conservation) -> None:
        self._residual.set(found.residual_ns / 1e9)
        for kind in FindingKind:
            self._findings.labels(kind.value).set(sum(finding.kind is kind for finding in found.findings))
