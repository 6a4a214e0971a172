"""The container host over a real daemon: the contract, and what only a kernel can show."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapter.cli.main import run as command_line
from adapter.errors import AdapterError
from adapter.hosts.container import CONTRACT_LABEL, ContainerHost
from adapter.hosts.engine import Engine
from adapter.keys import CONTRACT_VERSION
from adapter.records import EventName
from tests.contract.hosts.containers import HANDLER, ContainerHostContract, function, opened, run
from tests.fakes.host import Listener, ask
from tests.images import machine, wheels as wheel_folder
from tests.images.conftest import CACHE

# CRIU's right lies in its file: the image runs as an ordinary user, and nothing else in it has any.
DOCKERFILE = """
FROM {base}
USER 0:0
COPY . /opt/gpufn
RUN python3 -m venv --system-site-packages /opt/venv \\
 && /opt/venv/bin/pip install --quiet --no-index --find-links /opt/gpufn/wheels flask gunicorn \\
 && python3 /opt/gpufn/right.py && chmod -R a+rX /opt/gpufn
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/opt/gpufn/shim GPUFN_FOLDER=/opt/gpufn/function
LABEL {label}={version}
USER 1000:1000
ENTRYPOINT ["python", "-m", "adapter.runtime"]
"""
RIGHT = """
import glob, os, struct
(loader,) = glob.glob("/opt/gpufn/criu/usr/lib/*/ld-linux*.so.2")
os.setxattr(loader, "security.capability", struct.pack("<5I", 0x02000001, 0, 0, 1 << (40 - 32), 0))
"""
PROBE = """
import ctypes, os

def load(device):
    return "loaded"

def handle(event, context):
    libc = ctypes.CDLL(None, use_errno=True)
    status = open("/proc/self/status").read()
    rights = [line.split()[1] for line in status.splitlines() if line.startswith(("CapPrm", "CapEff", "Seccomp:"))]
    said = []
    for number in (425, 165, 272):  # io_uring_setup, mount, unshare
        libc.syscall(number, 0, 0, 0, 0, 0)
        said.append(os.strerror(ctypes.get_errno()))
    return {"statusCode": 200, "body": {"rights": rights, "said": said}}
