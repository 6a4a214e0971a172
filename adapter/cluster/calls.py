"""One call of the Kubernetes API, and what its failing means: our errors, with what to do.

Pure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from adapter.errors import AdapterError, ConfigError, Conflict, NotFound, Overloaded, Timeout, Unavailable

GONE = "gone"
"""Code of the error for a resource version that the API server does not have any more: list anew."""

JSON = "application/json"
_MESSAGE_LIMIT = 500
_PASSING = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    body: Any = field(default=None, repr=False)
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    repeatable: bool = True
    """Sent twice it does what it does once."""

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def may_repeat(call: Call, error: AdapterError) -> bool:
    """A server that says 429, or that no connection reached, has done nothing."""
    if error.code in {"api-overloaded", "api-unreachable"}:
        return True
    return call.repeatable and error.code in {"api-failed", "api-cut", "api-timed-out"}


def error_of(call: Call, code: int, status: Mapping[str, Any], retry_after: str | None) -> AdapterError:
    """What an answer of `code`, 400 or more, means; `status` is what came with it."""
    reason, said = str(status.get("reason") or ""), str(status.get("message") or "")[:_MESSAGE_LIMIT]
    why = said or f"The API server answered {code}."
    message = f"{call} was refused."
    if code == 404:
        return NotFound(f"{call.path} is not there.", why=why)
    if code == 409:
        return Conflict(message, why=why, code="exists" if reason == "AlreadyExists" else "conflict")
    if code == 410:
        return Unavailable(message, why=why, code=GONE)
    if code == 401:
        return Unavailable(message, why="The API server does not know these credentials.", code="not-authenticated")
    if code == 403:
        is_rights = " cannot " in said or not said  # else a quota, a policy or a webhook has the word
        hint = "Grant it with a Role or ClusterRole: kubectl auth can-i --list says what there is." if is_rights else ""
        return Unavailable(message, why=why, hint=hint, code="forbidden")
    after_s = _seconds(retry_after)
    if code == 429:
        return Overloaded(message, why=why, code="api-overloaded", retry_after_s=after_s)
    if code in _PASSING or (code == 500 and after_s is not None):
        return Unavailable(f"{call} failed.", why=why, code="api-failed", retry_after_s=after_s)
    if code >= 500:
        return Unavailable(f"{call} failed.", why=why, code="api-broken")
    return ConfigError(message, why=why, code="refused-object")


def code_of(status: Mapping[str, Any]) -> int:
    """Of a Status that came in a watch."""
    code = status.get("code")
    return code if isinstance(code, int) and code >= 400 else 500


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After header; the API server's are whole seconds."""
    return float(text) if text and text.isascii() and text.isdigit() and len(text) < 6 else None


def garbled(path: str) -> Unavailable:
    return Unavailable(
        f"The answer to {path} cannot be read.",
        why="It is not what a Kubernetes API server says.",
        hint="Is something else at that address, or in between?",
        code="api-garbled",
    )


def unreached(call: Call, exc: BaseException) -> AdapterError:
    """What it means that no whole answer came."""
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError)) and not isinstance(exc, aiohttp.ConnectionTimeoutError):
        return Timeout(f"{call} got no answer in time.", code="api-timed-out")
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        why = "Its certificate is not one of the cluster's CA."
        return Unavailable("The API server cannot be trusted.", why=why, code="api-untrusted")
    if isinstance(exc, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        why = f"{type(exc).__name__}: {getattr(exc, 'strerror', '') or 'no connection'}."
        return Unavailable("The API server cannot be reached.", why=why, code="api-unreachable")
    return Unavailable(f"{call} was cut.", why=f"{type(exc).__name__}.", code="api-cut")
