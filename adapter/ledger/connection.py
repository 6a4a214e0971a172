"""The ledger service as components of a cluster call it: over TLS, with the token of their own pod."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from adapter.cluster.connections import Connections, body_of
from adapter.errors import Timeout, Unavailable
from adapter.keys import SYSTEM_NAMESPACE
from adapter.ledger.client import Question

T = TypeVar("T")

ADDRESS = f"https://gpufn-ledger.{SYSTEM_NAMESPACE}.svc:8443"
FOLDER = Path("/var/run/secrets/gpufn.dev/ledger")
"""With ``token`` and ``ca.crt``, where pods of ours have them."""
_LIMIT_S = 30.0
_ANSWER_LIMIT_BYTES = 256 * 2**20
_RECEIPT_LIMIT_BYTES = 8 * 2**20
"""Of what was delivered: an agent has little memory."""
_SAID_LIMIT = 300


class LedgerConnection:
    """Use it as ``async with LedgerConnection() as ledger``.

    `folder` has what is shown and what is trusted, which others renew: both are read for each call, and may come later
    than this process. Every method raises `Unavailable`, and `Timeout` after half a minute.
    """

    def __init__(self, address: str = ADDRESS, folder: Path = FOLDER) -> None:
        self._address, self._folder = address.rstrip("/"), folder
        self._tls: tuple[bytes, ssl.SSLContext] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> LedgerConnection:
        self._session = aiohttp.ClientSession(
            connector=Connections(),
            timeout=aiohttp.ClientTimeout(total=_LIMIT_S),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *args: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, question: Question[T]) -> T:
        return question.read(await self._call("GET", question.path, _ANSWER_LIMIT_BYTES, params=question.query))

    async def deliver(self, lines: bytes) -> Any:
        """Records as `adapter.ledger.wire` has them; the answer's JSON."""
        kind = {"Content-Type": "application/x-ndjson"}
        return await self._call("POST", "/v1/records", _RECEIPT_LIMIT_BYTES, data=lines, headers=kind)

    async def _call(
        self, method: str, path: str, limit_bytes: int, headers: dict[str, str] | None = None, **content: Any
    ) -> Any:
        assert self._session is not None, "LedgerConnection is used with `async with`"
        token, tls = self._trusted()
        headers = {"Authorization": f"Bearer {token}", **(headers or {})}
        address = self._address + path
        try:
            async with self._session.request(
                method, address, headers=headers, ssl=tls, allow_redirects=False, **content
            ) as response:
                body = await body_of(response, limit_bytes)
        except asyncio.TimeoutError as exc:
            raise Timeout("The ledger does not answer.", why=f"Not within {_LIMIT_S:g} s.") from exc
        except (aiohttp.ClientError, OSError, ValueError) as exc:  # ValueError: of a token that no header can have
            cause = getattr(exc, "os_error", exc)  # aiohttp's own words show Python objects
            why = f"{type(cause).__name__}: {cause}"[:_SAID_LIMIT]
            raise Unavailable("The ledger cannot be reached.", why=why, code="ledger-unreachable") from exc
        if body is None:
            why = f"It is longer than {limit_bytes} bytes."
            raise Unavailable("The ledger's answer is none.", why=why, code="ledger-answer")
        return _answer(response.status, body)

    def _trusted(self) -> tuple[str, ssl.SSLContext | bool]:
        """Our token, and what trusts the ledger's own authority and nobody else's."""
        try:
            token = (self._folder / "token").read_text().strip()
            if urlsplit(self._address).scheme != "https":
                return token, True
            authority = (self._folder / "ca.crt").read_bytes()
            if not authority:  # with none, `ssl` trusts whoever this machine trusts for the web
                raise ValueError("ca.crt is empty")
            if self._tls is None or self._tls[0] != authority:
                self._tls = authority, ssl.create_default_context(cadata=authority.decode())
            return token, self._tls[1]
        except (OSError, ValueError) as exc:  # an ssl.SSLError is the former, what is no text the latter
            raise Unavailable(
                "The ledger cannot be asked yet.",
                why=f"{self._folder}: {getattr(exc, 'strerror', '') or exc}.",
                hint="The controller that leads makes the certificate authority; the kubelet brings it here.",
                code="ledger-unknown",
            ) from exc


def _answer(status: int, body: bytes) -> Any:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if status != 200:
        error = answer.get("error") if isinstance(answer, dict) else None
        said = error if isinstance(error, dict) else {}
        why = " ".join(str(said.get(name) or "") for name in ("message", "why")).strip()
        raise Unavailable("The ledger refuses.", why=f"{status}: {why}"[:_SAID_LIMIT], code="ledger-refused")
    if answer is None:
        raise Unavailable("The ledger's answer is none.", why="It is no JSON.", code="ledger-answer")
    return answer