"""


def _function_image(docker, base: str, folder: Path, wheels: Path, repository: Path, name: str, handler: str) -> str:
    folder.mkdir()
    (folder / "function").mkdir()
    (folder / "function" / "handler.py").write_text(handler)
    (folder / "right.py").write_text(RIGHT)
    shutil.copytree(wheels, folder / "wheels")
    shutil.copytree(CACHE / "criu", folder / "criu")
    shutil.copytree(repository / "adapter", folder / "shim" / "adapter", ignore=shutil.ignore_patterns("__pycache__"))
    text = DOCKERFILE.format(base=base, label=CONTRACT_LABEL, version=CONTRACT_VERSION)
    (folder / "Dockerfile").write_text(text)
    docker("build", "--quiet", "--network", "none", "--tag", name, str(folder), timeout=600)
    return name


@pytest.fixture(scope="session")
def criu(repository) -> Path:
    machine.run_script(repository, "install-criu.sh", str(CACHE / "criu"))
    return CACHE / "criu"


@pytest.fixture(scope="session")
def images(docker, run_image, criu, repository, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("functions")
    wheels = wheel_folder.fetch(CACHE, "flask\ngunicorn\n", repository / "requirements-dev.lock")
    made = {
        name: _function_image(docker, run_image, folder / name, wheels, repository, f"gpufn-test/{name}:1", handler)
        for name, handler in (("function", HANDLER), ("probe", PROBE))
    }
    (folder / "dies").mkdir()
    dies = f'FROM {run_image}\nLABEL {CONTRACT_LABEL}={CONTRACT_VERSION}\nENTRYPOINT ["sh", "-c", "exit 3"]\n'
    (folder / "dies" / "Dockerfile").write_text(dies)
    docker("build", "--quiet", "--tag", "gpufn-test/dies:1", str(folder / "dies"))
    return {**made, "dies": "gpufn-test/dies:1", "foreign": run_image}


@pytest.fixture
def engine(docker) -> str:
    return docker.host.removeprefix("unix://")


@pytest.fixture
def network() -> str:
    return "none"


class TestOnDocker(ContainerHostContract):
    pass


async def _snapshot_taken(listener) -> dict:
    """What the last of its two events says."""
    return (await listener.heard(EventName.SNAPSHOT, times=2)).fields


def _rung(event) -> str:
    return event.fields["record"]["rung"]


def test_it_is_dumped_where_nobody_is_served_and_restored_under_the_profile(tmp_path, engine, images, network):
    async def scenario():
        async with opened(tmp_path / "s", engine, network) as host:
            wanted = function(images["probe"], snapshot="auto")
            await host.prepare(wanted)
            first, second = Listener(), Listener()
            replica = await host.start(wanted, first)
            answer = await ask(replica)
            assert _rung(await first.heard(EventName.STARTED)) == "load"
            taken = await _snapshot_taken(first)
            assert taken["state"] == "published", taken
            replica.kill()
            await first.heard(EventName.STOPPED)
            replica = await host.start(wanted, second)
            assert await ask(replica) == answer
            started = await second.heard(EventName.STARTED)
            assert _rung(started) == "restore", started.fields["record"]["skipped"]
            return answer

    said = {}

    async def keep():
        said.update(json.loads(await scenario()))

    run(keep())
    assert said["rights"] == ["0000000000000000", "0000000000000000", "2"]
    assert said["said"] == ["Operation not permitted"] * 3


def test_an_empty_node_restores_from_the_registry(tmp_path, docker, engine, images, network, registry, capsys):
    """Taken and pushed on one node; another deploys the same image, and its first start restores."""
    image = f"{registry}/probe:1"
    docker("tag", images["probe"], image)
    docker("push", "--quiet", image)
    environment = {"DOCKER_HOST": docker.host, "REGISTRY_AUTH_FILE": str(tmp_path / "none.json")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        words = ["snapshot", "create", image, "--push", "--state", str(tmp_path / "one"), "-o", "json"]
        assert command_line(words) == 0, capsys.readouterr().err

        async def scenario():
            async with opened(tmp_path / "two", engine, network) as host:
                wanted = dataclasses.replace(function(image, snapshot="auto"), name="probe")
                await host.prepare(wanted)
                listener = Listener()
                await ask(await host.start(wanted, listener))
                started = await listener.heard(EventName.STARTED)
                assert _rung(started) == "restore", started.fields["record"]["skipped"]

        run(scenario())


def test_no_dump_under_the_profile_and_the_reason_is_said(tmp_path, engine, images, network, monkeypatch):
    async def scenario():
        async with opened(tmp_path / "s", engine, network) as host:
            original = host._create

            async def confined(*args, **options):
                return await original(*args, **{**options, "confined": True})

            monkeypatch.setattr(host, "_create", confined)
            wanted = function(images["function"], snapshot="auto")
            await host.prepare(wanted)
            listener = Listener()
            replica = await host.start(wanted, listener)
            assert (await ask(replica, b"x")).startswith(b"x")
            taken = await _snapshot_taken(listener)
            assert taken["state"] == "failed"
            assert "suspending seccomp failed" in taken["reason"]
            assert (await ask(replica, b"y")).startswith(b"y")

    run(scenario())


def test_without_the_right_it_serves_from_the_next_rung_and_keeps_the_snapshot(tmp_path, engine, images, network):
    async def scenario():
        async with opened(tmp_path / "s", engine, network) as host:
            wanted = function(images["function"], snapshot="auto")
            await host.prepare(wanted)
            snapshot = await host.take_snapshot(wanted)
            host._gives_rights = False
            listener = Listener()
            replica = await host.start(wanted, listener)
            assert (await ask(replica, b"x")).startswith(b"x")
            record = (await listener.heard(EventName.STARTED)).fields["record"]
            assert record["rung"] == "load"
            assert [skipped["code"] for skipped in record["skipped"] if skipped["rung"] == "restore"] == ["no-rights"]
            assert list((tmp_path / "s" / "snapshots").rglob(f"process-{snapshot['key']}"))

    run(scenario())


HOST = """
import asyncio, sys
from pathlib import Path
from adapter.hosts.container import ContainerHost
from adapter.hosts.engine import Engine
from tests.contract.hosts.containers import function

async def main():
    host = await ContainerHost.open(Path(sys.argv[1]), Engine(sys.argv[2]), network="none")
    wanted = function(sys.argv[3])
    await host.prepare(wanted)
    serving = asyncio.Event()
    replica = await host.start(wanted, lambda replica, event: event.name.value == "serving" and serving.set())
    await serving.wait()
    print(replica.container, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_host_that_is_killed_takes_its_containers_along(tmp_path, docker, engine, images, repository):
    words = [sys.executable, "-c", HOST, str(tmp_path / "s"), engine, images["function"]]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as host:
        assert host.stdout is not None
        container = host.stdout.readline().strip()
        assert docker.inspect(container)["State"]["Running"]
        host.send_signal(signal.SIGKILL)
    assert docker("wait", container) == "0"  # it drained

    async def reopened():
        api = Engine(engine)
        host = await ContainerHost.open(tmp_path / "s", api, network="none")
        try:
            assert await api.labelled(host._label) == []
        finally:
            await host.close()

    run(reopened())


def test_an_engine_that_refuses_is_an_error_of_ours(tmp_path, engine, images):
    async def scenario():
        with pytest.raises(AdapterError) as error:
            await Engine(engine).create("x", {"Image": "none", "HostConfig": {"NetworkMode": "none"}})
        assert error.value.why

    asyncio.run(scenario())
