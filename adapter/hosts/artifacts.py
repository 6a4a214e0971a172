"""Snapshots that lie beside an image in its registry, fetched before its first replica starts.

By ``gpufn snapshot pull``, in a process of its own: whoever runs replicas imports neither snapshots nor HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_LIMIT_S = 60.0
"""A deployment waits no longer; what has come by then is not fetched again."""
_NOT_FOUND = 4
"""Exit code of `NotFound`: the image has none, the common case."""


async def fetch_snapshots(image: str, folder: Path, function: str, tenant: str, *, limit_s: float = _LIMIT_S) -> int:
    """Bring what fits this machine into the store in `folder`; returns how many snapshots there are now of it.

    `image` names a registry and a digest. Never raises: without a snapshot a function loads, and the log says why.
    """
    words = ["snapshot", "pull", image, "--into", str(folder), "--function", function, "--tenant", tenant, "-o", "json"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "adapter.cli.main", *words,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        said, errors = await asyncio.wait_for(process.communicate(), limit_s)
    except asyncio.TimeoutError:
        said, errors = b"", f"It was not done after {limit_s:g} s.".encode()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode == 0:
        with suppress(ValueError):
            return len(json.loads(said))
    if process.returncode != _NOT_FOUND:
        why = " ".join(errors.decode(errors="replace").split())[-500:]
        logger.warning("no snapshot was fetched beside an image", extra={"fields": {"image": image, "why": why}})
    return 0
