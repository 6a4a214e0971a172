import asyncio

import pytest

from adapter.controller.budget_events import NEAR_REASON, SPENT_REASON, BudgetEvents
from adapter.ledger.held import LOOK_S, HeldToday
from adapter.policy.budget import utc_day
from tests.fakes.cluster_objects import View, function_pod

NOON = utc_day(1_800_000_000 * 10**9)[0] + 12 * 3600 * 10**9
OWNER = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "fn-7c", "uid": "u-7", "controller": True}


class Events:
    def __init__(self):
        self.said = []

    async def say(self, about, reason, message):
        self.said.append((about["kind"], about["name"], reason, message))


def said(held_gpu_s, pod, later_s=0):
    """What is said of a pod whose function held so much, now and a moment later."""

    async def scene():
        async def ask(start_ns, end_ns):
            return {"fn.team": held_gpu_s}

        view, events, changed = View(), Events(), []
        now_ns = [NOON]
        held = HeldToday(ask, clock_ns=lambda: now_ns[0])
        reconciler = BudgetEvents(view, held, events, clock_ns=lambda: now_ns[0])
        reconciler.start(changed.append)
        view.pods._set("team/fn", view.pods._project(pod))
        assert list(reconciler.all_keys()) == changed
        again = [await reconciler.reconcile(key) for key in changed]
        now_ns[0] += int(later_s * 1e9)
        again += [await reconciler.reconcile(key) for key in changed]
        assert set(again) <= {LOOK_S}
        return events.said

    return asyncio.run(scene())


def budgeted(node_name="n1", **labels):
    pod = function_pod(annotations={"gpufn.dev/budget": "1000"}, node_name=node_name, **labels)
    pod["metadata"]["ownerReferences"] = [OWNER]
    return pod


@pytest.mark.parametrize(("held", "reason"), [(800.0, NEAR_REASON), (1000.0, SPENT_REASON)])
def test_the_pods_owner_is_told_in_the_same_words_all_day(held, reason):
    first, again = said(held, budgeted(), later_s=3600)
    assert first == again
    assert first[:3] == ("ReplicaSet", "fn-7c", reason)
    for part in ("fn.team", "1,000.0", "(UTC)", "00:00 UTC", "gpufn.dev/budget"):
        assert part in first[3]


def test_its_knative_service_is_told_too():
    labels = {"serving.knative.dev/service": "fn", "serving.knative.dev/serviceUID": "u-1"}
    assert {(kind, name) for kind, name, *_ in said(1000.0, budgeted(**labels))} == {
        ("ReplicaSet", "fn-7c"),
        ("Service", "fn"),
    }


def test_below_four_fifths_and_on_the_next_day_nothing_is_said():
    assert said(799.9, budgeted()) == []
    assert len(said(1000.0, budgeted(), later_s=13 * 3600)) == 1


def test_a_function_without_a_budget_is_not_looked_at():
    assert said(1e9, function_pod(node_name="n1")) == []
