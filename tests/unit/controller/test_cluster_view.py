import asyncio
import json

from hypothesis import given, settings, strategies as st

from adapter.cluster.informer import Rhythm
from adapter.cluster.resources import GPU_NODES, NODES, PODS
from adapter.controller import cluster_view
from adapter.controller.cluster_view import ClusterView
from adapter.controller.reservations import TTL_S, Reservations
from tests.fakes.api_server import FakeApiServer, hang, watches
from tests.fakes.cluster_objects import GPU, function_pod, gpu_node, node
from tests.fakes.replicas import until

RHYTHM = Rhythm(first_pause_s=0.001, pause_limit_s=0.01)


def play(scene, *nodes):
    async def played():
        server, now = FakeApiServer(), [0.0]
        async with server.serving(), server.client() as api:
            for each in nodes or (node("n1"), node("n2")):
                await server.put(NODES.path(name=each["metadata"]["name"]), each)
            view = ClusterView(api, Reservations(clock=lambda: now[0]), RHYTHM)
            running = asyncio.ensure_future(view.run())
            await until(lambda: not view.why_not() and server.watching == len(view.informers))
            await asyncio.wait_for(scene(server, view, now), 30)
            running.cancel()

    asyncio.run(played())


def free(view, name="n1"):
    [offer] = next(each for each in view.inventory() if each.name == name).offers
    return offer.free


async def put(server, pod):
    await server.put(PODS.path(pod["metadata"]["namespace"], pod["metadata"]["name"]), pod)


def test_a_pod_holds_what_it_asked_for_until_it_has_ended():
    async def scene(server, view, now):
        await put(server, function_pod("a", gpus=3, node_name="n1"))
        await until(lambda: free(view) == 5)
        await put(server, function_pod("a", gpus=3, node_name="n1", phase="Failed"))
        await until(lambda: free(view) == 8)
        await put(server, function_pod("b", gpus=1, node_name="n1"))
        await until(lambda: free(view) == 7)
        await server.remove(PODS.path("team", "b"))
        await until(lambda: free(view) == 8)

    play(scene)


def test_a_gpu_on_which_a_snapshot_is_taken_is_free_for_functions():
    async def scene(server, view, now):
        await put(server, function_pod("taker", gpus=3, node_name="n1", **{"gpufn.dev/task": "snapshot"}))
        await put(server, function_pod("a", gpus=1, node_name="n1"))
        await until(lambda: free(view) == 7)

    play(scene)


def test_pods_that_come_before_their_node_count_when_it_is_there():
    async def scene(server, view, now):
        await put(server, function_pod("a", gpus=2, node_name="late"))
        await until(lambda: view.pods.get("team/a"))
        await server.put(NODES.path(name="late"), node("late"))
        await until(lambda: len(view.inventory()) == 3)
        assert free(view, "late") == 6
        await server.remove(NODES.path(name="late"))
        await until(lambda: len(view.inventory()) == 2)

    play(scene)


def test_what_is_promised_counts_as_used_until_the_pod_has_a_node():
    async def scene(server, view, now):
        view.promise("team/17", "n1", {GPU: 2})
        assert free(view) == 6
        await put(server, function_pod("a", gpus=2, annotations={"gpufn.dev/admitted-at": "17"}))
        await until(lambda: view.pods.get("team/a"))
        assert free(view) == 6
        await put(server, function_pod("a", gpus=2, annotations={"gpufn.dev/admitted-at": "17"}, node_name="n2"))
        await until(lambda: free(view, "n2") == 6)
        assert free(view) == 8

    play(scene)


def promised_to(name, node_name="", prefer="n1"):
    """A pod that another webhook has seen."""
    note = json.dumps({"prefer": [[prefer, 100.0, 1.0]]})
    annotations = {"gpufn.dev/admitted-at": "17", "gpufn.dev/placement": note}
    return function_pod(name, gpus=2, annotations=annotations, node_name=node_name)


def test_what_another_webhook_chose_counts_as_well_until_its_pod_has_a_node_or_is_gone():
    async def scene(server, view, now):
        await put(server, promised_to("a"))
        await until(lambda: free(view) == 6)
        await put(server, promised_to("a", node_name="n2"))
        await until(lambda: free(view, "n2") == 6)
        assert free(view) == 8
        await put(server, promised_to("b"))
        await until(lambda: free(view) == 6)
        await server.remove(PODS.path("team", "b"))
        await until(lambda: free(view) == 8)

    play(scene)


def test_its_own_promise_does_not_keep_a_pod_from_fitting_for_who_looks_at_waiting_pods():
    async def scene():
        async with FakeApiServer().client() as api:
            view = ClusterView(api, hears_promises=False)
            view.nodes._set("n1", node("n1"))
            view.pods._set("team/a", view.pods._project(promised_to("a")))
            assert free(view) == 8

    asyncio.run(scene())


def test_a_note_that_makes_no_sense_promises_nothing():
    async def scene(server, view, now):
        for number, note in enumerate(
            ("{", "[]", '{"prefer": []}', '{"prefer": [[]]}', '{"prefer": 7}', "[" * 100_000)
        ):
            annotations = {"gpufn.dev/admitted-at": f"{number}", "gpufn.dev/placement": note}
            await put(server, function_pod(f"p{number}", annotations=annotations))
        await until(lambda: view.pods.get("team/p5"))
        assert free(view) == 8

    play(scene)


def test_a_promise_whose_pod_never_came_is_over_after_its_time():
    async def scene(server, view, now):
        view.promise("team/17", "n1", {GPU: 2})
        assert free(view) == 6
        now[0] = TTL_S
        assert free(view) == 8

    play(scene)


