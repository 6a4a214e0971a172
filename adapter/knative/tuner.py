"""Keeps Knative's Revisions as warm as their functions' traffic is worth, by annotations that make no new Revision.

Where they have to be depends on Knative. Since 1.21 a Revision's autoscaling annotations are copied to its PodAutoscaler
whenever they change, whatever else is there is taken away, and pods do not get them. Before, the PodAutoscaler gets them
once, when it is made, and pods get them too, so that one on the Revision would replace every pod. So a Knative from 1.21
on is told on Revisions, an older one on PodAutoscalers, and one that does not say how old it is on PodAutoscalers until
it takes that away.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.informer import Informer
from adapter.cluster.json_parts import object_in
from adapter.cluster.resources import CONFIG_MAPS, KNATIVE_POD_AUTOSCALERS, KNATIVE_REVISIONS
from adapter.errors import AdapterError
from adapter.knative.autoscaling import MIN_SCALE, Defaults
from adapter.knative.tuning import (
    Autoscaler,
    Revision,
    Traffic,
    Tuning,
    kept_by,
    read_autoscaler,
    read_revision,
    release,
    traffic_of,
    tune,
)
from adapter.ledger.traffic import LedgerTraffic
from adapter.policy.placement import Need, Node, place

logger = logging.getLogger(__name__)

_LOOK_S = 60.0
"""How often a Revision is looked at while nothing happens to it."""
_ASK_VERSION_S = 600.0
_VERSION_LABEL = "app.kubernetes.io/version"
SERVING_NAMESPACE = "knative-serving"


def revisions_of(api: Api) -> Informer[Revision]:
    """A cache of the Revisions that are ours, for a `Tuner`."""
    return Informer(api, KNATIVE_REVISIONS.path(), read_revision, optional=True)


def autoscalers_of(api: Api) -> Informer[Autoscaler]:
    """A cache of all PodAutoscalers, for a `Tuner`."""
    return Informer(api, KNATIVE_POD_AUTOSCALERS.path(), read_autoscaler, optional=True)


async def _never(_: Revision) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class _Told:
    """What an autoscaler was told last, and its version since then."""

    uid: str
    version: int
    annotations: frozenset[str]

    def is_undone(self, now: Autoscaler) -> bool:
        """Somebody took all of it away again."""
        is_later = now.uid == self.uid and now.version > self.version
        return is_later and bool(self.annotations) and self.annotations.isdisjoint({*now.ours, *now.theirs})


class Tuner:
    """A reconciler (`adapter.controller.reconcilers`) of Revisions. `nodes` says what there is now: nothing is woken
    ahead of its caller onto the last free GPU, nor where `is_spent` says that its budget is."""

    name = "knative-tuner"

    def __init__(
        self,
        api: Api,
        revisions: Informer[Revision],
        autoscalers: Informer[Autoscaler],
        traffic: LedgerTraffic,
        *,
        defaults: Callable[[], Defaults],
        nodes: Callable[[], Iterable[Node]],
        is_spent: Callable[[Revision], Awaitable[bool]] = _never,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._api, self._revisions, self._autoscalers, self._traffic = api, revisions, autoscalers, traffic
        self._defaults, self._nodes, self._is_spent, self._clock_ns = defaults, nodes, is_spent, clock_ns
        self._told: dict[str, _Told] = {}
        self._copies: bool | None = None
        """Knative copies from Revisions what changes; None: not known."""
        self._asked_at = -math.inf

    def start(self, changed: Callable[[str], None]) -> None:
        def handle(key: str, _old: object, new: object) -> None:
            if new is None:
                self._told.pop(key, None)
            else:
                changed(key)

        self._revisions.on_change(handle)
        self._autoscalers.on_change(handle)

    def all_keys(self) -> Iterable[str]:
        return self._revisions.snapshot().keys()

    async def reconcile(self, key: str) -> float | None:
        revision = self._revisions.get(key)
        if revision is None:
            return None
        await self._ask_version()
        autoscaler = self._autoscalers.get(key)
        if self._copies is None and autoscaler is not None and self._is_undone(key, autoscaler):
            self._copies = True
        if not self._copies:
            if autoscaler is None:
                return None  # until it is made
            revision = kept_by(autoscaler, revision)
        activity = await self._traffic.of(revision.namespace, revision.function)
        is_spent = await self._is_spent(revision)
        found = self._found(revision, traffic_of(activity, self._clock_ns()), may_prewarm=not is_spent)
        if dict(found.annotations) != dict(revision.ours):
            await self._set(key, revision, found, None if self._copies else autoscaler)
        if not revision.is_routed:
            return None
        return _LOOK_S if found.again_s is None else min(_LOOK_S, found.again_s)

    def _found(self, revision: Revision, traffic: Traffic, *, may_prewarm: bool) -> Tuning:
        defaults = self._defaults()
        if not self._traffic.is_fresh:
            return release(revision, traffic, defaults)
        found = tune(revision, traffic, defaults, may_prewarm=may_prewarm)
        if MIN_SCALE in found.annotations and not has_spare(revision.need, self._nodes()):
            return tune(revision, traffic, defaults)
        return found

    async def _set(self, key: str, revision: Revision, found: Tuning, autoscaler: Autoscaler | None) -> None:
        """On the autoscaler, or on the Revision where that is None."""
        resource, uid = (
            (KNATIVE_REVISIONS, revision.uid) if autoscaler is None else (KNATIVE_POD_AUTOSCALERS, autoscaler.uid)
        )
        # The uid: what has been made anew under this name is not ours to change, and nothing is made by this.
        metadata = {"annotations": dict(found.annotations), "uid": uid}
        body = resource.body(revision.name, revision.namespace, metadata=metadata)
        after = await self._api.apply(resource.path(revision.namespace, revision.name), body)
        if autoscaler is not None:
            version = str(after["metadata"].get("resourceVersion", ""))
            self._told[key] = _Told(uid, int(version) if version.isdecimal() else 0, frozenset(found.annotations))
        fields = {"revision": key, "on": resource.kind, "was": dict(revision.ours), "is": dict(found.annotations)}
        logger.info("a revision is kept warm otherwise", extra={"fields": {**fields, "why": found.reason}})

    def _is_undone(self, key: str, autoscaler: Autoscaler) -> bool:
        told = self._told.get(key)
        if told is None or not told.is_undone(autoscaler):
            return False
        logger.info("this Knative takes keep-alives from Revisions", extra={"fields": {"seen_at": key}})
        return True

    async def _ask_version(self) -> None:
        """Whether it copies. Asked again from time to time: it may be another one by then."""
        now = time.monotonic()
        if now - self._asked_at < _ASK_VERSION_S:
            return
        self._asked_at = now
        path = CONFIG_MAPS.path(SERVING_NAMESPACE)
        try:
            found = await self._api.list(path, _version_said, field_selector="metadata.name=config-autoscaler")
        except AdapterError as error:
            logger.info("Knative's version is not known", extra={"fields": {"why": error.why or error.message}})
            return
        copies = copies_since(found.items[0]) if found.items else None
        if copies is not None:
            self._copies = copies


def _version_said(value: dict[str, Any]) -> str:
    return str(object_in(object_in(value, "metadata"), "labels").get(_VERSION_LABEL, ""))


def copies_since(version: str) -> bool | None:
    """Whether a Knative of this version copies what changes on Revisions; None where the version is no number."""
    match = re.match(r"v?([0-9]{1,4})\.([0-9]{1,4})(?![0-9])", version)
    return None if match is None else (int(match[1]), int(match[2])) >= (1, 21)


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
