"""The snapshotter as its entrypoint has it: it is gone when all that it started is, not before."""

import os
import signal
import subprocess
import sys

from adapter.runtime.background import Background
from adapter.runtime.loop import Loop

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
child.wait()
"""


def test_it_is_gone_when_the_last_process_that_was_killed_is(monkeypatch):
    loop, gone = Loop(), []
    background = Background(loop, lambda: gone.append(True))
    assert background.is_gone
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        background.pid = parent.pid
        child = int(parent.stdout.readline())
        child_fd = os.pidfd_open(child)
        late, send = [], signal.pidfd_send_signal
        monkeypatch.setattr(  # as a process with much memory does, the child dies long after its parent
            signal, "pidfd_send_signal", lambda fd, number: late.append(fd) if target(fd) == child else send(fd, number)
        )
        background.kill()
        background.kill()  # another request: nothing to do
        assert len(late) == 1
        parent.wait()
        loop.turn()
        background.pid = 0  # it was reaped
        assert not background.is_gone
        send(child_fd, signal.SIGKILL)
        while not background.is_gone:
            loop.turn()
        assert gone == [True]
        os.close(child_fd)


def target(pidfd):
    with open(f"/proc/self/fdinfo/{pidfd}") as facts:
        return next(int(line.split()[1]) for line in facts if line.startswith("Pid:"))
