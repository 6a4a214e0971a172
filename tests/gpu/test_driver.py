"""The driver's checkpoint API as `adapter.gpu.checkpoint` gives it: states, orders, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

STATES = {
    "running": [],
    "locked": ["lock"],
    "checkpointed": ["lock", "checkpoint"],
}

ALLOWED = {
    ("running", "lock"): "locked",
    ("locked", "checkpoint"): "checkpointed",
    ("locked", "unlock"): "running",
    ("checkpointed", "restore"): "locked",
}

PROGRAM = """
import json, os, sys
from adapter.errors import GpuError
from adapter.gpu.checkpoint import Driver
pid, steps, user = int(sys.argv[1]), sys.argv[2].split(), int(sys.argv[3])
try:
    driver = Driver()
    os.setuid(user)  # once all is imported: an interpreter of root's may be closed to others
    for step in steps:
        name, _, argument = step.partition("=")
        more = {"lock": [10.0], "restore": [json.loads(argument)] if argument else []}.get(name, [])
        getattr(driver, name)(pid, *more)
    print(json.dumps([driver.state(pid).value, ""]))
except GpuError as error:
    print(json.dumps(["", error.code, error.message, error.why]))
"""


def drive(machine, pid, steps, user=None):
    """The state after those steps, taken in a process of their own, and the code of the error that ended them."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(pid), " ".join(steps), str(os.getuid() if user is None else user)],
        env={**os.environ, **machine.environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("step", ["lock", "checkpoint", "restore", "unlock"])
def test_each_step_goes_from_one_state_only(machine, subject, state, step):
    after = ALLOWED.get((state, step))
    reached, code, *_ = drive(machine, subject.pid, [*STATES[state], step])
    assert (reached, code) == ((after, "") if after else ("", "gpu-wrong-state"))
    assert drive(machine, subject.pid, [])[0] == (after or state)


def test_a_whole_round_leaves_bytes_and_addresses_as_they_were(machine, start_subject):
    subject = start_subject(machine).with_memory("plain", "virtual", "plain")
    for _ in range(3):
        assert drive(machine, subject.pid, ["lock", "checkpoint", "restore", "unlock"])[0] == "running"
        assert subject.tell("check")


def test_calls_of_a_locked_process_wait_until_it_runs_again(machine, subject):
    drive(machine, subject.pid, ["lock"])
    number = subject.tell("call")
    assert not subject.tell("is_done", number, 0.2)
    drive(machine, subject.pid, ["checkpoint", "restore"])
    assert not subject.tell("is_done", number, 0.2)
    drive(machine, subject.pid, ["unlock"])
    assert subject.tell("is_done", number, 60)


def test_a_process_that_never_used_cuda_is_said_to_be_none(machine, start_subject):
    subject = start_subject(machine)
    assert subject.tell("resident_bytes") > 0  # it runs
    assert drive(machine, subject.pid, ["lock"])[1] == "gpu-no-cuda-process"


def test_a_process_that_has_ended_is_said_to_be_none(machine, subject):
    subject.end()
    assert drive(machine, subject.pid, [])[1] == "gpu-no-cuda-process"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_another_users_process_is_out_of_reach(machine, subject):
    reached, code, message, _ = drive(machine, subject.pid, ["lock"], user=65534)
    assert (reached, code) == ("", "gpu-not-permitted")
    assert str(subject.pid) in message
    assert subject.tell("check")


def test_a_mapping_onto_the_same_gpu_is_accepted(machine, subject):
    uuid = subject.tell("gpu")
    text = f"GPU-{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}"
    reached, code, *_ = drive(
        machine,
        subject.pid,
        ["lock", "checkpoint", f"restore={json.dumps({text: text}, separators=(',', ':'))}", "unlock"],
    )
    if code == "gpu-bindings-too-old":
        pytest.skip("cuda-bindings of CUDA 12 name no GPUs")
    assert (reached, code) == ("running", "")
    assert subject.tell("gpu") == uuid
    assert subject.tell("check")
