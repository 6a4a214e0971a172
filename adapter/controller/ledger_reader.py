"""The ledger service as the controller asks it: over TLS with a token of this pod's, both read anew when they change."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import aiohttp

from adapter.errors import Timeout, Unavailable
from adapter.keys import SYSTEM_NAMESPACE
from adapter.ledger.client import ACTIVITY, read_activity
from adapter.policy.activity import Activity

ADDRESS = f"https://gpufn-ledger.{SYSTEM_NAMESPACE}.svc:8443"
FOLDER = Path("/var/run/secrets/gpufn.dev/ledger")
"""With ``token`` and ``ca.crt``."""
_TIMEOUT_S = 20.0


class LedgerReader:
    """`folder` has what is shown and what is trusted; both are there later than this process may be."""

    def __init__(self, address: str = ADDRESS, folder: Path = FOLDER) -> None:
        self._address, self._folder = address.rstrip("/"), folder

    async def activity(self, since_ns: int) -> list[Activity]:
        """Raises `Unavailable` and `Timeout`."""
        return read_activity(await self._get(ACTIVITY, {"since_ns": str(since_ns)}))

    async def _get(self, path: str, query: dict[str, str]) -> Any:
        try:
            token = (self._folder / "token").read_text().strip()
            context = ssl.create_default_context(cafile=str(self._folder / "ca.crt"))
        except OSError as exc:
            raise Unavailable(
                "The ledger cannot be asked yet.",
                why=f"{exc.filename or self._folder}: {exc.strerror}.",
                hint="The controller that leads makes the certificate authority; the kubelet brings it here.",
                code="ledger-unknown",
            ) from exc
        headers = {"Authorization": f"Bearer {token}"}
        limit = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=limit, headers=headers) as session,  # one question in half a minute
                session.get(self._address + path, params=query, ssl=context) as response,
            ):
                if response.status != 200:
                    raise _refused(response.status, await response.text())
                return await response.json()
        except asyncio.TimeoutError as exc:
            raise Timeout("The ledger does not answer.", why=f"Not within {_TIMEOUT_S:g} s.") from exc
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            raise Unavailable("The ledger does not answer.", why=str(exc) or type(exc).__name__) from exc


def _refused(status: int, body: str) -> Unavailable:
    return Unavailable("The ledger did not answer the question.", why=f"It said {status}: {body[:300]}")
