"""Says why a function's pod has no node, on the pod and on its Knative Service: each reason, with how many nodes have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from adapter.cluster.events import EventRecorder
from adapter.cluster.intent import read_intent
from adapter.controller.cluster_view import ClusterView, PodFacts
from adapter.controller.metrics import ControllerMetrics
from adapter.controller.references import pod_and_service
from adapter.errors import ConfigError
from adapter.policy.placement import Need, Node, explain, may_fit_later, place

REASON, LATER_REASON = "GpuFunctionNeverFits", "GpuFunctionWaits"
_LOOK_S = 30.0
"""Nodes come and go without a change of the pod."""


class UnplacedPods:
    """A reconciler of pods without a node, by ``namespace/name``."""

    name = "unplaced-pods"

    def __init__(self, view: ClusterView, events: EventRecorder, metrics: ControllerMetrics) -> None:
        self._view, self._events, self._metrics = view, events, metrics
        self._waiting: dict[str, bool] = {}
        """Of each pod without a node that fits, whether one may later."""
        self._nodes: tuple[Node, ...] = ()
        self._known: dict[Need, tuple[str, bool]] = {}

    def start(self, changed: Callable[[str], None]) -> None:
        def on_pod(key: str, old: PodFacts | None, new: PodFacts | None) -> None:
            if any(facts is not None and facts.waiting is not None for facts in (old, new)):
                changed(key)

        self._view.pods.on_change(on_pod)

    def all_keys(self) -> Iterable[str]:
        self._waiting.clear()  # of what went while another led, nobody told us
        return [key for key, facts in self._view.pods.snapshot().items() if facts.waiting is not None]

    async def reconcile(self, key: str) -> float | None:
        facts = self._view.pods.get(key)
        pod = facts.waiting if facts else None
        why, later = self._why(pod) if pod is not None else ("", False)
        self._count(key, None if not why else later)
        if pod is None:
            return None
        if why:
            reason = LATER_REASON if later else REASON
            for about in pod_and_service(pod):
                await self._events.say(about, reason, why)
        return _LOOK_S

    def _why(self, pod: Mapping[str, Any]) -> tuple[str, bool]:
        """Why no node fits, and whether one may later; empty where one does: the scheduler will find it."""
        namespace = pod["metadata"]["namespace"]
        try:
            intent = read_intent(pod, namespace=namespace, namespace_labels=self._view.namespaces.get(namespace) or {})
        except ConfigError as exc:
            return f"{exc.message} {exc.why} {exc.hint}".strip(), False
        if intent is None:
            return "", False
        return self._looked_up(replace(intent.need, function="", snapshot=""))

    def _looked_up(self, need: Need) -> tuple[str, bool]:
        """Many pods that wait need the same: nodes are looked at once for all, as long as nothing changes there."""
        nodes = self._view.inventory()
        if nodes is not self._nodes:
            self._nodes, self._known = nodes, {}
        found = self._known.get(need)
        if found is None:
            verdicts = place(need, nodes)
            fits = any(verdict.fits for verdict in verdicts)
            found = self._known[need] = ("", False) if fits else (explain(verdicts), may_fit_later(verdicts))
        return found

    def _count(self, key: str, later: bool | None) -> None:
        if later is None:
            self._waiting.pop(key, None)
        else:
            self._waiting[key] = later
        for value in (True, False):
            number = sum(each is value for each in self._waiting.values())
            self._metrics.unplaced.labels(str(value).lower()).set(number)
