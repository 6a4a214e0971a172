"""Which snapshots are due on a node: what entrypoints said, until a snapshot was made since."""

from dataclasses import replace
from pathlib import Path

from adapter.agent.cache import Cached
from adapter.agent.due import SnapshotsDue
from adapter.agent.pods import Pod, intent_of
from adapter.records import Event, EventName

POD = Pod(
    uid="u1", name="embed-1", namespace="acme", ip="", created_at_ns=0, admitted_at_ns=0, scheduled_at_ns=0,
    deleted_at_ns=0, is_over=False, containers=(),
    body={
        "metadata": {"labels": {"gpufn.dev/function": "embed"}, "annotations": {"gpufn.dev/snapshot": "on"}},
        "spec": {"containers": [{"name": "fn"}]},
    },
)  # fmt: skip
INTENT = intent_of(POD, {"gpufn.dev/snapshots": "enabled"})
assert INTENT is not None
LISTED = [{"namespace": "acme", "pod": "embed-1"}]


def said(state, at_ns):
    return Event(EventName.SNAPSHOT, at_ns, {"state": state})


def made(at_ns, name="acme/embed.acme"):
    return Cached(Path("/x"), name, "process", "key", 1, at_ns, at_ns)


def test_what_an_entrypoint_asked_for_is_due_until_it_was_made():
    due = SnapshotsDue()
    due.heard(POD, INTENT, [Event(EventName.LISTENING, 1), said("due", 5)])
    assert due.listed([]) == LISTED
    assert due.listed([made(4), made(9, "acme/other.acme")]) == LISTED
    assert due.listed([made(6)]) == []


def test_heard_twice_it_is_due_once_and_gone_with_its_pod():
    due = SnapshotsDue()
    for _ in range(2):
        due.heard(POD, INTENT, [said("due", 5)])
    assert due.listed([]) == LISTED
    due.forget({"u2"})
    assert due.listed([]) == []


def test_other_news_and_a_namespace_that_keeps_none_mean_nothing():
    due = SnapshotsDue()
    due.heard(POD, INTENT, [said("failed", 5), said("published", 6)])
    due.heard(POD, replace(INTENT, snapshots=False), [said("due", 7)])
    assert due.listed([]) == []
