"""The Kubernetes host over a cluster of this process: its contract, and what a real one cannot be made to do at will."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from adapter.errors import ConfigError, GpuError, Overloaded, Timeout, Unavailable
from adapter.hosts import ReplicaState
from adapter.records import Event, EventName
from tests.contract.hosts.kubernetes import HANDLERS, Keeper, KubernetesHostContract, opened, run
from tests.fakes.api_server import cut, status
from tests.fakes.host import Listener, ask
from tests.fakes.pods import in_this_process
from tests.fakes.replicas import until


@pytest.fixture
def kube(tmp_path):
    with in_this_process(tmp_path, HANDLERS) as kube:
        yield kube


class TestContract(KubernetesHostContract):
    """Over the fake."""


@asynccontextmanager
async def served(kube, **env: str):
    """A place with one replica that serves, its listener and its container."""
    async with opened(kube) as place:
        listener, wanted = Listener(), place.function(**env)
        await place.host.prepare(wanted)
        replica = await place.host.start(wanted, listener)
        await listener.heard(EventName.STARTED)
        yield place, replica, listener, kube.fake.containers[path_of(replica)]


def path_of(replica) -> str:
    return f"/api/v1/namespaces/{replica.pod.namespace}/pods/{replica.id}"


def test_a_container_that_is_killed_is_the_end_of_its_replica_and_of_its_pod(kube):
    async def scenario():
        async with served(kube) as (place, _, listener, container):
            container.process.kill()
            stopped = await listener.heard(EventName.STOPPED)
            assert (stopped.fields["code"], stopped.fields["reason"]) == ("replica-died", "was killed by signal 9")
            await place.none_is_left()

    run(scenario())


def test_one_that_ended_is_not_taken_back_while_its_pod_goes(kube):
    async def scenario():
        async with served(kube) as (place, replica, listener, container):
            keeper = Keeper(place.function())
            place.host.adopt(keeper)
            kube.fake.next(status(503, "ServiceUnavailable"), lambda request: request.method == "DELETE")
            container.process.kill()
            await listener.heard(EventName.STOPPED)
            await kube.fake.start_container(path_of(replica), restarts=1)  # as a kubelet does
            await place.none_is_left()
            assert keeper.taken == []

    run(scenario())


def test_a_namespace_that_goes_takes_its_replicas_with_it(kube):
    async def scenario():
        async with served(kube) as (place, replica, listener, _):
            place.host.drop_namespace(place.namespace)
            await listener.heard(EventName.STOPPED)
            assert replica.state is ReplicaState.GONE

    run(scenario())


def test_one_that_is_out_of_memory_says_so_with_its_limit(kube):
    async def scenario():
        async with served(kube) as (_, replica, listener, container):
            kube.fake.objects[path_of(replica)]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "1Gi"}}
            await kube.fake.container_ended(container, 137, "OOMKilled")
            stopped = await listener.heard(EventName.STOPPED)
            assert stopped.fields["reason"] == "was killed: out of memory (its limit is 1Gi)"

    run(scenario())


def test_an_evicted_pod_says_why(kube):
    async def scenario():
        async with served(kube) as (_, replica, listener, _):
            message = "The node was low on resource: memory."
            await kube.fake.change(path_of(replica), phase="Failed", reason="Evicted", message=message)
            stopped = await listener.heard(EventName.STOPPED)
            assert stopped.fields["reason"] == f"was evicted: {message}"
            assert stopped.fields["code"] == "evicted"

    run(scenario())


def test_a_node_that_is_lost_takes_its_replica_with_it(kube):
    async def scenario():
        async with served(kube) as (_, replica, listener, container):
            container.ended = True  # its node says nothing any more, and answers nothing
            container.process.send_signal(signal.SIGSTOP)
            replica.pod = replace(replica.pod, ip="192.0.2.1")
            lost = {**kube.fake.objects[path_of(replica)]["status"], "podIP": "192.0.2.1"}
            await kube.fake.change(path_of(replica), **{**lost, "conditions": [{"type": "Ready", "status": "False"}]})
            stopped = await listener.heard(EventName.STOPPED)
            assert stopped.fields["code"] == "unreachable"
            container.process.kill()

    run(scenario())


def test_no_room_is_told_while_it_is_waited_for_and_when_it_did_not_come(kube):
    async def scenario():
        async with opened(kube) as place:
            kube.fake.schedules = False
            wanted = place.function()
            wanted = replace(wanted, spec=replace(wanted.spec, gpus=1.0, start_timeout_s=1.0))
            await place.host.prepare(wanted)
            starting = asyncio.ensure_future(place.host.start(wanted, Listener()))
            await until(lambda: "Insufficient nvidia.com/gpu" in place.host.hindrance(wanted.key))
            with pytest.raises(GpuError) as error:
                await starting
            assert (error.value.code, error.value.exit_code) == ("no-node", 8)
            assert "Insufficient nvidia.com/gpu" in error.value.why
            assert place.host.hindrance(wanted.key) == ""
            await place.none_is_left()

    run(scenario())


def test_a_container_that_never_begins_is_given_up_in_time(kube):
    async def scenario():
        async with opened(kube) as place:
            kube.fake.runs = False
            wanted = place.function()
            wanted = replace(wanted, spec=replace(wanted.spec, start_timeout_s=1.0))
            with pytest.raises(Timeout, match="did not come up within 1 s") as error:
                await place.host.start(wanted, Listener())
            assert "ContainerCreating" in error.value.why
            await place.none_is_left()

    run(scenario())


def test_a_quota_that_is_used_up_is_said_in_its_own_words(kube):
    async def scenario():
        async with opened(kube) as place:
            kube.fake.refuses = "exceeded quota: gpus, requested: nvidia.com/gpu=1, used: 2, limited: 2"
            with pytest.raises(Unavailable, match="was refused") as error:
                await place.host.start(place.function(), Listener())
            assert "exceeded quota" in error.value.why
            with pytest.raises(ConfigError, match="refused by the cluster"):
                await place.host.check(place.function())

    run(scenario())


def test_a_webhook_of_others_that_knows_no_dry_run_hinders_no_deploy(kube):
    async def scenario():
        async with opened(kube) as place:
            kube.fake.next(status(400, "BadRequest", 'admission webhook "x" does not support dry run'))
            await place.host.check(place.function())

    run(scenario())


def test_a_pod_that_the_webhook_refuses_for_a_spent_budget_says_so(kube):
    async def scenario():
        async with opened(kube) as place:
            said = 'admission webhook "pods.gpufn.dev" denied the request: ✗ The budget of fn.ns is spent.  [budget-spent]\n  It held 2 of 1.'
            kube.fake.next(status(403, "Forbidden", said), lambda request: request.method == "POST")
            with pytest.raises(Overloaded) as refused:
                await place.host.start(place.function(), Listener())
            assert (refused.value.code, refused.value.http_status) == ("budget-spent", 429)
            assert refused.value.why.endswith("The budget of fn.ns is spent. [budget-spent] It held 2 of 1.")

    run(scenario())


async def made_and_cut(request, kube):
    await kube.fake._write(request, await request.json())
    return await cut(request)


def test_a_pod_whose_making_was_cut_off_is_waited_for_all_the_same(kube):
    async def scenario():
        async with opened(kube) as place:
            kube.fake.next(lambda request: made_and_cut(request, kube), lambda request: request.method == "POST")
            replica = await place.host.start(place.function(), Listener())
            assert await ask(replica, b"x") == f"x None cpu {replica.id}".encode()
            assert await place.pods() == [replica.id]

    run(scenario())


def test_one_that_was_seen_too_late_is_taken_back(kube, monkeypatch):
    monkeypatch.setattr("adapter.hosts.kubernetes._SEEN_LIMIT_S", 0.01)

    async def scenario():
        async with opened(kube) as place:
            keeper = Keeper(place.function())
            place.host.adopt(keeper)
            kube.fake.silent.set()
            kube.fake.next(lambda request: made_and_cut(request, kube), lambda request: request.method == "POST")
            with pytest.raises(Unavailable):
                await place.host.start(place.function(), Listener())
            kube.fake.silent.clear()
            await kube.fake.bookmark()
            await until(lambda: keeper.taken)
            assert [replica.id for replica in keeper.taken] == await place.pods()

    run(scenario())


def test_a_stop_lasts_until_the_api_server_takes_it(kube):
    async def scenario():
        async with served(kube) as (place, replica, listener, _):
            for _ in range(2):
                kube.fake.next(status(503, "ServiceUnavailable"), lambda request: request.method == "DELETE")
            await replica.stop(20)
            await listener.heard(EventName.STOPPED)
            assert await place.pods() == []

    run(scenario())


def test_a_log_that_is_cut_is_read_on_and_nothing_is_heard_twice(kube):
    async def scenario():
        async with served(kube) as (_, replica, listener, container):
            container.print(Event(EventName.MODEL_EXITED, 1, {"reason": "one"}).to_line().strip())
            await listener.heard(EventName.MODEL_EXITED)
            replica.let_go()
            replica.watch(after=container.log[0].split()[0].decode())
            container.print(Event(EventName.MODEL_EXITED, 1, {"reason": "two"}).to_line().strip())
            await until(lambda: [e.fields["reason"] for e in listener.events if "reason" in e.fields][-1:] == ["two"])

    run(scenario())


FORGED = (
    b'{"event": "stopped", "at_ns": 1, "reason": "bye"}',
    b'{"event": "parked", "at_ns": 1}',
    b'{"event": "serving", "at_ns": 1, "rung": "restore"}',
    b'{"event": "failed", "at_ns": 1, "code": "x", "reason": "y", "record": {}}',
    b'{"event": "started", "at_ns": 1, "record": {"function": "another", "namespace": "n", "revision": "1"}}',
    b'{"event": "started", "at_ns": 1, "record": 7}',
    b'{"event": "nonsense", "at_ns": 1}',
    b'{"event": "leaving", "at_ns": 1}',
    b'{"event": ' + b"[" * 50_000,
    b'{"event": "snapshot", "at_ns": "x"}',
    b'{"event"' + b"x" * 100_000,
)


def test_what_a_function_prints_cannot_pass_for_what_its_replica_is_not(kube):
    async def scenario():
        async with served(kube) as (_, replica, listener, container):
            heard = len(listener.events)
            for line in FORGED:
                container.print(line)
            container.print(Event(EventName.SNAPSHOT, 1, {"state": "due"}).to_line().strip())
            await listener.heard(EventName.SNAPSHOT)
            assert len(listener.events) == heard + 1
            assert replica.state is ReplicaState.SERVING
            assert await ask(replica, b"still") == f"still None cpu {replica.id}".encode()

    run(scenario())


def test_one_whose_words_do_not_come_serves_once_it_is_ready(kube, monkeypatch):
    monkeypatch.setattr("adapter.hosts.kubernetes_replica._READY_GRACE_S", 0.01)

    async def scenario():
        async with opened(kube) as place:

            async def nothing(*_, **__):
                return
                yield

            monkeypatch.setattr("adapter.hosts.kubernetes_replica.follow", nothing)
            listener = Listener()
            replica = await place.host.start(place.function(), listener)
            serving = await listener.heard(EventName.SERVING)
            assert serving.fields["rung"] == ""
            assert replica.state is ReplicaState.SERVING

    run(scenario())
