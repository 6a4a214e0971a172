"""Parking and resuming through the helper process."""

import itertools
import os
import select
import signal
import socket
import tempfile
from pathlib import Path

import pytest

from adapter.errors import GpuError
from adapter.gpu.client import HelperClient
from adapter.gpu.wire import Operation, State, receive
from tests.gpu.subject import MIB

pytestmark = pytest.mark.gpu


def names(answer):
    return [step.name for step in answer.steps]


def test_park_and_resume_keep_bytes_and_addresses(machine, start_subject, client):
    subject = start_subject(machine).with_memory("plain", "virtual")
    for _ in range(3):
        parked = client.ask(Operation.PARK, subject.pidfd, size_bytes=8 * MIB)
        assert (parked.error, parked.found, parked.reached) == (None, State.RUNNING, State.CHECKPOINTED)
        assert names(parked) == ["lock", "checkpoint"]
        resumed = client.ask(Operation.RESUME, subject.pidfd, size_bytes=8 * MIB)
        assert (resumed.error, resumed.found, resumed.reached) == (None, State.CHECKPOINTED, State.RUNNING)
        assert names(resumed) == ["restore", "unlock"]
        assert subject.tell("check")


def test_steps_follow_one_another_in_time(subject, client):
    first, second = client.ask(Operation.PARK, subject.pidfd).steps
    assert first.started_ns <= first.ended_ns <= second.started_ns <= second.ended_ns


def test_what_is_done_already_is_not_done_again(subject, client):
    assert client.ask(Operation.RESUME, subject.pidfd).steps == ()
    assert client.ask(Operation.UNLOCK, subject.pidfd).steps == ()
    client.ask(Operation.PARK, subject.pidfd)
    again = client.ask(Operation.PARK, subject.pidfd)
    assert (again.error, again.found, again.reached, again.steps) == (None, State.CHECKPOINTED, State.CHECKPOINTED, ())


def test_state_is_told_and_nothing_done(subject, client):
    answer = client.ask(Operation.STATE, subject.pidfd)
    assert (answer.error, answer.found, answer.reached, answer.steps) == (None, State.RUNNING, State.RUNNING, ())


def test_a_parked_process_cannot_be_unlocked_and_stays_parked(subject, client):
    client.ask(Operation.PARK, subject.pidfd)
    answer = client.ask(Operation.UNLOCK, subject.pidfd)
    assert answer.error is not None
    assert answer.error.code == "gpu-wrong-state"
    assert not answer.committed
    assert client.ask(Operation.RESUME, subject.pidfd).reached is State.RUNNING
    assert subject.tell("check")


def test_gpu_work_that_does_not_end_makes_the_park_give_up_and_the_process_go_on(subject, client):
    subject.tell("begin_kernel")
    answer = client.ask(Operation.PARK, subject.pidfd, lock_timeout_s=0.3)
    assert answer.error is not None
    assert (answer.error.code, answer.reached, answer.committed) == ("gpu-lock-timeout", State.RUNNING, False)
    subject.tell("end_kernel")
    assert client.ask(Operation.PARK, subject.pidfd).error is None
    assert client.ask(Operation.RESUME, subject.pidfd).error is None
    assert subject.tell("check")


def test_two_processes_are_parked_at_once(machine, start_subject, client):
    subjects = [start_subject(machine).with_memory() for _ in range(2)]
    wanted = {client.send(Operation.PARK, subject.pidfd) for subject in subjects}
    answers = {}
    while set(answers) != wanted:
        select.select([client], [], [], 60)
        if (answer := client.receive()) is not None:
            answers[answer.number] = answer
    assert all(answer.reached is State.CHECKPOINTED for answer in answers.values())
    for subject in subjects:
        assert client.ask(Operation.RESUME, subject.pidfd).error is None
        assert subject.tell("check")


