"""Keeps Knative's Revisions as warm as their functions' traffic is worth, by annotations of Revisions.

No Revision appears by that, and no pod is replaced: Knative leaves a Revision's autoscaling annotations out of its
pods. From version 1.21 on it copies them to the Revision's PodAutoscaler itself; before, it does so when it makes one,
and reads that alone afterwards. So the PodAutoscaler is told as well, and first: what is on the Revision is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.informer import Informer
from adapter.cluster.resources import KNATIVE_POD_AUTOSCALERS, KNATIVE_REVISIONS
from adapter.errors import NotFound
from adapter.knative.autoscaling import MIN_SCALE, Defaults, said
from adapter.knative.traffic import LedgerTraffic
from adapter.knative.tuning import TUNED, Revision, Traffic, Tuning, read_revision, release, traffic_of, tune
from adapter.policy.placement import Need, Node, place

logger = logging.getLogger(__name__)

_LOOK_S = 60.0
"""How often a Revision is looked at while nothing happens to it."""


def revisions_of(api: Api) -> Informer[Revision]:
    """A cache of the Revisions that are ours, for a `Tuner`."""
    return Informer(api, KNATIVE_REVISIONS.path(), read_revision)


class Tuner:
    """A reconciler (`adapter.controller.reconcilers`) of Revisions. `nodes` says what there is now: nothing is woken
    ahead of its caller onto the last free GPU."""

    name = "knative-tuner"

    def __init__(
        self,
        api: Api,
        revisions: Informer[Revision],
        traffic: LedgerTraffic,
        *,
        defaults: Callable[[], Defaults],
        nodes: Callable[[], Iterable[Node]],
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._api, self._revisions, self._traffic = api, revisions, traffic
        self._defaults, self._nodes, self._clock_ns = defaults, nodes, clock_ns

    def start(self, changed: Callable[[str], None]) -> None:
        def handle(key: str, _old: Revision | None, new: Revision | None) -> None:
            if new is not None:
                changed(key)

        self._revisions.on_change(handle)

    def all_keys(self) -> Iterable[str]:
        return self._revisions.snapshot().keys()

    async def reconcile(self, key: str) -> float | None:
        revision = self._revisions.get(key)
        if revision is None:
            return None
        activity = await self._traffic.of(revision.namespace, revision.function)
        traffic = traffic_of(activity, self._clock_ns())
        found = self._found(revision, traffic)
        if dict(found.annotations) != dict(revision.ours):
            await self._set(revision, found)
        if not revision.is_routed:
            return None
        return _LOOK_S if found.again_s is None else min(_LOOK_S, found.again_s)

    def _found(self, revision: Revision, traffic: Traffic) -> Tuning:
        defaults = self._defaults()
        if not self._traffic.is_fresh:
            return release(revision, traffic, defaults)
        found = tune(revision, traffic, defaults, may_prewarm=True)
        if MIN_SCALE in found.annotations and not has_spare(revision.need, self._nodes()):
            return tune(revision, traffic, defaults)
        return found

    async def _set(self, revision: Revision, found: Tuning) -> None:
        await self._tell_autoscaler(revision, found.annotations)
        body = KNATIVE_REVISIONS.body(
            revision.name,
            revision.namespace,
            metadata={"annotations": dict(found.annotations), "uid": revision.uid},  # of no other, and none made anew
        )
        await self._api.apply(KNATIVE_REVISIONS.path(revision.namespace, revision.name), body)
        fields = {
            "revision": f"{revision.namespace}/{revision.name}",
            "was": dict(revision.ours),
            "is": dict(found.annotations),
            "why": found.reason,
        }
        logger.info("a revision is kept warm otherwise", extra={"fields": fields})

    async def _tell_autoscaler(self, revision: Revision, annotations: Mapping[str, str]) -> None:
        """All that we ever set, but what the user has: also what is to go."""
        own: dict[str, Any] = {key: annotations.get(key) for key in TUNED if said(revision.theirs, key) is None}
        path = KNATIVE_POD_AUTOSCALERS.path(revision.namespace, revision.name)
        try:
            await self._api.patch(path, {"metadata": {"annotations": own}})
        except NotFound:
            pass  # Knative has not made it yet, and will make it of the Revision


def has_spare(need: Need, nodes: Iterable[Node]) -> bool:
    """Whether one more replica would leave room for another."""
    if not need.gpus:
        return True
    by_name = {node.name: node for node in nodes}
    room = 0
    for verdict in place(need, by_name.values()):
        if verdict.fits and verdict.units:
            offers = (offer for offer in by_name[verdict.node].offers if offer.resource == verdict.resource)
            room += sum(offer.free // verdict.units for offer in offers)
    return room > 1
