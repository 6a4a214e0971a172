"""A GPU process through real CRIU: parked, dumped, killed, restored in a fresh pid namespace, resumed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from adapter.gpu.wire import Answer, Operation, State
from adapter.snapshot.image import map_memory
from adapter.snapshot.process import dump, find_criu, open_memory, raise_process_ids
from tests.gpu.subject import MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.criu,
    pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="needs root, and unshare"),
]

REPOSITORY = Path(__file__).parents[2]
_LEAST_PROCESS_ID = 5000


class Pipes:
    """The four of a process that can be dumped, and our ends of the first two."""

    def __init__(self) -> None:
        pairs = [os.pipe() for _ in range(4)]
        self.theirs = [pairs[0][0], *(write for _, write in pairs[1:])]
        self._ours = [pairs[0][1], *(read for read, _ in pairs[1:])]
        self._answers = os.fdopen(self._ours[1], "r")

    def hand_over(self) -> None:
        for descriptor in self.theirs:
            os.close(descriptor)

    def tell(self, name, *arguments):
        os.write(self._ours[0], json.dumps([name, arguments]).encode() + b"\n")
        answer = json.loads(self._answers.readline() or '{"error": "the process ended"}')
        assert "error" not in answer, answer
        return answer["value"]

    def close(self) -> None:
        self._answers.close()
        for descriptor in (self._ours[0], *self._ours[2:]):
            os.close(descriptor)


def inherited(beyond):
    """Descriptors that whoever runs the tests left open for children: CRIU may not know where they lead."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            if int(name) >= beyond and os.get_inheritable(int(name)):
                yield int(name)


def start(machine, pipes):
    """`tests.gpu.program` with those pipes and nothing else open; its process id."""
    if os.getpid() < _LEAST_PROCESS_ID:
        raise_process_ids(_LEAST_PROCESS_ID)
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in pipes.theirs]
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "tests.gpu.program"],
        {**os.environ, **machine.environment, "PYTHONPATH": str(REPOSITORY)},
        file_actions=[
            *((os.POSIX_SPAWN_DUP2, source, theirs) for theirs, source in enumerate(sources)),
            *((os.POSIX_SPAWN_CLOSE, descriptor) for descriptor in inherited(beyond=len(sources))),
        ],
        setsid=True,
    )
    for descriptor in sources:
        os.close(descriptor)
    pipes.hand_over()
    return pid


def restore(wanted, environment):
    """The restorer, in a pid namespace of its own."""
    return subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-m", "tests.gpu.restorer",
         json.dumps(wanted)],
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(*wanted["descriptors"], *([wanted["memory"]] if wanted["memory"] >= 0 else [])),
        start_new_session=True,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_dumped_gpu_process_comes_back_with_the_same_bytes_at_the_same_addresses(
    tmp_path, machine, start_client, is_mapped
):
    criu = find_criu()
    helper, client = start_client(machine)
    images = tmp_path / "images"
    images.mkdir()
    pipes = Pipes()
    pid = start(machine, pipes)
    try:
        pipes.tell("init")
        pipes.tell("allocate", "plain", 4 * MIB, 1)
        pipes.tell("allocate", "virtual", 4 * MIB, 2)
        pidfd = os.pidfd_open(pid)
        parked = client.ask(Operation.PARK, pidfd)
        os.close(pidfd)
        assert parked.error is None
        names = dump(criu, pid, images)
    finally:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    pipes.close()
    if is_mapped:
        map_memory(images, pid)
    memory = open_memory(images)
    assert (memory >= 0) == is_mapped

    pipes = Pipes()
    wanted = {"images": str(images), "criu": criu.path, "pipes": names, "pid": pid, "helper": helper.path,
              "log": str(tmp_path / "restore.log"), "descriptors": pipes.theirs, "memory": memory}  # fmt: skip
    restorer = restore(wanted, machine.environment)
    pipes.hand_over()
    try:
        assert restorer.stdout is not None
        answers = [Answer.from_message(restorer.stdout.readline().encode()) for _ in range(4)]
        assert [answer.error for answer in answers] == [None] * 4
        assert [answer.reached for answer in answers] == [
            State.CHECKPOINTED, State.RUNNING, State.CHECKPOINTED, State.RUNNING,
        ]  # fmt: skip
        assert pipes.tell("check")
        pipes.tell("allocate", "plain", 4 * MIB, 3)
        assert pipes.tell("check")
    finally:
        restorer.kill()
        restorer.communicate()
        pipes.close()
        if memory >= 0:
            os.close(memory)
