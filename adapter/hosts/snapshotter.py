"""Runs the snapshotter of a function (``python -m adapter.runtime.snapshotter``) without a replica beside it.

A snapshot is taken where it will be restored: as a descendant of the first process of a process-id
namespace. Whatever ends us ends the namespace, so that no build outlives who asked for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from adapter.errors import AdapterError, Conflict, SnapshotError, Unavailable
from adapter.hosts.shell import Isolation


async def take_snapshot(
    isolation: Isolation, environment: Mapping[str, str], echo: TextIO | None = None
) -> dict[str, Any]:
    """Its result: ``{"key", "bytes", "copied_bytes", "seconds"}``. `echo` gets what the function prints.

    Raises `SnapshotError` with the snapshotter's reason, `Conflict` where someone else takes the same
    snapshot, `Unavailable` where there are no namespaces.
    """
    if not isolation.wrapper:
        raise Unavailable(
            "No process snapshot can be taken here.",
            why=f"There are no process-id namespaces: {isolation.why_not}.",
            hint="See what is missing with: gpufn doctor",
            code="no-namespaces",
        )
    process = await asyncio.create_subprocess_exec(
        *_tied_to_us(),
        *isolation.wrapper,
        sys.executable,
        "-m",
        "adapter.runtime.snapshotter",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(environment),
        cwd="/",
        start_new_session=True,
    )
    try:
        said, _ = await asyncio.gather(_stdout(process), _pass_on(process, echo))
        code = await process.wait()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return result_of(said, code)


def _tied_to_us() -> list[str]:
    """A command prefix with which a process ends when we do, however we do, where util-linux has it."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


async def _stdout(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.read()


async def _pass_on(process: asyncio.subprocess.Process, echo: TextIO | None) -> None:
    assert process.stderr is not None
    while data := await process.stderr.read(65536):
        if echo is not None:
            echo.write(data.decode(errors="replace"))
            echo.flush()


def result_of(said: bytes, code: int) -> dict[str, Any]:
    """What a snapshotter that ended with `code` said. Raises `SnapshotError`, `Conflict`."""
    try:
        result = dict(json.loads(said.splitlines()[-1]))
        if result.pop("state") == "published":
            return result
    except (ValueError, IndexError, KeyError, TypeError):
        result = {"code": "snapshotter-died", "reason": f"The snapshotter ended with code {code}, without a word."}
    slug = str(result.get("code", "snapshot-failed"))
    kind: type[AdapterError] = Conflict if slug == "snapshot-busy" else SnapshotError
    raise kind(
        "The snapshot was not taken.", why=str(result.get("reason", "")), hint=_HINTS.get(slug, _HINT), code=slug
    )


_HINT = "What the function printed stands above."
_HINTS = {
    "snapshot-busy": "Wait for it: gpufn snapshot list",
    "criu-missing": "See what was tried with: gpufn doctor",
    "snapshot-corrupt": "Remove what is damaged with: gpufn snapshot prune -A",
    "os-error": "Make room, or see: gpufn doctor",
}