def test_what_agents_say_is_on_their_nodes():
    async def scene(server, view, now):
        assert not view.restores
        await server.put(GPU_NODES.path(name="n1"), gpu_node("n1", ["team/fn.team"]))
        await until(lambda: view.restores)
        assert {each.name: dict(each.snapshots) for each in view.inventory()} == {
            "n1": {"team/fn.team": 10**9},
            "n2": {},
        }
        await server.put(GPU_NODES.path(name="n1"), gpu_node("n1", ["team/fn.team"], restores=False))
        await until(lambda: not view.restores)
        assert not any(each.snapshots for each in view.inventory())

    play(scene)


def test_it_knows_whether_there_are_pods_of_functions_with_a_budget():
    async def scene(server, view, now):
        await put(server, function_pod("a", annotations={"gpufn.dev/budget": "1h", "gpufn.dev/tenant": "acme"}))
        await until(lambda: view.has_budgets)
        budget = view.pods.get("team/a").budget
        assert (budget.function, budget.limit_gpu_s) == ("a.team", 3600.0)
        assert [each["kind"] for each in budget.about] == ["Pod"]
        await put(server, function_pod("a", annotations={"gpufn.dev/budget": "1h"}, node_name="n1"))
        await until(lambda: view.pods.get("team/a").node)
        assert view.has_budgets
        for text in ("0", "lots", ""):
            await put(server, function_pod("a", annotations={"gpufn.dev/budget": text}, node_name="n1"))
            await until(lambda: not view.has_budgets)
            await put(server, function_pod("a", annotations={"gpufn.dev/budget": "1h"}, node_name="n1"))
            await until(lambda: view.has_budgets)
        await server.remove(PODS.path("team", "a"))
        await until(lambda: not view.has_budgets)

    play(scene)


def test_amounts_are_shared_and_those_that_no_pod_has_any_more_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(cluster_view, "_SHARED", 3)
    read = cluster_view._PodReader()
    first, same = (read(function_pod(name, gpus=1, node_name="n1")) for name in "ab")
    assert first.amounts is same.amounts
    for gpus in range(2, 9):
        read(function_pod("c", gpus=gpus, node_name="n1"))
    assert len(read._shared) <= 3


def test_heartbeats_of_nodes_change_nothing():
    async def scene(server, view, now):
        before = view.inventory()
        value = node("n1")
        value["status"]["conditions"][0]["lastHeartbeatTime"] = "2026-11-25T12:00:00Z"
        await server.put(NODES.path(name="n1"), value)
        await server.put(NODES.path(name="n2"), node("n2", unschedulable=True))
        await until(lambda: view.inventory() is not before)
        after = {each.name: each for each in view.inventory()}
        assert {name: each.why_not for name, each in after.items()} == {"n1": "", "n2": "cordoned"}
        assert any(after["n1"] is each for each in before)

    play(scene)


def test_a_view_that_hears_nothing_of_one_kind_says_of_which():
    async def scene():
        server = FakeApiServer()
        async with server.serving(), server.client() as api:
            server.next(hang, lambda request: "gpunodes" in request.path and not watches(request))
            view = ClusterView(api, rhythm=RHYTHM)
            running = asyncio.ensure_future(view.run())
            await until(lambda: view.why_not() == "nothing is heard of gpunodes")
            running.cancel()

    asyncio.run(scene())


PLACES = st.sampled_from(["", "n1", "n2"])
CHANGES = st.lists(st.tuples(st.sampled_from("abc"), PLACES, st.integers(1, 4), st.booleans()), max_size=12)


@settings(max_examples=25)
@given(CHANGES)
def test_whatever_happens_to_pods_what_is_free_is_what_they_leave(changes):
    async def scene():
        server, view = FakeApiServer(), None
        async with server.client() as api:
            view = ClusterView(api, rhythm=RHYTHM)
            view.nodes._set("n1", node("n1"))
            view.nodes._set("n2", node("n2"))
            there = {}
            for name, place, gpus, is_removed in changes:
                facts = None if is_removed else view.pods._project(function_pod(name, gpus=gpus, node_name=place))
                view.pods._set(f"team/{name}", facts)
                there[name] = None if is_removed else (place, gpus)
            for on in ("n1", "n2"):
                held = sum(gpus for place, gpus in filter(None, there.values()) if place == on)
                assert next(each for each in view.inventory() if each.name == on).offers[0].used == held
            assert view._held.keys() == {place for place, _ in filter(None, there.values()) if place}

    asyncio.run(scene())


def test_pods_are_listed_few_at_a_time_because_they_may_be_large():
    async def scene(server, view, now):
        lists = [path for _, path in server.requests if path.startswith("/api/v1/pods?") and "watch" not in path]
        assert lists
        assert all("limit=50&" in f"{path}&" for path in lists)

    play(scene)


def test_of_a_pod_that_waits_only_what_is_looked_at_is_kept():
    async def scene(server, view, now):
        pod = function_pod("a", annotations={"gpufn.dev/models": "a100", "note": "x" * 1000})
        pod["spec"]["containers"][0]["env"] = [{"name": "V", "value": "x" * 1000}]
        await put(server, pod)
        await until(lambda: view.pods.get("team/a"))
        waiting = view.pods.get("team/a").waiting
        assert len(json.dumps(waiting)) < 1000
        assert waiting["metadata"]["annotations"]["gpufn.dev/models"] == "a100"

    play(scene)
