"""Has the snapshots taken that nodes' agents say are due: a reconciler of nodes (see `snapshots` for what is decided)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.events import EventRecorder, reference_to
from adapter.cluster.informer import Informer
from adapter.cluster.intent import Intent, read_intent
from adapter.cluster.resources import NETWORK_POLICIES, PODS
from adapter.controller.cluster_view import ClusterView
from adapter.controller.snapshot_pod import has_gpu, name_of, network_policy, snapshot_pod
from adapter.controller.snapshots import Due, Step, Taking, next_step, outdated, taking_of
from adapter.errors import AdapterError, ConfigError, Conflict, NotFound
from adapter.keys import TASK_LABEL
from adapter.replica import TASK_SNAPSHOT

logger = logging.getLogger(__name__)

_REFUSED = frozenset({"forbidden", "refused-object"})
_TAKEN, _NOT_TAKEN = "SnapshotTaken", "SnapshotNotTaken"


class SnapshotTaker:
    """What is due it sees in `view`; what is being taken, in `takings`, which is to be run beside it. Both must have
    synced before anything is reconciled."""

    name = "snapshots"

    def __init__(
        self,
        api: Api,
        view: ClusterView,
        events: EventRecorder,
        *,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        self._api, self._view, self._events, self._clock_s = api, view, events, clock_s
        self.takings: Informer[Taking] = Informer(
            api, PODS.path(), taking_of, label_selector=f"{TASK_LABEL}={TASK_SNAPSHOT}"
        )

    def start(self, changed: Callable[[str], None]) -> None:
        def handle(_key: str, old: Taking | None, new: Taking | None) -> None:
            for taking in (old, new):
                if taking is not None:
                    changed(taking.wanted_on)

        self._view.gpu_nodes.on_change(lambda node, _old, _new: changed(node))
        self.takings.on_change(handle)

    def all_keys(self) -> Iterable[str]:
        return {*self._view.gpu_nodes.snapshot(), *(taking.wanted_on for taking in self.takings.snapshot().values())}

    async def reconcile(self, key: str) -> float | None:
        there = [taking for taking in self.takings.snapshot().values() if taking.wanted_on == key]
        agent = self._view.gpu_nodes.get(key)
        step = next_step(agent.due if agent else None, there, self._clock_s())
        for taking in there:
            if taking.is_over:
                await self._tell(taking)
        for taking in (*step.clear, *step.give_up):
            await self._delete(taking)
        for due in step.take:
            if await self._take(due, key, there, step):
                break
        return step.again_s

    async def _take(self, due: Due, node: str, there: list[Taking], step: Step) -> bool:
        """Whether its pod is there now. What cannot be taken is said on the replica, and the next has its turn."""
        try:
            pod = await self._api.get(PODS.path(due.namespace, due.pod))
        except NotFound:
            return False  # it has ended, and its agent will say so
        if pod["spec"].get("nodeName") != node:  # an agent speaks for its own node
            return False
        intent = self._intent(pod, due.namespace)
        names = {(taking.namespace, taking.name) for taking in there}
        if intent is None or (due.namespace, name := name_of(intent, node, _image(pod, intent))) in names:
            return False
        made = snapshot_pod(pod, intent, node)
        if step.gpu_waits and has_gpu(made):
            for taking in outdated(there, intent.need.snapshot, step.take):
                await self._delete(taking)  # its end is the next look at this node
            return False
        try:
            await self._api.apply(network_policy_path(due.namespace), network_policy(due.namespace))
            await self._api.create(PODS.path(due.namespace), made)
        except Conflict:
            return await self._is_ours(due.namespace, name)
        except AdapterError as error:
            if error.code not in _REFUSED:
                raise
            why = f"No snapshot {intent.need.snapshot} on {node}: its pod is not allowed there. {error.why}"
            await self._events.say(reference_to(pod), _NOT_TAKEN, why)
            return False
        fields = {"snapshot": intent.need.snapshot, "node": node, "for": f"{due.namespace}/{due.pod}"}
        logger.info("a snapshot is being taken", extra={"fields": fields})
        return True

    async def _is_ours(self, namespace: str, name: str) -> bool:
        """Whether we, or who led before, made it a moment ago; somebody else may have taken that name."""
        try:
            pod = await self._api.get(PODS.path(namespace, name))
        except NotFound:
            return False
        return (pod["metadata"].get("labels") or {}).get(TASK_LABEL) == TASK_SNAPSHOT

    def _intent(self, pod: Mapping[str, Any], namespace: str) -> Intent | None:
        """None where none may be taken (any more)."""
        labels = self._view.namespaces.get(namespace)
        if labels is None:
            return None
        try:
            intent = read_intent(pod, namespace=namespace, namespace_labels=labels)
        except ConfigError:
            return None  # it was changed since it was admitted; whoever makes the next one is told
        return intent if intent is not None and intent.snapshots else None

    async def _tell(self, taking: Taking) -> None:
        """On the replica it was taken for, whether it is still there or not."""
        about = {"apiVersion": "v1", "kind": "Pod", "namespace": taking.namespace, "name": taking.for_pod}
        reason = _TAKEN if taking.worked else _NOT_TAKEN
        try:
            await self._events.say(about, reason, taking.news, is_warning=not (taking.worked or taking.made_room))
        except AdapterError as error:  # its namespace is ending, say: what one cannot be told must not hinder others
            fields = {"pod": f"{taking.namespace}/{taking.name}", "code": error.code, "why": error.why}
            logger.warning("nobody was told of a snapshot", extra={"fields": fields})

    async def _delete(self, taking: Taking) -> None:
        try:
            await self._api.delete(PODS.path(taking.namespace, taking.name))
        except NotFound:
            pass


def network_policy_path(namespace: str) -> str:
    return NETWORK_POLICIES.path(namespace, network_policy(namespace)["metadata"]["name"])


def _image(pod: Mapping[str, Any], intent: Intent) -> str:
    image: str = pod["spec"]["containers"][intent.container]["image"]
    return image
