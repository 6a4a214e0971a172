"""What parking and resuming do when the driver fails, hangs, or a process is killed: on the simulated GPU, scripted.

In each case the answer must say what is true of the process afterwards: it runs on with its bytes, it is parked
as it was, or it is lost (`committed`).
"""

import pytest

from adapter.errors import GpuError
from adapter.gpu.wire import Operation, State
from tests.gpu.subject import Failed
from tests.stubs.simulated import (
    CUDA_NOT_SUPPORTED,
    CUDA_OUT_OF_MEMORY,
    CUDA_UNKNOWN,
    GIB,
    StubGpu,
    uuid_of,
)

pytestmark = pytest.mark.gpu

STATE, LOCK, CHECKPOINT, RESTORE, UNLOCK = (
    f"cuCheckpointProcess{name}" for name in ("GetState", "Lock", "Checkpoint", "Restore", "Unlock")
)


@pytest.fixture
def subject(simulated, start_subject):
    return start_subject(simulated).with_memory("plain", "virtual")


@pytest.fixture
def client(simulated, start_client):
    return start_client(simulated)[1]


def is_back(simulated, start_client, subject):
    """Whether another helper, with nothing going wrong, gets the process running with its bytes."""
    simulated.fault()
    answer = start_client(simulated)[1].ask(Operation.RESUME, subject.pidfd)
    return answer.error is None and answer.reached is State.RUNNING and subject.tell("check")


@pytest.mark.parametrize(
    "faults",
    [
        [f"{STATE} 1 fail {CUDA_UNKNOWN}"],
        [f"{LOCK} 1 fail {CUDA_UNKNOWN}"],
        [f"{LOCK} 1 fail {CUDA_UNKNOWN} when=after"],
        [f"{CHECKPOINT} 1 fail {CUDA_NOT_SUPPORTED}"],
    ],
)
def test_a_park_that_fails_before_anything_was_moved_leaves_the_process_running(simulated, subject, client, faults):
    simulated.fault(*faults)
    answer = client.ask(Operation.PARK, subject.pidfd)
    assert answer.error is not None
    assert not answer.committed
    assert answer.reached in {State.RUNNING, None}
    assert subject.tell("check")
    assert client.ask(Operation.STATE, subject.pidfd).reached is State.RUNNING


@pytest.mark.parametrize(
    ("faults", "reached"),
    [
        ([f"{LOCK} 1 failed {CUDA_UNKNOWN}"], State.FAILED),
        ([f"{CHECKPOINT} 1 failed {CUDA_UNKNOWN}"], State.FAILED),
        ([f"{CHECKPOINT} 1 fail {CUDA_UNKNOWN} when=after"], State.CHECKPOINTED),
        ([f"{CHECKPOINT} 1 fail {CUDA_UNKNOWN}", f"{UNLOCK} * fail {CUDA_UNKNOWN}"], State.LOCKED),
        ([f"{CHECKPOINT} 1 fail {CUDA_UNKNOWN}", f"{STATE} 2 fail {CUDA_UNKNOWN}", f"{STATE} 3 fail 999"], None),
        ([f"{CHECKPOINT} 1 lost"], None),
        ([f"{LOCK} 1 kill-target"], None),
        ([f"{CHECKPOINT} 1 kill-target"], None),
    ],
)
def test_a_park_that_fails_later_says_that_the_process_is_lost(simulated, subject, client, faults, reached):
    simulated.fault(*faults)
    answer = client.ask(Operation.PARK, subject.pidfd)
    assert answer.error is not None
    assert (answer.found, answer.reached, answer.committed) == (State.RUNNING, reached, True)


def test_a_resume_that_moved_nothing_leaves_the_process_parked_and_can_be_tried_again(simulated, subject, client):
    client.ask(Operation.PARK, subject.pidfd)
    simulated.fault(f"{RESTORE} 1 fail {CUDA_UNKNOWN}")
    answer = client.ask(Operation.RESUME, subject.pidfd)
    assert answer.error is not None
    assert (answer.reached, answer.committed) == (State.CHECKPOINTED, False)
    assert client.ask(Operation.RESUME, subject.pidfd).error is None
    assert subject.tell("check")


@pytest.mark.parametrize(
    ("fault", "reached"),
    [
        (f"{RESTORE} 1 failed {CUDA_OUT_OF_MEMORY}", State.FAILED),
        (f"{RESTORE} 1 fail {CUDA_UNKNOWN} when=after", State.LOCKED),
        (f"{UNLOCK} 1 fail {CUDA_UNKNOWN}", State.LOCKED),
        (f"{RESTORE} 1 kill-target", None),
        (f"{UNLOCK} 1 kill-target", None),
        (f"{UNLOCK} 1 lost", None),
    ],
)
def test_a_resume_that_fails_later_says_that_the_process_is_lost(simulated, subject, client, fault, reached):
    client.ask(Operation.PARK, subject.pidfd)
    simulated.fault(fault)
    answer = client.ask(Operation.RESUME, subject.pidfd)
    assert answer.error is not None
    assert (answer.found, answer.reached, answer.committed) == (State.CHECKPOINTED, reached, True)


