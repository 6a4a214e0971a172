"""What the Kubernetes host does over any cluster: the same tests for the one in this process and for a real one.

A class that takes these tests over has a fixture `kube` with `running()` (a context, for as long as it is used),
`client()` (a context that gives an `Api`), `namespace` (of functions, in which it may do everything), and `images`: ``function``, whose handler is `HANDLER`, ``dies``, whose
`load` ends the process again and again, and ``missing``, which nobody has.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from adapter.cluster.resources import CONFIG_MAPS, PODS, SECRETS, SERVICES
from adapter.errors import AdapterError, ConfigError, NotFound
from adapter.hosts import Deployment, ReplicaState, Terms
from adapter.hosts.kubernetes import Facts, KubernetesHost
from adapter.hosts.kubernetes_pods import MANAGED_BY, record_name
from adapter.openfaas.cluster_records import record_of
from adapter.openfaas.cluster_secrets import ClusterSecrets
from adapter.openfaas.wire import FunctionDeployment
from adapter.records import EventName
from adapter.spec import parse_spec
from tests.contract.hosts.containers import HANDLER
from tests.fakes.host import Listener, ask
from tests.fakes.replicas import until

LIMIT_S = 120.0
DIES = "import os\ndef load(device):\n    os._exit(3)\ndef handle(event, context):\n    return ''\n"
HANDLERS = {"function": HANDLER, "dies": DIES}


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, LIMIT_S))


async def eventually(holds, limit_s: float = LIMIT_S) -> None:
    """What a cluster comes to: `holds` is awaited again and again, because nobody tells."""

    async def wait():
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    await asyncio.wait_for(wait(), limit_s)


class Place:
    """A host, and one function's record beside it."""

    def __init__(self, cluster, api) -> None:
        self.api = api
        self.namespace = cluster.namespace
        self.images = cluster.images
        self.name = f"fn-{secrets.token_hex(3)}"
        self.uid = ""
        self.host = self.new_host()

    def new_host(self) -> KubernetesHost:
        facts = Facts(lambda _: self.uid, lambda _: False, ClusterSecrets(self.api).for_pulling)
        host = KubernetesHost(self.api, facts)
        host.add_namespace(self.namespace)
        return host

    def function(self, image: str = "function", *, names: tuple[str, ...] = (), **env: str) -> Deployment:
        spec = parse_spec({"snapshot": {"process": "off"}, "limits": {"start_timeout": 60}}, {})
        terms = Terms(holds_requests=True)
        return Deployment(self.name, self.namespace, "1", self.images[image], spec, tuple(env.items()), names, terms)

    async def record(self) -> None:
        body = record_of(FunctionDeployment(self.name, "fn:1", self.namespace), 1, None)
        made = await self.api.create(CONFIG_MAPS.path(self.namespace), body)
        self.uid = made["metadata"]["uid"]

    async def remove_record(self) -> None:
        await self.api.delete(CONFIG_MAPS.path(self.namespace, record_name(self.name)))

    async def pods(self) -> list[str]:
        found = await self.api.list(PODS.path(self.namespace), lambda pod: pod["metadata"])
        return [one["name"] for one in found.items if one["labels"].get("faas_function") == self.name]

    async def none_is_left(self) -> None:
        async def is_none():
            return not await self.pods()

        await eventually(is_none)


@asynccontextmanager
async def opened(cluster):
    async with cluster.running(), cluster.client() as api:
        place = Place(cluster, api)
        await place.host.synced()
        await place.record()
        try:
            yield place
        finally:
            await place.remove_record()
            await place.none_is_left()
            await place.host.close()


class Keeper:
    """Takes back what `deployments` has, by revision."""

    def __init__(self, *deployments: Deployment) -> None:
        self.deployments = {one.revision: one for one in deployments}
        self.taken = []
        self.listener = Listener()

    def deployment_of(self, key, revision):
        return self.deployments.get(revision) if any(key == one.key for one in self.deployments.values()) else None

    def take(self, replica):
        self.taken.append(replica)
        return self.listener


