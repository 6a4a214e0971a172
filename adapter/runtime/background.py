"""The snapshotter beside a serving replica: one process, once in the replica's life."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from adapter.runtime.launch import python_path
from adapter.runtime.loop import Loop

NO_NEWS = {"reason": "", "key": "", "bytes": 0, "seconds": 0}
"""Fields of a snapshot event that has nothing to say about them."""


class Background:
    """`adapter.runtime.snapshotter` as a child of ours. `pid` is 0 while none runs.

    `on_gone` is called in the loop once nothing is left of what was killed.
    """

    def __init__(self, loop: Loop, on_gone: Callable[[], object]) -> None:
        self.pid = 0
        self.tried = False
        self._loop = loop
        self._on_gone = on_gone
        self._output_fd = -1
        self._dying: set[int] = set()

    @property
    def is_gone(self) -> bool:
        """Whether none runs and nothing is left of one that was killed: until then it may hold a GPU's memory."""
        return not self.pid and not self._dying

    def start(self, environ: Mapping[str, str]) -> None:
        """Raises `OSError`."""
        self.tried = True
        self._output_fd, output_w = os.pipe()
        try:
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-m", "adapter.runtime.snapshotter"],
                {**environ, "PYTHONPATH": python_path(environ)},
                file_actions=[(os.POSIX_SPAWN_DUP2, output_w, 1)],
            )
        except OSError:
            os.close(self._output_fd)
            raise
        finally:
            os.close(output_w)

    def ended(self) -> dict[str, Any]:
        """What it said, once it was reaped: the fields of a snapshot event."""
        self.pid = 0
        with os.fdopen(self._output_fd, "rb") as output:
            said = output.read()
        try:
            result = json.loads(said.splitlines()[-1])
        except (ValueError, IndexError):
            result = {"state": "failed", "code": "snapshotter-died", "reason": "It ended without a word."}
        return {**NO_NEWS, **result}

    def kill(self) -> None:
        """It and the process that it warms up, which may hold a GPU's memory until it is gone, and dies later."""
        for pid in _with_children(self.pid) if self.pid and not self._dying else ():
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                self._dying.add(pidfd)
                self._loop.watch(pidfd, partial(self._one_gone, pidfd))
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _one_gone(self, pidfd: int) -> None:
        self._loop.forget(pidfd)
        os.close(pidfd)
        self._dying.discard(pidfd)
        if self.is_gone:
            self._on_gone()


def _with_children(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return [pid]
    return [pid, *(below for child in children for below in _with_children(int(child)))]
