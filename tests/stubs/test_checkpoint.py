"""The stub driver's checkpoint API beyond what tests/gpu asks of every driver."""

from pathlib import Path

import pytest

from tests.gpu.subject import MIB, Subject
from tests.stubs.simulated import Simulated, StubGpu, uuid_of

pytestmark = pytest.mark.gpu


@pytest.fixture
def subject(simulated):
    made = Subject(simulated)
    yield made
    made.end()


def call(simulated: Simulated, subject: Subject, *names: str) -> list[str]:
    program = """
        ok(cuda.cuInit(0))
        for name in sys.argv[2:]:
            arguments = [] if "Get" in name else [None]
            print(*(getattr(each, "name", each) for each in getattr(cuda, name)(int(sys.argv[1]), *arguments)))
    """
    return simulated.run(program, str(subject.pid), *(f"cuCheckpointProcess{name}" for name in names)).splitlines()


def test_the_restore_thread_is_one_of_the_process(simulated, subject):
    subject.with_memory()
    (said,) = call(simulated, subject, "GetRestoreThreadId")
    result, thread = said.split()
    assert result == "CUDA_SUCCESS"
    assert Path(f"/proc/{subject.pid}/task/{thread}").exists()


def test_a_parked_process_gives_its_memory_to_others_and_leaves_no_lease(simulated, subject):
    subject.tell("init")
    subject.tell("allocate", "plain", 64 * MIB, 0)
    assert simulated.held_bytes() == 64 * MIB
    call(simulated, subject, "Lock", "Checkpoint")
    assert simulated.held_bytes() == 0
    assert not list((simulated.folder / "leases").iterdir())
    call(simulated, subject, "Restore")
    assert simulated.held_bytes() == 64 * MIB


def test_a_parked_process_holds_nothing_but_its_pipes(simulated, subject):
    """So that CRIU can dump it; while it runs it has its lease open, as a real one has devices."""
    folder = Path(f"/proc/{subject.pid}/fd")
    subject.with_memory("plain", "virtual")
    call(simulated, subject, "Lock", "Checkpoint")
    assert sorted(int(each.name) for each in folder.iterdir()) == [0, 1, 2]
    maps = Path(f"/proc/{subject.pid}/maps").read_text()
    assert " rw-s " not in maps


def test_bytes_are_not_at_their_addresses_while_the_process_is_parked(simulated, subject):
    subject.tell("init")
    address = subject.tell("allocate", "plain", 4 * MIB, 0)

    def readable():
        with open(f"/proc/{subject.pid}/maps") as maps:
            areas = [(line.split()[0].split("-"), line.split()[1]) for line in maps]
        return any(int(start, 16) <= address < int(end, 16) and "r" in rights for (start, end), rights in areas)

    assert readable()
    call(simulated, subject, "Lock", "Checkpoint")
    assert not readable()
    call(simulated, subject, "Restore")
    assert readable()


def test_locking_waits_for_work_on_streams(simulated, subject):
    subject.with_memory()
    subject.tell("begin_kernel")
    program = """
        ok(cuda.cuInit(0))
        arguments = cuda.CUcheckpointLockArgs()
        arguments.timeoutMs = 100
        print(cuda.cuCheckpointProcessLock(int(sys.argv[1]), arguments)[0].name)
    """
    assert simulated.run(program, str(subject.pid)) == "CUDA_ERROR_NOT_READY"
    assert call(simulated, subject, "GetState") == ["CUDA_SUCCESS CU_PROCESS_STATE_RUNNING"]
    subject.tell("end_kernel")
    assert simulated.run(program, str(subject.pid)) == "CUDA_SUCCESS"


def test_a_mapping_must_name_every_gpu(simulated, subject):
    simulated.set(StubGpu(uuid_of(0)), StubGpu(uuid_of(1)))
    subject.with_memory()
    call(simulated, subject, "Lock", "Checkpoint")
    program = """
        ok(cuda.cuInit(0))
        pair = cuda.CUcheckpointGpuPair()
        pair.oldUuid = pair.newUuid = ok(cuda.cuDeviceGetUuid(0))
        arguments = cuda.CUcheckpointRestoreArgs()
        arguments.gpuPairs, arguments.gpuPairsCount = [pair], 1
        print(cuda.cuCheckpointProcessRestore(int(sys.argv[1]), arguments)[0].name)
    """
    assert simulated.run(program, str(subject.pid)) == "CUDA_ERROR_INVALID_VALUE"
    assert call(simulated, subject, "GetState") == ["CUDA_SUCCESS CU_PROCESS_STATE_CHECKPOINTED"]


def test_a_caller_that_was_killed_holds_up_no_other(simulated, subject):
    subject.with_memory()
    simulated.fault("cuCheckpointProcessLock 1 kill-caller when=after")
    with pytest.raises(AssertionError):  # the program that called was killed
        call(simulated, subject, "Lock")
    assert call(simulated, subject, "Unlock", "GetState")[-1] == "CUDA_SUCCESS CU_PROCESS_STATE_RUNNING"