def test_memory_that_someone_took_meanwhile_loses_the_process(simulated, start_subject, client):
    simulated.set(StubGpu(uuid_of(0), bytes=GIB))
    subject, other = start_subject(simulated).with_memory(), start_subject(simulated)
    client.ask(Operation.PARK, subject.pidfd)
    other.tell("init")
    other.tell("_plain", GIB)
    answer = client.ask(Operation.RESUME, subject.pidfd)
    assert answer.error is not None
    assert (answer.error.code, answer.reached, answer.committed) == ("gpu-out-of-memory", State.FAILED, True)
    again = client.ask(Operation.RESUME, subject.pidfd)
    assert again.error is not None
    assert (again.error.code, again.committed) == ("gpu-wrong-state", True)


def test_calls_of_a_lost_process_fail_and_do_not_wait(simulated, subject, client):
    simulated.fault(f"{CHECKPOINT} 1 failed {CUDA_UNKNOWN}")
    client.ask(Operation.PARK, subject.pidfd)
    with pytest.raises(Failed, match="CUDA_ERROR_UNKNOWN"):
        subject.tell("check")


@pytest.mark.parametrize(
    "fault",
    [
        f"{STATE} 1 kill-caller",
        f"{LOCK} 1 kill-caller",
        f"{LOCK} 1 kill-caller when=after",
        f"{CHECKPOINT} 1 kill-caller",
        f"{CHECKPOINT} 1 kill-caller when=after",
    ],
)
def test_a_helper_killed_while_it_parks_loses_no_process(simulated, start_client, subject, client, fault):
    simulated.fault(fault)
    with pytest.raises(GpuError) as died:
        client.ask(Operation.PARK, subject.pidfd)
    assert died.value.code == "helper-died"
    assert is_back(simulated, start_client, subject)


@pytest.mark.parametrize("when", ["", " when=after"])
@pytest.mark.parametrize("call", [RESTORE, UNLOCK])
def test_a_helper_killed_while_it_resumes_loses_no_process(simulated, start_client, subject, client, call, when):
    client.ask(Operation.PARK, subject.pidfd)
    simulated.fault(f"{call} 1 kill-caller{when}")
    with pytest.raises(GpuError) as died:
        client.ask(Operation.RESUME, subject.pidfd)
    assert died.value.code == "helper-died"
    assert is_back(simulated, start_client, subject)


def test_what_a_killed_helper_locked_can_be_parked_by_the_next(simulated, start_client, subject, client):
    simulated.fault(f"{LOCK} 1 kill-caller when=after")
    with pytest.raises(GpuError):
        client.ask(Operation.PARK, subject.pidfd)
    answer = start_client(simulated)[1].ask(Operation.PARK, subject.pidfd)
    assert (answer.error, answer.found, answer.reached) == (None, State.LOCKED, State.CHECKPOINTED)
    assert is_back(simulated, start_client, subject)


@pytest.mark.parametrize("call", [STATE, LOCK, CHECKPOINT])
def test_a_driver_that_hangs_is_given_up_on_and_the_process_saved_by_another_helper(
    simulated, start_client, subject, call
):
    helper, client = start_client(simulated)
    client.ask(Operation.STATE, subject.pidfd)
    simulated.fault(f"{call} 1 hang")
    with pytest.raises(GpuError) as late:
        client.ask(Operation.PARK, subject.pidfd, limit_s=0.5)
    assert late.value.code == "helper-timeout"
    helper.kill()
    assert is_back(simulated, start_client, subject)


def test_a_driver_that_hangs_for_one_process_parks_another(simulated, start_subject, subject, client):
    other = start_subject(simulated).with_memory()
    simulated.fault(f"{CHECKPOINT} * hang target={subject.pid}")
    client.send(Operation.PARK, subject.pidfd)
    assert client.ask(Operation.PARK, other.pidfd).reached is State.CHECKPOINTED


@pytest.mark.parametrize("kind", ["managed memory", "mig"])
def test_what_cannot_be_checkpointed_runs_on(simulated, start_subject, client, kind):
    simulated.set(StubGpu(uuid_of(0), mig=kind == "mig"))
    subject = start_subject(simulated).with_memory("plain", *(["managed"] if kind == "managed memory" else []))
    answer = client.ask(Operation.PARK, subject.pidfd)
    assert answer.error is not None
    assert (answer.error.code, answer.reached, answer.committed) == (
        "gpu-checkpoint-unsupported",
        State.RUNNING,
        False,
    )
    assert subject.tell("check")


