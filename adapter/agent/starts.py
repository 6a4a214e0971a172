"""What replicas say of themselves in their logs, as the phases of leases and as start records.

Pure: events and the pod they are of in, values out. Whose an event is says the pod, never the event.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from adapter.agent.pods import Container, Pod
from adapter.cluster.intent import Intent
from adapter.records import Event, EventName, LeasePhase, Phase, PhaseName, StartRecord

_PHASES = {
    EventName.LISTENING: LeasePhase.RESTORING,
    EventName.SERVING: LeasePhase.IDLE,
    EventName.MODEL_EXITED: LeasePhase.RESTORING,
    EventName.FAILED: LeasePhase.RESTORING,
}
"""A parked process keeps its GPU on Kubernetes, where nobody else is given it: parking changes nothing here."""


_LIMIT_BYTES = 8 * 1024
_TEXT_LIMIT = 500
_KUBERNETES_STEP_NS = 10**9
"""Its times are whole seconds."""


@dataclass(frozen=True, slots=True)
class PhaseChange:
    """`at_ns` is on the calendar of the node."""

    phase: LeasePhase
    at_ns: int


def phase_changes(events: Iterable[Event]) -> list[PhaseChange]:
    """In the order of the events."""
    return [PhaseChange(_PHASES[event.name], event.at_ns) for event in events if event.name in _PHASES]


def phase_of(container: Container) -> LeasePhase:
    """Of a replica that says nothing of itself: it is none of ours inside."""
    return LeasePhase.IDLE if container.ready else LeasePhase.RESTORING


def start_records(
    events: Iterable[Event], pod: Pod, intent: Intent, *, seen_at_ns: int, told_at_ns: int, is_first: bool
) -> list[tuple[int, StartRecord]]:
    """Of the events that are newer than `told_at_ns`, each with its event's time.

    `is_first`: nothing was told of this pod yet, and its container has not been restarted: its first start began when
    the pod was made. `seen_at_ns`: when the agent saw it on its node, 0 where it came later.
    """
    found: list[tuple[int, StartRecord]] = []
    for event in events:
        if event.at_ns <= told_at_ns or event.name not in (EventName.STARTED, EventName.FAILED):
            continue
        try:
            record = StartRecord.from_json(event.fields["record"])
            record = replace(
                _clipped(record),
                function=intent.function,
                namespace=intent.namespace,
                revision=intent.revision,
                replica=pod.replica,
            )
            if is_first and not found:
                record = from_the_pods_beginning(record, pod, seen_at_ns)
        except (KeyError, TypeError, ValueError, AttributeError):  # a function wrote it, or another version
            continue
        found.append((event.at_ns, record))
    return found


def is_short(record: StartRecord) -> bool:
    """Whether it may be kept: a function wrote it, and everybody's records share the spool."""
    return len(json.dumps(record.to_json())) <= _LIMIT_BYTES


def _clipped(record: StartRecord) -> StartRecord:
    """With what is for people no longer than people read."""
    skipped = tuple(replace(rung, reason=rung.reason[:_TEXT_LIMIT]) for rung in record.skipped)
    return replace(record, skipped=skipped, error=record.error[:_TEXT_LIMIT])


def from_the_pods_beginning(record: StartRecord, pod: Pod, seen_at_ns: int) -> StartRecord:
    """The same start from when the API server had the pod: `schedule` until a node was chosen, `pull` until the
    container's first instruction (its image, its sandbox and volumes with it)."""
    began_ns, first_ns = pod.began_at_ns, record.started_at_ns
    if not 0 < began_ns < first_ns:
        return record
    bound_ns = min(max(_bound_at_ns(pod, seen_at_ns), began_ns), first_ns)
    lead_ns = first_ns - began_ns
    moved = tuple(
        replace(phase, start_ns=phase.start_ns + lead_ns, end_ns=phase.end_ns + lead_ns) for phase in record.phases
    )
    before = (Phase(PhaseName.SCHEDULE, 0, bound_ns - began_ns), Phase(PhaseName.PULL, bound_ns - began_ns, lead_ns))
    return replace(record, started_at_ns=began_ns, total_ns=record.total_ns + lead_ns, phases=(*before, *moved))


def _bound_at_ns(pod: Pod, seen_at_ns: int) -> int:
    """When it got its node: in the second in which the API server has that, and there when the agent saw it."""
    if not pod.scheduled_at_ns:
        return seen_at_ns
    return min(max(seen_at_ns, pod.scheduled_at_ns), pod.scheduled_at_ns + _KUBERNETES_STEP_NS)
