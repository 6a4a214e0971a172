"""A GPU replica: parked, resumed, dumped while it is parked, restored; on a simulated GPU, with the real CRIU."""

import asyncio
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from adapter.hosts import ReplicaState
from adapter.hosts.shell import Isolation
from adapter.records import EventName
from adapter.replica import RESULT_VARIABLE, TASK_SNAPSHOT, TASK_VARIABLE, ReplicaSettings
from adapter.snapshot.store import Store
from benchmarks.gpu.kills import victims
from benchmarks.session import Session
from tests.fakes.host import Listener, ask, deployment, running
from tests.fakes.replicas import until
from tests.stubs.simulated import CUDA_OUT_OF_MEMORY, CUDA_UNKNOWN, StubGpu, uuid_of

pytestmark = [pytest.mark.e2e, pytest.mark.gpu, pytest.mark.criu]

GPU = uuid_of(0)
FUNCTIONS = Path(__file__).parents[1] / "functions"
ANNOTATIONS = {"gpufn.dev/gpu": "1"}


@pytest.fixture
def gpu(simulated, monkeypatch):
    """A machine whose processes find a simulated GPU, and no variable of it."""
    monkeypatch.setenv("LD_LIBRARY_PATH", simulated.search_path)
    return simulated


class Life:
    """One replica on a GPU, from its start."""

    def __init__(self, replica, listener):
        self.replica = replica
        self.heard = listener

    async def ask(self):
        return json.loads(await ask(self.replica))

    async def record(self, number=1):
        return (await self.heard.heard(EventName.STARTED, number)).fields["record"]

    async def park(self, number=1):
        self.replica.park()
        await self.heard.heard(EventName.PARKED, number)

    async def snapshot(self):
        return (await self.heard.heard(EventName.SNAPSHOT, 2)).fields


def lives(state, scenario, *, snapshot="auto", of_machine=False):
    """Run `scenario` with what begins a life of the function on given GPUs; `of_machine`: with the host's helper."""
    wanted = deployment("gpu-memory", annotations={**ANNOTATIONS, "gpufn.dev/snapshot": snapshot})

    async def whole():
        async with running(state, FUNCTIONS) as host:
            await host.prepare(wanted)
            if of_machine:
                assert [device.uuid for device in (await host.inventory()).devices] == [GPU]

            async def begin(*devices):
                listener = Listener()
                return Life(await host.start(wanted, listener, devices or (GPU,)), listener)

            begin.host = host
            await scenario(begin)

    asyncio.run(asyncio.wait_for(whole(), 110))


def test_a_container_that_is_started_for_it_dumps_a_gpu_process_with_a_helper_of_its_own(tmp_path, gpu):
    """As a pod on a cluster: no host, no helper of the machine's, and its GPU is named by who gave it the device."""
    settings = ReplicaSettings(
        function="gpu-memory",
        folder=str(FUNCTIONS / "gpu-memory"),
        snapshot_dir=str(tmp_path / "store"),
        device="cuda:0",
    )
    result = tmp_path / "result"
    ended = subprocess.run(
        [*Isolation.find().wrapper, sys.executable, "-m", "adapter.runtime"],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            **settings.to_env({"function", "folder", "snapshot_dir", "device"}),
            "NVIDIA_VISIBLE_DEVICES": GPU,
            TASK_VARIABLE: TASK_SNAPSHOT,
            RESULT_VARIABLE: str(result),
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(result.read_text())["state"] == "published"
    [snapshot] = Store(tmp_path / "store").all()
    assert (snapshot.kind, snapshot.facts["gpu"]) == ("process", GPU)
    assert gpu.held_bytes() == 0


def names(record):
    return [phase["name"] for phase in record["phases"]]


def test_a_parked_replica_gives_its_gpu_memory_back_and_comes_back_with_it(state_dir, gpu):
    async def scenario(begin):
        life = await begin()
        first = await life.ask()
        assert first["whole"]
        held = gpu.held_bytes()
        assert held > 0
        for number in range(1, 4):
            await life.park(number)
            assert gpu.held_bytes() == 0
            assert life.replica.state is ReplicaState.PARKED
            life.replica.resume((GPU,))
            assert await life.ask() == first
            assert gpu.held_bytes() == held
            record = await life.record(number + 1)
            assert record["rung"] == "resume"
            assert "cuda_restore" in names(record)

    lives(state_dir, scenario, snapshot="off")


def test_a_request_at_a_parked_replica_waits_until_the_host_has_gpu_memory_for_it(state_dir, gpu):
    async def scenario(begin):
        life = await begin()
        await life.ask()
        await life.park()
        asked = asyncio.create_task(life.ask())
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(asked), 0.2)
        assert gpu.held_bytes() == 0
        life.replica.resume((GPU,))
        assert (await asked)["whole"]

    lives(state_dir, scenario, snapshot="off")


