"""A GPU process under test, from outside, and the machine it is on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

MIB = 1 << 20


class Machine(Protocol):
    """Where the contract is kept: a simulated one (tests.stubs.simulated), or this one."""

    is_real: bool
    environment: dict[str, str]


class ThisMachine:
    """With a real GPU."""

    is_real = True
    environment: dict[str, str] = {}


class Failed(Exception):
    """A call of the driver in the subject failed; its text is the name of the result."""


class Subject:
    """`tests.gpu.program` in a process group of its own."""

    def __init__(self, machine: Machine, environ: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.program"],
            env={**os.environ, **machine.environment, **(environ or {})},
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def tell(self, name: str, *arguments: object) -> Any:
        self.begin(name, *arguments)
        return self.answer()

    def begin(self, name: str, *arguments: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, arguments]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the subject ended"
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["value"]

    def with_memory(self, *kinds: str) -> Subject:
        """Initialised, and with 4 MiB of each kind of device memory, a pattern in it."""
        self.tell("init")
        for seed, kind in enumerate(kinds or ("plain",)):
            self.tell("allocate", kind, 4 * MIB, seed)
        return self

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.communicate()
        with suppress(OSError):
            os.close(self.pidfd)
