"""The container host over the fake engine: the contract, and what only a fake engine does at will."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from adapter.errors import ConfigError, NotFound, SnapshotError, Unavailable
from adapter.hosts.container import CONFIG_LABEL, CONTRACT_LABEL, ContainerHost, _give_to
from adapter.hosts.engine import Engine, socket_path
from adapter.hosts.seccomp import profile
from adapter.keys import CONTRACT_VERSION
from adapter.records import Event, EventName
from tests.contract.hosts.containers import HANDLER, ContainerHostContract, function, opened, run
from tests.fakes.engine import FakeImage, fake_engine
from tests.fakes.host import Listener, write_function

OURS = {CONTRACT_LABEL: str(CONTRACT_VERSION)}


@pytest.fixture
def fake(tmp_path):
    with fake_engine(tmp_path / "engine.sock") as engine:
        folder = write_function(tmp_path / "functions", "fn", HANDLER)
        engine.images = {
            "test/fn:1": FakeImage(folder, labels=OURS),
            "test/dies:1": FakeImage(command=(sys.executable, "-c", "raise SystemExit(3)"), labels=OURS),
            "test/foreign:1": FakeImage(folder),
        }
        yield engine


@pytest.fixture
def engine(fake):
    return fake.path


@pytest.fixture
def images(fake):
    return {"function": "test/fn:1", "dies": "test/dies:1", "foreign": "test/foreign:1"}


@pytest.fixture
def network():
    return "none"


@pytest.fixture(autouse=True)
def places_where_the_fake_has_them(monkeypatch):
    """Its containers see this machine's files: no store of snapshots, and secrets in the replica's own folder."""
    orders = ContainerHost._orders

    def changed(self, deployment, image, identity, devices=()):
        home = self._state / "replicas" / identity
        own = {"GPUFN_SNAPSHOT_DIR": "", "GPUFN_SECRETS_DIR": str(home / "secrets")}
        return {**orders(self, deployment, image, identity, devices), **own}

    monkeypatch.setattr(ContainerHost, "_orders", changed)


class TestOnTheFakeEngine(ContainerHostContract):
    pass


def started(tmp_path, fake, listener, **options):
    """A configuration that the engine was asked for."""

    async def scenario():
        async with opened(tmp_path / "s", fake.path, "") as host:
            wanted = function("test/dies:1", TOKEN="visible")
            await host.prepare(wanted)
            await host.start(wanted, listener, **options)
            await listener.heard(EventName.STOPPED)

    run(scenario())
    return fake.created[-1]


def test_a_container_has_one_right_and_a_profile_and_no_variable_of_its_function(tmp_path, fake):
    config = started(tmp_path, fake, Listener())
    host = config["HostConfig"]
    assert (host["CapDrop"], host["CapAdd"]) == (["ALL"], ["CHECKPOINT_RESTORE"])
    profile = next(text.removeprefix("seccomp=") for text in host["SecurityOpt"] if text.startswith("seccomp="))
    assert json.loads(profile)["defaultAction"] == "SCMP_ACT_ERRNO"
    assert "no-new-privileges" in host["SecurityOpt"]
    assert host["NetworkMode"] == "bridge"
    assert "visible" not in json.dumps(config)
    targets = {mount["Target"] for mount in host["Mounts"]}
    assert targets == {"/run/gpufn", "/var/lib/gpufn/snapshots/default/fn.openfaas-fn"}


def test_an_image_of_an_ordinary_user_keeps_the_right_of_its_criu(tmp_path, fake):
    fake.images["test/dies:1"].user = "1000:1000"
    assert "no-new-privileges" not in started(tmp_path, fake, Listener())["HostConfig"]["SecurityOpt"]


def test_gpus_are_asked_for_by_uuid(tmp_path, fake):
    config = started(tmp_path, fake, Listener(), devices=("GPU-1", "GPU-2"))
    asked = {"Driver": "nvidia", "DeviceIDs": ["GPU-1", "GPU-2"], "Capabilities": [["gpu"]]}
    assert config["HostConfig"]["DeviceRequests"] == [asked]


@pytest.mark.parametrize(("devices", "states"), [((), ["building"]), (("GPU-1",), [])])
def test_beside_a_replica_that_holds_a_gpu_no_snapshot_is_taken(tmp_path, fake, devices, states):
    async def scenario():
        listener = Listener()
        async with opened(tmp_path / "s", fake.path, "none") as host:
            wanted = function("test/fn:1")
            await host.prepare(wanted)
            replica = await host.start(wanted, listener, devices=devices)
            replica.hear(Event(EventName.SNAPSHOT, 1, {"state": "due"}).to_line())
            for _ in range(5):  # what is begun says so at once
                await asyncio.sleep(0)
            assert [event.fields["state"] for event in snapshots(listener)] == states

    def snapshots(listener):
        return [event for event in listener.events if event.name is EventName.SNAPSHOT]

    run(scenario())


def test_an_engine_that_does_not_know_the_right_runs_it_without(tmp_path, fake):
    fake.capabilities = ()
    config = started(tmp_path, fake, Listener())
    assert config["HostConfig"]["CapAdd"] == []

    async def scenario():
        async with opened(tmp_path / "s", fake.path, "none") as host:
            wanted = function("test/fn:1")
            await host.prepare(wanted)
            with pytest.raises(SnapshotError, match="No snapshot can be taken") as error:
                await host.take_snapshot(wanted)
            assert error.value.code == "no-rights"
        assert fake.containers == {}

    run(scenario())


def test_an_image_that_is_not_here_is_fetched(tmp_path, fake):
    fake.pullable["registry:5000/fn:latest"] = FakeImage(labels={**OURS, CONFIG_LABEL: '{"scale": {"max": 3}}'})

    async def scenario():
        async with opened(tmp_path / "s", fake.path, "none") as host:
            await host.look("registry:5000/fn")
            assert host.config("registry:5000/fn")[0] == {"scale": {"max": 3}}

    fake.images["registry:5000/fn"] = fake.pullable["registry:5000/fn:latest"]
    run(scenario())


def test_when_the_host_s_line_ends_the_container_drains(tmp_path, fake):
    """What happens when the host is killed: the kernel closes its end."""

    async def scenario():
        listener = Listener()
        async with opened(tmp_path / "s", fake.path, "none") as host:
            wanted = function("test/fn:1")
            await host.prepare(wanted)
            replica = await host.start(wanted, listener)
            await listener.heard(EventName.SERVING)
            replica._line._connection.shutdown(2)
            stopped = await listener.heard(EventName.STOPPED)
            assert stopped.fields["reason"] == "drained"

    run(scenario())


def test_an_engine_that_talks_nonsense_is_no_engine(tmp_path):
    async def scenario():
        async def nonsense(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<ht>")
            writer.close()

        server = await asyncio.start_unix_server(nonsense, str(tmp_path / "e"))
        async with server:
            await Engine(str(tmp_path / "e")).version()

    with pytest.raises(Unavailable, match="something else than JSON"):
        run(scenario())


def test_orders_leave_to_the_image_what_only_it_knows(tmp_path, fake):
    async def scenario():
        async with opened(tmp_path / "s", fake.path, "none") as host:
            wanted = function("test/fn:1", GREETING="hello")
            await host.prepare(wanted)
            orders = host._orders(wanted, host._image_of(wanted), "fn-1")
            assert orders["GREETING"] == "hello"
            assert orders["GPUFN_SNAPSHOT_BY"] == "host"
            assert (
                not {"GPUFN_FOLDER", "GPUFN_PYTHON", "GPUFN_WEIGHTS", "GPUFN_LISTEN_FD", "PATH", "HOME"} & orders.keys()
            )

    run(scenario())


def test_podman_is_given_a_file_with_the_profile_and_gpus_by_their_cdi_names(tmp_path, fake):
    fake.name = "Podman Engine"
    host = started(tmp_path, fake, Listener(), devices=("GPU-1",))["HostConfig"]
    path = next(text.removeprefix("seccomp=") for text in host["SecurityOpt"] if text.startswith("seccomp="))
    assert json.loads(Path(path).read_text()) == profile()
    assert [device["PathOnHost"] for device in host["Devices"]] == ["nvidia.com/gpu=GPU-1"]


def test_what_an_engine_repeats_at_length_is_cut(tmp_path, fake):
    with pytest.raises(NotFound) as error:
        run(Engine(str(fake.path)).start("x" * 5000))
    assert len(error.value.why) < 700


@pytest.mark.parametrize(("address", "path"), [("unix:///run/x.sock", "/run/x.sock"), ("/run/x.sock", "/run/x.sock")])
def test_the_socket_is_the_one_of_docker_host(address, path):
    assert socket_path({"DOCKER_HOST": address}) == path


def test_an_engine_on_another_machine_is_refused():
    with pytest.raises(ConfigError, match="DOCKER_HOST=tcp"):
        socket_path({"DOCKER_HOST": "tcp://10.0.0.1:2375"})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_is_given_to_an_images_user_ends_at_links(tmp_path):
    folder, host = tmp_path / "snapshots", tmp_path / "host"
    (folder / "process-1" / "images").mkdir(parents=True)
    host.mkdir()
    (host / "shadow").touch()
    (folder / "process-1" / "link").symlink_to(host)
    (folder / "gone").symlink_to(host / "shadow")
    _give_to(folder, 12345, 12346)
    assert {path.lstat().st_uid for path in (folder, *folder.rglob("*"))} == {12345}
    assert {path.lstat().st_uid for path in (host, host / "shadow")} == {0}


def test_a_deploy_asks_the_registry_once_what_a_tag_is_and_a_start_up_does_not(tmp_path, fake):
    """What was made here, and what a digest names, stays what it is."""
    fake.images["reg.example/fn:1"] = FakeImage(labels=OURS, origins=("reg.example/fn@sha256:old",))
    fake.pullable["reg.example/fn:1"] = FakeImage(labels=OURS, origins=("reg.example/fn@sha256:new",))

    async def scenario():
        async with opened(tmp_path / "s", fake.path, "none") as host:
            await host.look("reg.example/fn:1", False)
            assert (host.origin("reg.example/fn:1"), fake.pulls) == ("reg.example/fn@sha256:old", [])
            await host.look("reg.example/fn:1")
            await host.prepare(function("reg.example/fn:1"))
            assert (host.origin("reg.example/fn:1"), fake.pulls) == ("reg.example/fn@sha256:new", ["reg.example/fn:1"])
            await host.look("test/fn:1")
            assert host.origin("test/fn:1") == ""
            assert len(fake.pulls) == 1

    run(scenario())


@pytest.mark.parametrize("suffix", [":1", "@sha256:2", ":1@sha256:2"])
def test_the_origin_of_an_image_is_of_its_own_repository(tmp_path, fake, suffix):
    origins = ("reg.example/team/embed@sha256:1", "reg.example/team/embed2@sha256:2")
    image = f"reg.example/team/embed2{suffix}"
    fake.images[image] = FakeImage(labels=OURS, origins=origins)

    async def scenario():
        async with opened(tmp_path / "s", fake.path, "none") as host:
            await host.look(image, False)
            assert host.origin(image) == "reg.example/team/embed2@sha256:2"

    run(scenario())