class KubernetesHostContract:
    def test_it_answers_at_once_and_drains(self, kube):
        async def scenario():
            async with opened(kube) as place:
                listener, wanted = Listener(), place.function(GREETING="hello")
                await place.host.check(wanted)
                await place.host.prepare(wanted)
                replica = await place.host.start(wanted, listener)
                assert await ask(replica, b"one") == f"one hello cpu {replica.id}".encode()  # held while it loads
                started = await listener.heard(EventName.STARTED)
                assert started.fields["record"]["replica"] == replica.id
                assert replica.state is ReplicaState.SERVING
                await replica.stop(20)
                stopped = await listener.heard(EventName.STOPPED)
                assert (stopped.fields["exit_code"], stopped.fields["reason"]) == (0, "drained")
                assert replica.state is ReplicaState.GONE
                assert listener.events[-1] is stopped
                assert await place.pods() == []

        run(scenario())

    def test_secrets_lie_where_handlers_look(self, kube):
        async def scenario():
            async with opened(kube) as place:
                name = f"{place.name}-token"
                data = {"token": base64.b64encode(b"seven").decode()}
                metadata = {"labels": {MANAGED_BY: "openfaas"}}
                body = SECRETS.body(name, place.namespace, metadata=metadata, data=data)
                await place.api.create(SECRETS.path(place.namespace), body)
                wanted = place.function(names=(name,))
                await place.host.prepare(wanted)
                replica = await place.host.start(wanted, Listener())
                assert await ask(replica, path="/secret") == b"seven"
                await replica.stop(20)
                await place.api.delete(SECRETS.path(place.namespace, name))

        run(scenario())

    def test_one_that_cannot_load_says_why_and_its_entrypoint_stays_for_the_next_request(self, kube):
        async def scenario():
            async with opened(kube) as place:
                listener, wanted = Listener(), place.function("dies")
                await place.host.prepare(wanted)
                replica = await place.host.start(wanted, listener)
                failed = await listener.heard(EventName.FAILED)
                assert failed.fields["code"] == "handler-exited"
                await replica.stop(20)
                await listener.heard(EventName.STOPPED)

        run(scenario())

    def test_one_that_others_delete_is_left_alone_and_then_stopped(self, kube):
        async def scenario():
            async with opened(kube) as place:
                listener, wanted = Listener(), place.function()
                await place.host.prepare(wanted)
                replica = await place.host.start(wanted, listener)
                await listener.heard(EventName.SERVING)
                await place.api.delete(PODS.path(place.namespace, replica.id))
                await listener.heard(EventName.LEAVING)
                await listener.heard(EventName.STOPPED)
                assert replica.state is ReplicaState.GONE

        run(scenario())

    def test_an_image_that_nobody_has_is_told_by_its_name(self, kube):
        async def scenario():
            async with opened(kube) as place:
                wanted = place.function("missing")
                await place.host.prepare(wanted)
                with pytest.raises(AdapterError, match="cannot be started") as error:
                    await place.host.start(wanted, Listener())
                assert error.value.code == "image-pull-failed"
                assert "missing" in error.value.why
                await place.none_is_left()

        run(scenario())

    def test_what_the_api_server_would_refuse_is_refused_before(self, kube):
        async def scenario():
            async with opened(kube) as place:
                wanted = place.function()
                for terms in (
                    Terms(limits=(("memory", "much"),)),
                    Terms(labels=(("team", "no spaces"),)),
                    Terms(constraints=("gpu",)),
                    Terms(annotations=(("a b", "c"),)),
                ):
                    with pytest.raises(ConfigError):
                        await place.host.check(replace(wanted, terms=terms))

        run(scenario())

    def test_a_function_without_a_record_is_not_started(self, kube):
        async def scenario():
            async with opened(kube) as place:
                uid, place.uid = place.uid, ""
                with pytest.raises(NotFound):
                    await place.host.start(place.function(), Listener())
                place.uid = uid

        run(scenario())

    def test_removing_a_record_removes_its_pods_and_its_service(self, kube):
        async def scenario():
            async with opened(kube) as place:
                listener, wanted = Listener(), place.function()
                await place.host.prepare(wanted)
                await place.host.start(wanted, listener)
                await place.remove_record()
                await listener.heard(EventName.STOPPED)
                await place.none_is_left()

                async def service_goes():
                    while True:
                        await place.api.get(SERVICES.path(place.namespace, place.name))
                        await asyncio.sleep(0.1)

                with pytest.raises(NotFound):
                    await service_goes()

        run(scenario())

    def test_the_next_host_takes_back_what_runs_of_this_revision_and_of_others(self, kube):
        async def scenario():
            async with opened(kube) as place:
                listener, wanted = Listener(), place.function(GREETING="hi")
                await place.host.prepare(wanted)
                first = await place.host.start(wanted, listener)
                second = await place.host.start(replace(wanted, revision="2"), listener)
                await listener.heard(EventName.STARTED, 2)
                await place.host.close()
                assert len(await place.pods()) == 2

                place.host = place.new_host()
                await place.host.synced()
                keeper = Keeper(wanted, replace(wanted, revision="2"))
                place.host.adopt(keeper)
                await until(lambda: len(keeper.taken) == 2)
                assert {r.id: r.deployment.revision for r in keeper.taken} == {first.id: "1", second.id: "2"}
                await until(lambda: all(r.state is ReplicaState.SERVING for r in keeper.taken))
                back = next(r for r in keeper.taken if r.id == first.id)
                assert await ask(back, b"again") == f"again hi cpu {first.id}".encode()
                for replica in keeper.taken:
                    await replica.stop(20)
                assert keeper.listener.names.count(EventName.STOPPED) == 2

        run(scenario())

    def test_one_whose_start_was_cut_off_is_taken_back_once_it_is_up(self, kube):
        async def scenario():
            async with opened(kube) as place:
                wanted = place.function()
                await place.host.prepare(wanted)
                starting = asyncio.ensure_future(place.host.start(wanted, Listener()))
                await eventually(place.pods)
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                await place.host.close()

                place.host = place.new_host()
                await place.host.synced()
                keeper = Keeper(wanted)
                place.host.adopt(keeper)
                await until(lambda: keeper.taken, LIMIT_S)
                assert len(await place.pods()) == 1

        run(scenario())
