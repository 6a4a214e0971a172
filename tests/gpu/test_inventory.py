"""What NVML says of the machine, and what CUDA makes of the variables."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adapter.gpu.wire import Operation
from tests.gpu.subject import MIB, Failed
from tests.stubs.simulated import GIB, StubGpu, uuid_of

pytestmark = pytest.mark.gpu


def ask(machine, program, **environ):
    """What a program prints that has `inventory` and `attempt`, which prints an error's code and why instead."""
    prelude = (
        "import os\nfrom adapter.errors import GpuError\nfrom adapter.gpu import inventory\n"
        "def attempt(call):\n"
        "    try:\n        print(call())\n"
        "    except GpuError as e:\n        print(e.code, '|', e.why, '|', e.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + program],
        env={**os.environ, **machine.environment, **environ},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_each_gpu_has_a_uuid_a_name_and_memory(machine):
    program = "for g in inventory.take_inventory().gpus: print(g.index, g.uuid, g.memory_bytes, g.name, sep='|')"
    lines = ask(machine, program).splitlines()
    assert lines
    for index, line in enumerate(lines):
        assert re.fullmatch(rf"{index}\|GPU-[0-9a-f-]{{36}}\|[1-9][0-9]{{8,}}\|.+", line)


def test_versions_are_said_in_their_usual_form(machine):
    said = ask(machine, "i = inventory.take_inventory(); print(i.driver_version, i.cuda_version)")
    assert re.fullmatch(r"\d+\.\d+(\.\d+)? \d+\.\d+", said)


@pytest.mark.parametrize("value", ["0", "", "99", "0,99", "none"])
def test_cuda_counts_the_devices_that_we_call_visible(machine, start_subject, value):
    program = "attempt(lambda: len(inventory.visible_devices(inventory.take_inventory(), os.environ)))"
    ours = ask(machine, program, CUDA_VISIBLE_DEVICES=value)
    subject = start_subject(machine, CUDA_VISIBLE_DEVICES=value)
    try:
        counted = str(subject.tell("gpus"))
    except Failed:
        counted = "no-visible-gpu"
    assert ours.split(" |")[0] == counted


def test_memory_of_a_parked_process_looks_free_to_nvml(machine, start_subject, client):
    """Why only leases know what is free."""
    program = (
        "import pynvml; pynvml.nvmlInit(); h = pynvml.nvmlDeviceGetHandleByIndex(0)\n"
        "print(pynvml.nvmlDeviceGetMemoryInfo(h).used, len(pynvml.nvmlDeviceGetComputeRunningProcesses(h)))"
    )

    def used():
        return [int(word) for word in ask(machine, program).split()]

    subject = start_subject(machine)
    subject.tell("init")
    subject.tell("allocate", "plain", 512 * MIB, 0)
    bytes_running, processes_running = used()
    assert client.ask(Operation.PARK, subject.pidfd).error is None
    bytes_parked, processes_parked = used()
    assert bytes_running - bytes_parked >= 512 * MIB
    assert processes_parked == processes_running - 1


def test_instances_of_a_gpu_in_mig_mode_are_listed(simulated):
    simulated.set(StubGpu(uuid_of(0), mig=True), persistence=False)
    program = "g = inventory.take_inventory().gpus[0]; print(g.mig, g.persistence, *(i.uuid[:8] for i in g.instances), g.instances[0].memory_bytes)"
    assert ask(simulated, program) == f"True False MIG-0000 MIG-0000 {4 * GIB}"


@pytest.mark.parametrize(
    ("faults", "code", "word"),
    [
        (["nvmlInit * fail 9"], "no-gpu", "driver"),
        (["nvmlInit * fail 18"], "gpu-driver-mismatch", "Reboot"),
        (["nvmlInit * fail 4"], "gpu-not-permitted", "/dev/nvidia"),
        (["nvmlInit * fail 999"], "gpu-failed", "nvidia-smi"),
        (["nvmlDeviceGetName 1 lost", "nvmlDeviceGetUUID * fail 15"], "gpu-lost", "Xid"),
        (["nvmlDeviceGetUUID * fail 13"], "gpu-driver-too-old", "580"),
    ],
)
def test_what_stands_in_the_way_is_explained(simulated, faults, code, word):
    simulated.fault(*faults)
    said = ask(simulated, "attempt(inventory.take_inventory)")
    assert said.startswith(f"{code} |")
    assert word in said


@pytest.mark.parametrize("call", ["nvmlDeviceGetMigMode", "nvmlDeviceGetPersistenceMode"])
def test_a_gpu_without_mig_or_persistence_mode_is_listed_all_the_same(simulated, call):
    simulated.fault(f"{call} * fail 3")
    assert ask(simulated, "print(inventory.take_inventory().gpus[0].mig)") == "False"


def test_without_the_drivers_library_there_is_no_gpu(simulated, tmp_path):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("the driver's library is here")
    said = ask(simulated, "attempt(inventory.take_inventory)", LD_LIBRARY_PATH=str(tmp_path))
    assert said.startswith("no-gpu |")
    assert "libnvidia-ml" in said
