"""Which replicas of a node would start faster with a snapshot that is not there yet, as their entrypoints said."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from adapter.agent.cache import Cached
from adapter.agent.pods import Pod
from adapter.cluster.intent import Intent
from adapter.records import Event, EventName

_LISTED = 256


@dataclass(frozen=True, slots=True)
class _Asked:
    pod: Pod
    snapshot: str
    at_ns: int


@dataclass(slots=True)
class SnapshotsDue:
    """What is heard again (an agent that begins anew reads logs from their beginning) is the same."""

    _asked: dict[str, _Asked] = field(default_factory=dict)

    def heard(self, pod: Pod, intent: Intent, events: Iterable[Event]) -> None:
        for event in events:
            if event.name is EventName.SNAPSHOT and event.fields.get("state") == "due" and intent.snapshots:
                self._asked[pod.uid] = _Asked(pod, intent.need.snapshot, event.at_ns)

    def forget(self, there: Collection[str]) -> None:
        """All but pods with these UIDs."""
        self._asked = {uid: asked for uid, asked in self._asked.items() if uid in there}

    def listed(self, cached: Iterable[Cached]) -> list[dict[str, str]]:
        """As in `GpuNode`: of those functions of which no snapshot was made since."""
        made_at_ns: dict[str, int] = {}
        for one in cached:
            made_at_ns[one.name] = max(one.made_at_ns, made_at_ns.get(one.name, 0))
        due = [asked.pod for asked in self._asked.values() if made_at_ns.get(asked.snapshot, 0) < asked.at_ns]
        names = sorted({(pod.namespace, pod.name) for pod in due})
        return [{"namespace": namespace, "pod": name} for namespace, name in names[:_LISTED]]