def test_a_process_dumped_while_parked_is_restored_with_its_gpu_memory_at_its_addresses(state_dir, gpu):
    async def scenario(begin):
        first = await begin()
        said = await first.ask()
        await first.park()  # told once the snapshot is taken
        assert (await first.snapshot())["state"] == "published"
        assert gpu.held_bytes() == 0
        await first.replica.stop(30)
        second = await begin()
        again = await second.ask()
        assert again["whole"]
        record = await second.record()
        assert record["rung"] == "restore"
        assert {"restore", "cuda_restore"} <= set(names(record))
        assert said["whole"]

    lives(state_dir, scenario)


def test_a_restored_process_comes_up_on_another_gpu_of_the_same_model(state_dir, gpu):
    gpu.set(StubGpu(uuid_of(0)), StubGpu(uuid_of(1)))

    async def scenario(begin):
        first = await begin(uuid_of(0))
        await first.ask()
        await first.park()
        await first.replica.stop(30)
        second = await begin(uuid_of(1))
        assert (await second.ask())["whole"]
        assert (await second.record())["rung"] == "restore"
        await second.park()
        second.replica.resume((uuid_of(0),))
        assert (await second.ask())["whole"]
        assert (await second.record(2))["rung"] == "resume"

    lives(state_dir, scenario)


def test_a_park_that_fails_before_its_commit_costs_nothing(state_dir, gpu):
    async def scenario(begin):
        life = await begin()
        first = await life.ask()
        gpu.fault(f"cuCheckpointProcessLock 1 fail {CUDA_UNKNOWN}")
        life.replica.park()
        record = await life.record(2)
        assert record["rung"] == "resume"
        assert [one["code"] for one in record["skipped"]] == ["gpu-failed"]
        assert await life.ask() == first
        await life.park()  # and the next time it works
        assert gpu.held_bytes() == 0

    lives(state_dir, scenario, snapshot="off")


def test_a_process_lost_in_a_park_ends_its_replica_and_the_next_starts_clean(state_dir, gpu):
    async def scenario(begin):
        life = await begin()
        await life.ask()
        gpu.fault("cuCheckpointProcessCheckpoint 1 failed")
        life.replica.park()
        await life.heard.heard(EventName.STOPPED)
        assert gpu.held_bytes() == 0
        assert (await (await begin()).ask())["whole"]

    lives(state_dir, scenario, snapshot="off")


def test_a_restore_that_finds_no_gpu_memory_is_followed_by_the_next_rung(state_dir, gpu):
    async def scenario(begin):
        life = await begin()
        await life.ask()
        await life.park()
        gpu.fault(f"cuCheckpointProcessRestore 1 fail {CUDA_OUT_OF_MEMORY}")
        asked = asyncio.create_task(life.ask())
        life.replica.resume((GPU,))
        assert (await asked)["whole"]
        record = await life.record(2)
        assert record["rung"] == "load"
        assert ("resume", "gpu-out-of-memory") in [(one["rung"], one["code"]) for one in record["skipped"]]

    lives(state_dir, scenario, snapshot="off")


def test_a_full_gpu_costs_one_restore_and_no_snapshot(state_dir, gpu):
    async def scenario(begin):
        first = await begin()
        await first.ask()
        await first.park()
        await first.replica.stop(30)
        gpu.fault(f"cuCheckpointProcessRestore 1 fail {CUDA_OUT_OF_MEMORY}")
        second = await begin()
        assert (await second.ask())["whole"]
        record = await second.record()
        assert record["rung"] == "load"
        assert ("restore", "gpu-out-of-memory") in [(one["rung"], one["code"]) for one in record["skipped"]]
        await second.replica.stop(30)
        third = await begin()
        assert (await third.ask())["whole"]
        assert (await third.record())["rung"] == "restore"

    lives(state_dir, scenario)


