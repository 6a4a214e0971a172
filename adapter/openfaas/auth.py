"""HTTP basic authentication as OpenFaaS does it: user and password in two files of the state folder."""

from __future__ import annotations

import base64
import hmac
import secrets
from collections.abc import Callable
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from adapter.errors import ConfigError
from adapter.files import write_whole
from adapter.keys import PASSWORD_FILE, USER_FILE

_USER = "admin"

_OPEN_PATHS = ("/function/", "/async-function/")
_OPEN_READS = frozenset({"/healthz", "/metrics", "/system/namespaces"})
"""Without credentials, as OpenFaaS has it; its `/system/namespace/…` is open too, here only for readers."""


def ensure_credentials(state: Path) -> tuple[str, str]:
    """User and password, made at first use (0600). Raises `ConfigError`, `OSError`."""
    user, password = (_read(state / name) for name in (USER_FILE, PASSWORD_FILE))
    if not user:
        write_whole(state / USER_FILE, (user := _USER).encode())
    if not password:  # it must never be empty
        write_whole(state / PASSWORD_FILE, (password := secrets.token_urlsafe(24)).encode())
    return user, password


def _read(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"{path} cannot be used.",
            why="It is no UTF-8 text.",
            hint="Remove it: a new one is made.",
            code="bad-state",
        ) from exc


def authentication(credentials: tuple[str, str] | None) -> Middleware:
    """Lets in who knows them; without any, everybody but other sites' pages in a browser of this machine."""
    allows = _allows_all if credentials is None else _checker(credentials)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if _is_open(request) or allows(request):
            return await handler(request)
        headers = {"WWW-Authenticate": 'Basic realm="Restricted"'}
        return web.Response(status=401, text="invalid credentials", headers=headers)

    return check


def _is_open(request: web.Request) -> bool:
    if request.path.startswith(_OPEN_PATHS):
        return True
    is_read = request.method in ("GET", "HEAD")
    return is_read and (request.path in _OPEN_READS or request.path.startswith("/system/namespace/"))


def _checker(credentials: tuple[str, str]) -> Callable[[web.Request], bool]:
    wanted = base64.b64encode(":".join(credentials).encode())

    def allows(request: web.Request) -> bool:
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        return kind.lower() == "basic" and hmac.compare_digest(given.strip().encode(errors="replace"), wanted)

    return allows


def _allows_all(request: web.Request) -> bool:
    return "Origin" not in request.headers
