"""The snapshotter beside a serving replica: one process, once in the replica's life."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapter.runtime.launch import python_path

NO_NEWS = {"reason": "", "key": "", "bytes": 0, "seconds": 0}
"""Fields of a snapshot event that has nothing to say about them."""


class Background:
    """`adapter.runtime.snapshotter` as a child of ours. `pid` is 0 while none runs."""

    def __init__(self) -> None:
        self.pid = 0
        self.tried = False
        self._output_fd = -1

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
        """It and the process that it warms up, which may hold a GPU's memory."""
        for pid in _with_children(self.pid) if self.pid else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _with_children(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return [pid]
    return [pid, *(below for child in children for below in _with_children(int(child)))]
