"""HTTP basic authentication as OpenFaaS does it: user and password in two files of the state folder."""

from __future__ import annotations

import base64
import hmac
import os
import secrets
from pathlib import Path

USER = "admin"
USER_FILE, PASSWORD_FILE = "basic-auth-user", "basic-auth-password"


def ensure_password(state: Path) -> str:
    """The password, made at first use (0600)."""
    for name, value in ((USER_FILE, USER), (PASSWORD_FILE, secrets.token_urlsafe(24))):
        try:
            fd = os.open(state / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        with os.fdopen(fd, "w") as file:
            file.write(value)
    return (state / PASSWORD_FILE).read_text().strip()


class BasicAuth:
    """Checks the Authorization header; without a password everybody may come in."""

    def __init__(self, password: str | None) -> None:
        self._wanted = base64.b64encode(f"{USER}:{password}".encode()) if password is not None else None

    def allows(self, header: str | None) -> bool:
        if self._wanted is None:
            return True
        kind, _, given = (header or "").partition(" ")
        return kind.lower() == "basic" and hmac.compare_digest(given.strip().encode(), self._wanted)
