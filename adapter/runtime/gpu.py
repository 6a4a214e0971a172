"""A replica's GPU: its helper, and what is asked of it while the entrypoint's loop goes on.

The helper is the machine's where a host runs one (it is initialised long before it is needed), else the
replica's own, started here when it is first needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapter.errors import GpuError
from adapter.gpu.client import HelperClient, HelperProcess, start_helper, time_limit_s, timed_out
from adapter.gpu.wire import Answer, Operation
from adapter.replica import base_environment
from adapter.runtime.launch import python_path
from adapter.runtime.loop import Loop

if TYPE_CHECKING:
    from adapter.gpu.capabilities import Verdict

Then = Callable[[Answer], object]


@dataclass(frozen=True, slots=True)
class _Asked:
    operation: Operation
    pid: int
    then: Then
    mapping: Mapping[str, str]
    may_ask_again: bool = True
    """A helper that died is followed by another, which finds out how far the first one came."""


class Gpu:
    """What is `asked` of the helper at `path` (empty: of one of our own) is answered in the loop, always."""

    def __init__(self, loop: Loop, path: str, runtime_dir: Path, environ: Mapping[str, str]) -> None:
        self.path = path or str(runtime_dir / "gpu")
        self._is_ours = not path
        self._loop = loop
        self._environ = environ
        self._helper: HelperProcess | None = None
        self._client: HelperClient | None = None
        self._waiting: dict[int, _Asked] = {}
        self._overcome: list[GpuError] = []

    def prepare(self) -> None:
        """Have a helper that initialises the driver while the model loads."""
        if self._is_ours and self._helper is None:
            environment = {**base_environment(self._environ), "PYTHONPATH": python_path(self._environ)}
            with suppress(OSError):  # said when it is asked
                self._helper = start_helper(self.path, environ=environment)

    def take_overcome(self) -> list[GpuError]:
        """What went wrong and was put right since this was asked last."""
        overcome, self._overcome = self._overcome, []
        return overcome

    def ask(self, operation: Operation, pid: int, then: Then, *, mapping: Mapping[str, str] | None = None) -> None:
        """Call `then` with the answer. No word in time, or none ever, is an answer whose error is `committed`."""
        self._ask(_Asked(operation, pid, then, dict(mapping or {})))

    def _ask(self, asked: _Asked) -> None:
        try:
            number = self._send(asked)
        except (GpuError, OSError) as exc:
            error = exc if isinstance(exc, GpuError) else _gone(exc)
            self._unanswered(asked, error, committed=False)
            return
        limit_s = time_limit_s(asked.operation)
        self._waiting[number] = asked
        self._loop.after(limit_s, lambda: self._late(number, asked, timed_out(asked.operation, limit_s)))

    def _unanswered(self, asked: _Asked, error: GpuError, *, committed: bool) -> None:
        if asked.may_ask_again and error.code == "helper-died":
            self._overcome.append(error)
            self._loop.after(0, lambda: self._ask(replace(asked, may_ask_again=False)))
        else:
            self._loop.after(0, lambda: asked.then(Answer(0, error=error, committed=committed)))

    def _send(self, asked: _Asked) -> int:
        if self._client is None:
            self.prepare()
            try:
                self._client = HelperClient.connect(self.path)
            except GpuError:
                self._disconnect()
                raise
            self._loop.watch(self._client.fileno(), self._hear)
        pidfd = os.pidfd_open(asked.pid)
        try:
            return self._client.send(asked.operation, pidfd, mapping=asked.mapping)
        except GpuError:
            self._disconnect()
            raise
        finally:
            os.close(pidfd)

    def _hear(self) -> None:
        assert self._client is not None
        try:
            answer = self._client.receive()
        except GpuError as error:
            self._disconnect()
            waiting, self._waiting = self._waiting, {}
            for asked in waiting.values():
                self._unanswered(asked, error, committed=True)
            return
        if answer is not None and answer.number in self._waiting:
            self._waiting.pop(answer.number).then(answer)

    def _late(self, number: int, asked: _Asked, error: GpuError) -> None:
        if self._waiting.get(number) is asked:  # each connection counts anew
            del self._waiting[number]
            self._disconnect()
            self._unanswered(asked, error, committed=True)

    def _disconnect(self) -> None:
        """The next request finds a helper anew: one of our own that hangs is replaced."""
        if self._client is not None:
            self._loop.forget(self._client.fileno())
            self._client.close()
            self._client = None
        if self._helper is not None:
            self._helper.close()
            self._helper = None
            with suppress(FileNotFoundError):
                os.unlink(self.path)

    def close(self) -> None:
        self._waiting.clear()
        self._disconnect()


def why_not_park(capabilities: str, *, keeps_addresses: bool = False) -> GpuError | None:
    """What the file of that path, as `adapter.gpu.capabilities` makes it, says against parking.

    None where it says nothing against it, and where it is not there (yet): then it is tried. `keeps_addresses`:
    the process has weights in reserved addresses, which it got before that was found not to work.
    """
    for feature in ("plain", "virtual") if keeps_addresses else ("plain",):
        verdict = _verdict(capabilities, feature)
        if verdict is not None and verdict.works is False:
            return GpuError(
                "The process cannot be parked on this machine's GPUs.",
                why=verdict.reason,
                hint=verdict.hint,
                code=verdict.code,
            )
    return None


def keeps_addresses(capabilities: str) -> bool:
    """Whether weights may lie in reserved addresses: unless that file says that such memory cannot be parked."""
    verdict = _verdict(capabilities, "virtual")
    return verdict is None or verdict.works is not False


def _verdict(capabilities: str, feature: str) -> Verdict | None:
    from adapter.gpu.capabilities import Capabilities, Feature  # late: nobody needs it to start

    try:
        return Capabilities.from_json(Path(capabilities).read_text(encoding="utf-8")).verdicts[Feature(feature)]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def visible_device(environ: Mapping[str, str]) -> str:
    """The UUID of the one GPU that a replica was given; empty where none is named that way.

    A host of ours names it to CUDA, a kubelet's device plugin to the container runtime.
    """
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        first, *others = environ.get(name, "").split(",")
        if first.startswith("GPU-") and not others:
            return first
    return ""


def _gone(exc: OSError) -> GpuError:
    return GpuError(
        "The process or the GPU helper is gone.",
        why=f"{exc.strerror}.",
        hint="See the function's log.",
        code="gpu-no-target",
    )
