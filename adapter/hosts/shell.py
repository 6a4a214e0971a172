"""One entrypoint process, from before it knows its function until nothing of it is left.

A shell is started ahead of need and waits for its orders (`adapter.replica.STANDBY_VARIABLE`). Where the
kernel allows it, it is the first process of a process-id namespace, whose end ends everything inside; and
of a mount namespace, in which the secrets of its function lie where OpenFaaS handlers look for them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapter.keys import SECRETS_PATH
from adapter.replica import STANDBY_VARIABLE, base_environment

logger = logging.getLogger(__name__)

_NAMESPACES = ("--pid", "--fork", "--kill-child", "--mount", "--mount-proc")
_WITH_SECRETS = ("sh", "-c", 'mount --bind "$1" "$2"; shift 2; exec "$@"', "sh")
_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Isolation:
    """How replicas are kept apart here. `wrapper` goes before a command; empty: nothing works."""

    wrapper: tuple[str, ...] = ()
    shows_secrets: bool = False
    """Secrets can be shown at `SECRETS_PATH`, to one replica only."""
    why_not: str = ""
    """Why there are no namespaces, in the words of `unshare`."""

    @classmethod
    def find(cls) -> Isolation:
        """The best that works, found by trying: as we are, then in a user namespace of our own."""
        said = ""
        for user in ((), ("--user", "--map-current-user")):
            wrapper = ("unshare", *user, *_NAMESPACES)
            failure = _failure([*wrapper, "true"])
            if failure is None:
                return cls(wrapper, not user and _can_show_secrets(wrapper))
            said = said or failure
        return cls(why_not=said)

    def command(self, command: list[str], shown: Path) -> list[str]:
        if self.shows_secrets:
            return [*self.wrapper, *_WITH_SECRETS, str(shown), SECRETS_PATH, *command]
        return [*self.wrapper, *command]


def _failure(command: list[str]) -> str | None:
    """What a command says when it fails; None when it succeeds."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    return None if done.returncode == 0 else done.stderr.strip() or f"code {done.returncode}"


def _can_show_secrets(wrapper: tuple[str, ...]) -> bool:
    with suppress(OSError):
        os.makedirs(SECRETS_PATH, mode=0o755, exist_ok=True)  # the mount needs a place; nothing is ever put there
    return _failure([*wrapper, "mount", "--bind", "/", SECRETS_PATH]) is None


class Shell:
    """An entrypoint: its process, its private folder `home`, its output, its events, and the line to it."""

    def __init__(self, isolation: Isolation, shim: Path, home: Path) -> None:
        self.home = home
        self._isolation = isolation
        home.mkdir(mode=0o700, parents=True)
        self.shown = home / "shown"
        self.shown.mkdir(mode=0o700)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        events_r, events_w = os.pipe()
        output_r, output_w = os.pipe()
        environment = {
            **base_environment(os.environ),
            "PYTHONPATH": str(shim),
            STANDBY_VARIABLE: f"{theirs.fileno()} {events_w}",
        }
        self.line, self.events_fd, self.output_fd = ours, events_r, output_r
        self._pidfd = -1
        try:
            self._process = subprocess.Popen(
                isolation.command([sys.executable, "-m", "adapter.runtime"], self.shown),
                stdin=subprocess.DEVNULL,
                stdout=output_w,
                stderr=output_w,
                env=environment,
                pass_fds=(theirs.fileno(), events_w),
                start_new_session=True,
                cwd="/",
            )
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:
            self._close_descriptors()
            shutil.rmtree(home, ignore_errors=True)
            raise
        finally:
            theirs.close()
            os.close(events_w)
            os.close(output_w)
        for descriptor in (events_r, output_r):
            os.set_blocking(descriptor, False)
        (home / "pid").write_text(json.dumps([self.pid, started_at(self.pid)]))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_fd(self) -> int:
        """Readable once the process has ended."""
        return self._pidfd

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def give_orders(self, environment: Mapping[str, str], listener: socket.socket) -> None:
        """Raises `OSError` where it has died."""
        socket.send_fds(self.line, [json.dumps(dict(environment)).encode() + b"\n"], [listener.fileno()])

    def say(self, command: bytes) -> None:
        with suppress(OSError):  # it is gone, or too stuck to listen: its end is noticed elsewhere
            self.line.send(command, socket.MSG_DONTWAIT)

    def kill(self) -> None:
        """End it and what it started, at once.

        In a namespace the end of its first process is the end of all. Without one, processes of other
        sessions are found by the replica's output, which they hold.
        """
        if self._process.returncode is None:  # not reaped: the process id is still its own
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        if not self._isolation.wrapper:
            for pid in _holders(self.output_fd):
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> int:
        """Kill, reap and forget; returns the exit code as `subprocess` gives it."""
        self.kill()
        code = self._process.wait()
        self._close_descriptors()
        shutil.rmtree(self.home, ignore_errors=True)
        return code

    def _close_descriptors(self) -> None:
        self.line.close()
        for descriptor in (self.events_fd, self.output_fd, self._pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        self.events_fd = self.output_fd = self._pidfd = -1


def _holders(pipe_fd: int) -> list[int]:
    """Other processes that hold either end of a pipe."""
    wanted = os.readlink(f"/proc/self/fd/{pipe_fd}") if pipe_fd >= 0 else ""
    if not re.fullmatch(r"pipe:\[\d+\]", wanted):
        return []
    everybody = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in everybody if pid != os.getpid() and wanted in _open_files(pid)]


def _open_files(pid: int) -> set[str]:
    targets = set()
    with suppress(OSError):  # ended meanwhile, or another user's
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                targets.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return targets


def started_at(pid: int) -> str:
    """When a process started, in the kernel's ticks: with it a process id names one process only.

    Raises `OSError` where there is no such process.
    """
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def end_leftovers(folder: Path) -> None:
    """Kill what a host that was killed may have left, before its replicas noticed; remove their folders."""
    for home in folder.glob("*"):
        with suppress(OSError, ValueError, TypeError):
            pid, began = json.loads((home / "pid").read_text())
            if started_at(pid) == began:
                os.killpg(pid, signal.SIGKILL)
                logger.warning("killed a replica that a former gpufn left", extra={"fields": {"pid": pid}})
        shutil.rmtree(home, ignore_errors=True)
