"""What a container host does over any engine: the same tests for the fake one and for a real one.

A class that takes these tests over has three fixtures: `engine` (its socket's path), `images` (names of images:
``function``, whose handler is `HANDLER`, ``dies``, which ends with code 3 at once, ``foreign``, which is none of
ours), and `network` (where containers are joined to).
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from adapter.errors import ConfigError, Conflict, NotFound, Unavailable
from adapter.hosts import Deployment, ReplicaState
from adapter.hosts.container import ContainerHost
from adapter.hosts.engine import Engine
from adapter.records import EventName
from adapter.spec import parse_spec
from tests.fakes.host import Listener, ask

HANDLER = """
import os
from pathlib import Path

def load(device):
    print("loaded", flush=True)
    return device

def handle(event, context):
    if event.path == "/secret":
        return context.secret("token")
    return f"{event.body.decode()} {os.environ.get('GREETING')} {context.model} {context.hostname}"
"""
LIMIT_S = 90.0


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, LIMIT_S))


def function(image: str, *, secrets: tuple[str, ...] = (), snapshot: str = "off", **env: str) -> Deployment:
    spec = parse_spec({"snapshot": {"process": snapshot}}, {})
    return Deployment("fn", "openfaas-fn", "1", image, spec, tuple(env.items()), secrets)


@asynccontextmanager
async def opened(state, engine, network):
    host = await ContainerHost.open(state, Engine(str(engine)), network=network)
    try:
        yield host
    finally:
        await host.close()


class ContainerHostContract:
    def test_it_answers_parks_resumes_and_drains(self, tmp_path, engine, images, network):
        async def scenario():
            listener = Listener()
            async with opened(tmp_path / "s", engine, network) as host:
                wanted = function(images["function"], GREETING="hello")
                await host.prepare(wanted)
                replica = await host.start(wanted, listener)
                assert await ask(replica, b"one") == f"one hello cpu {replica.id}".encode()
                await listener.heard(EventName.STARTED)
                replica.park()
                await listener.heard(EventName.PARKED)
                assert replica.state is ReplicaState.PARKED
                assert (await ask(replica, b"two")).startswith(b"two hello")
                await replica.stop(20)
                stopped = await listener.heard(EventName.STOPPED)
                assert (stopped.fields["exit_code"], stopped.fields["reason"]) == (0, "drained")
                assert replica.state is ReplicaState.GONE
                assert listener.events[-1] is stopped
                assert not (tmp_path / "s" / "replicas" / replica.id).exists()
                lines = [json.loads(line) for line in host.log_path(wanted).read_text().splitlines()]
                assert "loaded" in [line["text"] for line in lines if line["instance"] == replica.id]

        run(scenario())

    def test_secrets_lie_where_handlers_look_and_go_with_their_replica(self, tmp_path, engine, images, network):
        async def scenario():
            listener = Listener()
            secret = tmp_path / "s" / "secrets" / "openfaas-fn" / "token"
            secret.parent.mkdir(parents=True)
            secret.write_text("seven")
            async with opened(tmp_path / "s", engine, network) as host:
                wanted = function(images["function"], secrets=("token",))
                await host.prepare(wanted)
                replica = await host.start(wanted, listener)
                assert await ask(replica, path="/secret") == b"seven"
                await replica.stop(20)
                assert not list((tmp_path / "s" / "replicas").rglob("token"))
                with pytest.raises(NotFound, match="'other'"):
                    await host.start(function(images["function"], secrets=("other",)), listener)

        run(scenario())

    def test_one_that_dies_at_once_is_stopped_and_says_so(self, tmp_path, engine, images, network):
        async def scenario():
            listener = Listener()
            async with opened(tmp_path / "s", engine, network) as host:
                wanted = function(images["dies"])
                await host.prepare(wanted)
                replica = await host.start(wanted, listener)
                stopped = await listener.heard(EventName.STOPPED)
                assert (stopped.fields["exit_code"], stopped.fields["reason"]) == (3, "ended with code 3")
                assert replica.state is ReplicaState.GONE

        run(scenario())

    def test_a_killed_one_is_stopped(self, tmp_path, engine, images, network):
        async def scenario():
            listener = Listener()
            async with opened(tmp_path / "s", engine, network) as host:
                wanted = function(images["function"])
                await host.prepare(wanted)
                replica = await host.start(wanted, listener)
                await listener.heard(EventName.SERVING)
                replica.kill()
                await listener.heard(EventName.STOPPED)
                assert await Engine(str(engine)).labelled(host._label) == []

        run(scenario())

    def test_what_is_no_image_of_ours_is_refused_by_name(self, tmp_path, engine, images, network):
        async def scenario():
            async with opened(tmp_path / "s", engine, network) as host:
                with pytest.raises(ConfigError, match="no function") as foreign:
                    await host.prepare(function(images["foreign"]))
                assert foreign.value.code == "image-foreign"
                with pytest.raises(NotFound, match="none:1") as missing:
                    await host.prepare(function("127.0.0.1:9/none:1"))
                assert missing.value.code == "image-unknown"
                assert missing.value.why
                assert missing.value.hint.startswith("Build it")
                with pytest.raises(NotFound, match="not prepared"):
                    await host.start(function("127.0.0.1:9/none:1"), Listener())

        run(scenario())

    def test_what_a_former_host_left_is_removed(self, tmp_path, engine, images, network):
        async def scenario():
            api = Engine(str(engine))
            async with opened(tmp_path / "s", engine, network) as host:
                wanted = function(images["function"])
                await host.prepare(wanted)
                mounts = [{"Type": "bind", "Source": str(tmp_path), "Target": "/run/gpufn", "ReadOnly": True}]
                await host._create("left", wanted, host._images[wanted.image], mounts, network=network)
                other = await ContainerHost.open(tmp_path / "other", api, network=network)
                await other.close()
                assert len(await api.labelled(host._label)) == 1
                with pytest.raises(Conflict, match="Another gpufn"):
                    await ContainerHost.open(tmp_path / "s", api, network=network)
            async with opened(tmp_path / "s", engine, network) as host:
                assert await api.labelled(host._label) == []

        run(scenario())

    def test_a_network_that_is_not_there_is_refused(self, tmp_path, engine, images):
        with pytest.raises(ConfigError, match="no network 'moon'"):
            run(ContainerHost.open(tmp_path / "s", Engine(str(engine)), network="moon"))

    def test_no_engine_is_said_in_three_lines(self, tmp_path):
        with pytest.raises(Unavailable) as error:
            run(ContainerHost.open(tmp_path / "s", Engine(str(tmp_path / "none"))))
        assert error.value.code == "no-engine"
        assert "DOCKER_HOST" in error.value.hint
        assert not (tmp_path / "s").exists()
