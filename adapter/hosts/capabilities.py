"""What works on this machine's GPUs, as a child process finds out (``python -m adapter.gpu.capabilities FOLDER``).

It parks and resumes processes of its own, once for a driver, and keeps the verdicts in FOLDER for the next time.
A child, because the control side never loads a GPU's libraries. Replicas read its answer from a file before they
are parked; `gpufn doctor` shows it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from adapter.files import write_whole
from adapter.replica import shim_path

logger = logging.getLogger(__name__)

_LIMIT_S = 600.0
"""Some seconds where the driver does not hang; each of its features has a time limit of its own."""

_END_S = 10.0


def try_gpus(folder: Path) -> str:
    """The child's answer: one JSON object, of verdicts or with an ``error``; empty where it has died.

    Blocks. Raises `OSError`, `subprocess.TimeoutExpired`.
    """
    done = subprocess.run(
        _command(folder),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=_LIMIT_S,
        check=False,
        cwd="/",
        env=_environment(),
    )
    return done.stdout


class Trial:
    """The same beside whatever else goes on, with the verdicts in the file `path` once they are there.

    Make it inside a running event loop; `close` it, done or not. Raises `OSError`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / "capabilities.json"
        self.path.unlink(missing_ok=True)  # of another driver, perhaps
        self._task = asyncio.get_running_loop().create_task(self._run(folder))

    async def _run(self, folder: Path) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                *_command(folder),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                env=_environment(),
                cwd="/",
                start_new_session=True,
            )
        except OSError as exc:
            logger.warning("what works on the GPUs is not tried", extra={"fields": {"reason": str(exc)}})
            return
        try:
            said, _ = await process.communicate()
        finally:
            await _end(process)
        logger.info("what works on the GPUs", extra={"fields": {"said": said.decode(errors="replace").strip()}})
        if process.returncode == 0:
            write_whole(self.path, said)

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


async def _end(process: asyncio.subprocess.Process) -> None:
    """Asked first, so that it ends what it has started."""
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _END_S)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "adapter.gpu.capabilities", str(folder)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": shim_path()}