def test_a_helper_of_the_machine_that_is_killed_is_replaced_and_carries_on(state_dir, gpu):
    async def scenario(begin):
        life = await begin()
        first = await life.ask()
        await life.park()
        helper = begin.host._gpu_helper
        killed = helper.pid
        os.kill(killed, signal.SIGKILL)
        asked = asyncio.create_task(life.ask())
        life.replica.resume((GPU,))
        assert await asked == first
        assert helper.pid not in (0, killed)

    lives(state_dir, scenario, snapshot="off", of_machine=True)


def unread_bytes(sock):
    """What the other end of a Unix socket has not read yet."""
    return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]


def test_a_process_that_ends_before_it_hears_of_the_park_does_not_keep_the_next_one_from_parking(state_dir, gpu):
    async def scenario(begin):
        life = await begin()
        await life.ask()
        (model,) = victims(os.getpid(), "parking")
        os.kill(model, signal.SIGSTOP)
        life.replica.park()
        await until(lambda: not unread_bytes(life.replica._shell.line))
        os.kill(model, signal.SIGKILL)
        await life.heard.heard(EventName.SERVING, 2)
        await life.park()
        assert gpu.held_bytes() == 0

    lives(state_dir, scenario, snapshot="off")


def test_where_the_driver_cannot_do_it_a_park_is_refused_at_once_and_the_replica_serves_on(state_dir, gpu):
    gpu.set(checkpoint=False)

    async def scenario(begin):
        await asyncio.wait_for(begin.host._gpu_trial._task, 60)
        life = await begin()
        first = await life.ask()
        life.replica.park()
        log = begin.host.log_path(life.replica.deployment)
        await until(lambda: log.exists() and "cannot be parked" in log.read_text())
        assert await life.ask() == first
        assert life.replica.state is ReplicaState.SERVING
        assert life.heard.names.count(EventName.STARTED) == 1  # it was not even tried

    lives(state_dir, scenario, snapshot="off", of_machine=True)


def test_two_functions_take_turns_on_one_gpu_behind_the_gateway(tmp_path, gpu):
    """Each needs more than half of it: what wants to run has the other parked, and nobody is refused."""
    gpu.set(StubGpu(GPU, bytes=6 << 20))
    environment = {"LD_LIBRARY_PATH": gpu.search_path}
    with Session(tmp_path / "state", functions=FUNCTIONS, envs=tmp_path / "envs", variables=environment) as session:
        session.wait_for_gpus()
        annotations = {"gpufn.dev/initial": "0", "gpufn.dev/gpu": "1", "gpufn.dev/park": "1h", "gpufn.dev/idle": "2h"}
        for name in ("one", "two"):
            body = {"service": name, "image": "gpu-memory:latest", "annotations": annotations}
            session.api("POST", "/system/functions", body)
            session.wait(lambda name=name: not session._status(name), f"{name} is prepared", 60)
        for turn in range(3):
            for name in ("one", "two"):
                answer = session.call(name)
                assert answer.json().get("whole"), (turn, name, answer.body)
                assert gpu.held_bytes() == 4 << 20
        rungs = {name: {record["rung"] for record in session.starts(name)} for name in ("one", "two")}
        assert rungs == {"one": {"load", "resume"}, "two": {"load", "resume"}}
        report = session.cli("usage", "report", "-o", "csv")
        assert "gpu-seconds" in report.lower()


def test_a_request_that_comes_while_a_parked_replica_is_dumped_goes_first(state_dir, gpu):
    """The snapshotter and what it warms up are killed, and their GPU memory is free for the one that wakes."""

    async def scenario(begin):
        life = await begin()
        first = await life.ask()
        gpu.set(StubGpu(GPU, bytes=6 << 20))  # room for one
        life.replica.park()
        assert (await life.heard.heard(EventName.SNAPSHOT)).fields["state"] == "building"
        await until(gpu.held_bytes)  # the process that is to be dumped has it
        asked = asyncio.create_task(life.ask())
        await life.heard.heard(EventName.PARKED)
        assert gpu.held_bytes() == 0
        life.replica.resume((GPU,))
        assert await asked == first
        await life.park(2)
        taken = [event.fields["state"] for event in life.heard.events if event.name is EventName.SNAPSHOT]
        assert taken == ["building", "failed", "building", "published"]

    lives(state_dir, scenario)