def test_requests_for_one_process_take_turns(subject, client):
    operations = [Operation.PARK, Operation.RESUME] * 4
    for operation in operations:
        client.send(operation, subject.pidfd)
    answers = []
    while len(answers) < len(operations):
        select.select([client], [], [], 60)
        if (answer := client.receive()) is not None:
            answers.append(answer)
    assert [answer.error for answer in answers] == [None] * len(operations)
    client.ask(Operation.RESUME, subject.pidfd)
    assert subject.tell("check")


def test_a_process_that_never_used_cuda_is_left_alone(machine, start_subject, client):
    subject = start_subject(machine)
    answer = client.ask(Operation.PARK, subject.pidfd)
    assert answer.error is not None
    assert (answer.error.code, answer.committed, answer.steps) == ("gpu-no-cuda-process", False, ())
    assert subject.tell("resident_bytes") > 0


def test_the_pidfd_of_an_ended_process_means_no_other(subject, client):
    os.killpg(subject.pid, signal.SIGKILL)
    os.waitpid(subject.pid, 0)
    answer = client.ask(Operation.PARK, subject.pidfd)
    assert answer.error is not None
    assert (answer.error.code, answer.steps) == ("gpu-target-ended", ())


def test_a_descriptor_that_is_no_pidfd_is_refused(client):
    with open(os.devnull) as file:
        answer = client.ask(Operation.PARK, file.fileno())
    assert answer.error is not None
    assert answer.error.code == "gpu-no-target"


def test_the_socket_is_for_its_user_only(machine, start_client):
    helper, _ = start_client(machine)
    assert os.stat(helper.path).st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_another_user_is_not_answered_even_where_the_socket_is_open_to_all(tmp_path, machine, start_client, subject):
    helper, _ = start_client(machine)
    os.chmod(helper.path, 0o777)
    for folder in itertools.takewhile(
        lambda folder: folder != Path(tempfile.gettempdir()), (tmp_path, *tmp_path.parents)
    ):
        os.chmod(folder, 0o711)
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            with HelperClient.connect(helper.path) as other:
                other.ask(Operation.STATE, subject.pidfd, limit_s=30)
        except GpuError as error:
            os._exit(0 if error.code == "helper-died" else 2)
        finally:  # a child must not go on as a test
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    "nonsense", [b"{", b"[]", b'{"number": 1}', b"x" * 100_000, b'{"number": "1", "operation": "park"}']
)
def test_nonsense_ends_the_connection_and_nothing_else(machine, start_client, subject, nonsense):
    helper, client = start_client(machine)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(helper.path)
        sock.send(nonsense)
        assert select.select([sock], [], [], 60)[0]
        assert receive(sock) == (b"", None)
    assert client.ask(Operation.STATE, subject.pidfd).reached is State.RUNNING


def test_the_helper_ends_with_its_owner(machine, start_client):
    helper, _ = start_client(machine)
    pidfd = os.pidfd_open(helper.pid)
    try:
        os.close(helper._owner_fd)
        helper._owner_fd = -1
        assert select.select([pidfd], [], [], 60)[0]
    finally:
        os.close(pidfd)
        helper.kill()


def test_a_helper_that_was_killed_is_said_to_have_died(machine, start_client, subject):
    helper, client = start_client(machine)
    client.ask(Operation.STATE, subject.pidfd)
    helper.kill()
    with pytest.raises(GpuError) as died:
        client.ask(Operation.STATE, subject.pidfd)
    assert died.value.code == "helper-died"
    with pytest.raises(GpuError) as nobody:
        helper.connect()
    assert nobody.value.code == "helper-died"


def test_a_stopped_process_is_given_up_on_in_time(subject, client):
    subject.signal(signal.SIGSTOP)
    with pytest.raises(GpuError) as late:
        client.ask(Operation.PARK, subject.pidfd, limit_s=1.0)
    assert late.value.code == "helper-timeout"


def test_one_that_hangs_stops_no_other(machine, start_subject, subject, client):
    other = start_subject(machine).with_memory()
    subject.signal(signal.SIGSTOP)
    client.send(Operation.PARK, subject.pidfd)
    answer = client.ask(Operation.PARK, other.pidfd)
    assert (answer.error, answer.reached) == (None, State.CHECKPOINTED)