def test_a_driver_without_checkpoints_is_said_to_be_too_old_for_them(simulated, start_subject, start_client):
    simulated.set(checkpoint=False, driver="535.230.02", cuda=12020)
    subject = start_subject(simulated).with_memory()
    answer = start_client(simulated)[1].ask(Operation.PARK, subject.pidfd)
    assert answer.error is not None
    assert (answer.error.code, answer.committed) == ("gpu-checkpoint-unsupported", False)
    assert subject.tell("check")


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (36, "gpu-driver-too-old"),
        (100, "no-gpu"),
        (803, "gpu-driver-mismatch"),
        (CUDA_UNKNOWN, "gpu-failed"),
        (7777, "gpu-failed"),
    ],
)
def test_a_driver_that_cannot_be_initialised_is_explained_at_each_request(
    simulated, start_client, subject, result, code
):
    simulated.fault(f"cuInit * fail {result}")
    client = start_client(simulated)[1]
    for _ in range(2):
        answer = client.ask(Operation.PARK, subject.pidfd)
        assert answer.error is not None
        assert (answer.error.code, answer.committed) == (code, False)
        assert answer.error.hint
    simulated.fault()
    assert client.ask(Operation.PARK, subject.pidfd).error is None  # it may have been the moment


# -- onto another GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(simulated):
    simulated.set(StubGpu(uuid_of(0)), StubGpu(uuid_of(1)))
    return uuid_of(0), uuid_of(1)


def hexadecimal(uuid):
    return uuid.removeprefix("GPU-").replace("-", "")


def test_a_process_resumes_on_another_gpu_with_the_same_bytes(simulated, two_gpus, start_subject, client):
    subject = start_subject(simulated, CUDA_VISIBLE_DEVICES="0").with_memory("plain", "virtual")
    client.ask(Operation.PARK, subject.pidfd)
    answer = client.ask(Operation.RESUME, subject.pidfd, mapping={two_gpus[0]: two_gpus[1]})
    assert answer.error is None
    assert subject.tell("gpu") == hexadecimal(two_gpus[1])
    assert subject.tell("check")


def test_a_gpu_that_is_full_is_left_for_one_that_is_free(simulated, start_subject, client):
    simulated.set(StubGpu(uuid_of(0), bytes=GIB), StubGpu(uuid_of(1), bytes=GIB))
    subject, other = start_subject(simulated).with_memory(), start_subject(simulated)
    client.ask(Operation.PARK, subject.pidfd)
    other.tell("init")
    other.tell("_plain", GIB)
    assert client.ask(Operation.RESUME, subject.pidfd, mapping={uuid_of(0): uuid_of(1)}).error is None
    assert subject.tell("check")


@pytest.mark.parametrize(
    "mapping", [{uuid_of(0): uuid_of(7)}, {"GPU-0": "one"}, {uuid_of(0): uuid_of(1), uuid_of(1): uuid_of(1)}]
)
def test_a_mapping_that_is_none_is_refused_and_the_process_stays_parked(simulated, two_gpus, subject, client, mapping):
    client.ask(Operation.PARK, subject.pidfd)
    answer = client.ask(Operation.RESUME, subject.pidfd, mapping=mapping)
    assert answer.error is not None
    assert (answer.error.code, answer.reached, answer.committed) == ("gpu-bad-mapping", State.CHECKPOINTED, False)
    assert client.ask(Operation.RESUME, subject.pidfd).error is None
    assert subject.tell("check")


def test_a_driver_too_old_for_other_gpus_refuses_and_the_process_stays_parked(simulated, start_subject, client):
    simulated.set(StubGpu(uuid_of(0)), StubGpu(uuid_of(1)), remap=False, driver="570.86.10", cuda=12080)
    subject = start_subject(simulated).with_memory()
    client.ask(Operation.PARK, subject.pidfd)
    answer = client.ask(Operation.RESUME, subject.pidfd, mapping={uuid_of(0): uuid_of(1)})
    assert answer.error is not None
    assert (answer.error.code, answer.committed) == ("gpu-bad-mapping", False)
    assert client.ask(Operation.RESUME, subject.pidfd).error is None


@pytest.mark.parametrize("is_initialised", [False, True])
@pytest.mark.parametrize("persistence", [False, True])
def test_restoring_needs_persistence_mode_or_an_initialised_driver(
    simulated, subject, client, persistence, is_initialised
):
    simulated.set(persistence=persistence)
    client.ask(Operation.PARK, subject.pidfd)
    program = """
        if sys.argv[2] == "True":
            ok(cuda.cuInit(0))
        print(cuda.cuCheckpointProcessRestore(int(sys.argv[1]), None)[0].name)
    """
    said = simulated.run(program, str(subject.pid), str(is_initialised))
    assert said == ("CUDA_SUCCESS" if persistence or is_initialised else "CUDA_ERROR_NOT_PERMITTED")
