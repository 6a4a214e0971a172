"""Machines of a cluster, which are Linux namespaces, so that the end of one process is the end of everything.

Each has its own network (links, addresses, routes, nftables, every port) and its own mounts; all of a cluster share one
PID namespace. Its process 1 dies with the process that made it, however that dies; the kernel then ends all others and
takes mounts, links and rules away.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Nothing of the user's shell reaches a component: no proxies, no KUBECONFIG.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
}

# Whom a namespace's process 1 adopts needs no reaping where SIGCHLD is ignored, and `exec` keeps that.
HOLD = "mount --make-rshared / && ip link set lo up && trap '' CHLD && echo up && exec sleep infinity"


class TestbedFailed(Exception):
    """The testbed could not do what was asked of it. The message ends with what the component said last."""

    __test__ = False  # no class of tests


def wait_until(what: str, probe: Callable[[], object], timeout_s: float, watched: Sequence[Component] = ()) -> None:
    """Returns when `probe` says something true. Raises `TestbedFailed`, at once where a `watched` component ended."""
    began = time.monotonic()
    while not probe():
        for component in watched:
            if not component.is_running:
                raise TestbedFailed(f"{component.name} ended while waiting for {what}:\n{component.tail()}")
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            said = "\n".join(f"--- {component.name}\n{component.tail()}" for component in watched)
            raise TestbedFailed(f"no {what} after {timeout_s:.0f} s\n{said}")
        time.sleep(min(1.0, 0.1 + waited_s / 10))  # to look is work too


def run(*words: str, stdin: bytes | None = None, env: Mapping[str, str] = ENVIRONMENT, timeout_s: float = 120) -> str:
    """What a command printed. Raises `TestbedFailed` with its errors."""
    ended = subprocess.run(words, input=stdin, capture_output=True, env=dict(env), timeout=timeout_s)
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip() or ended.stdout.decode(errors="replace").strip()
        raise TestbedFailed(f"{' '.join(words)[:300]}: {said[-2000:]}")
    return ended.stdout.decode()


class Machine:
    """A computer of the cluster, as far as programs can tell. `name` is for people."""

    def __init__(self, name: str, holder: subprocess.Popen[str]) -> None:
        self.name = name
        self._holder = holder
        assert holder.stdout is not None
        if holder.stdout.readline() != "up\n":
            raise TestbedFailed(f"no namespaces for {name}: {holder.communicate()[1]}")
        self.pid = _only_child(holder.pid)
        """Of the process that holds its namespaces, as this computer counts."""

    @classmethod
    def first(cls, name: str) -> Machine:
        """The one whose process 1 is the cluster's: everything ends with it."""
        death = ["setpriv", "--pdeathsig", "KILL", "--"]
        apart = ["unshare", "--pid", "--net", "--mount", "--propagation", "private", "--fork", "--kill-child=KILL"]
        return cls(name, _hold([*death, *apart, "--mount-proc", "--"], HOLD))

    def another(self, name: str, mounts: Mapping[Path, str]) -> Machine:
        """One more, which has the folders and files of `mounts` at these other places too."""
        script = [f"mount --bind {outside} {inside}" for outside, inside in mounts.items()]
        apart = ["unshare", "--net", "--mount", "--propagation", "private", "--fork", "--"]
        return Machine(name, _hold([*self.words(), *apart], " && ".join([*script, HOLD])))

    def words(self) -> list[str]:
        """What to put before a command, so that it runs there."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--"]

    def run(self, *command: str, stdin: bytes | None = None, timeout_s: float = 120) -> str:
        """What a command printed that ran there. Raises `TestbedFailed`."""
        return run(*self.words(), *command, stdin=stdin, timeout_s=timeout_s)

    def script(self, *lines: str) -> None:
        """Runs shell lines there, the first failure being the last."""
        self.run("sh", "-ec", "\n".join(lines))

    def end(self) -> None:
        """Kills its holder; with the first machine's, everything on all of them."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._holder.wait()
        for stream in (self._holder.stdout, self._holder.stderr):
            if stream is not None:
                stream.close()


class Component:
    """A program that runs on a machine, can be killed and started again, and whose output is in `log`."""

    def __init__(
        self,
        name: str,
        machine: Machine,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] = {},
    ) -> None:
        self.name, self.machine, self.log = name, machine, log
        self._command, self._environment = list(command), {**ENVIRONMENT, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Component:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*self.machine.words(), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for us
            )
        return self

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """To the program itself; SIGSTOP makes it hang, SIGCONT ends that."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(_only_child(self._process.pid), number)
        if number == signal.SIGCONT:  # nsenter stops itself when what it waits for was stopped
            self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 30) -> None:
        """Ends it, gently or, with SIGKILL, not; returns when it has ended. One that was stopped goes on for it."""
        assert self._process is not None
        if self.is_running:
            self.send(number)
            self.send(signal.SIGCONT)
        self._process.wait(timeout_s)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def forget(self) -> None:
        """After its machine's end."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.wait()

    def tail(self, lines: int = 15) -> str:
        """What it said last."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


def _hold(words: Sequence[str], script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*words, "sh", "-ec", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def _only_child(pid: int) -> int:
    """Of nsenter and unshare, which wait for the one process that they made; of what they made in turn, the last."""
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if len(children) != 1 or Path(f"/proc/{pid}/comm").read_text().strip() not in {"nsenter", "unshare"}:
            return pid
        pid = int(children[0])
