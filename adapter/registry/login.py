"""How a registry is told who asks: basic credentials, or a bearer token that they are exchanged for."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase

from adapter.errors import Unavailable
from adapter.registry.credentials import Credentials

_PARAMETER = re.compile(r'([A-Za-z]+)=(?:"([^"]*)"|([^",\s]+))')
_CLIENT = "gpufn"


class Login(AuthBase):
    """Puts the present ``Authorization`` on requests to one registry, and on no other's.

    `exchange` sends a request for a token and returns the answer. Safe to share between threads.
    """

    def __init__(
        self, base: str, credentials: Credentials | None, exchange: Callable[..., requests.Response], who: str
    ) -> None:
        self._base = base
        self._credentials = credentials
        self._exchange = exchange
        self._who = who
        self._header = ""
        self._lock = threading.Lock()

    @property
    def is_anonymous(self) -> bool:
        return self._credentials is None

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._header and (request.url or "").startswith(self._base + "/"):
            request.headers["Authorization"] = self._header
        return request

    def answer(self, challenge: str, used: str) -> bool:
        """Get ready for the request to be sent again after it was refused with `challenge`.

        `used` is the header it was sent with: where another thread has got a newer one since, that is used.
        False where there is nothing (else) to say. Raises `Unavailable`.
        """
        with self._lock:
            if self._header != used:
                return True
            scheme, _, rest = challenge.partition(" ")
            if scheme.lower() == "basic" and self._credentials is not None and self._credentials.user:
                header = self._credentials.basic
            elif scheme.lower() == "bearer":
                header = "Bearer " + self._token({name.lower(): a or b for name, a, b in _PARAMETER.findall(rest)})
            else:
                return False
            if header == used:
                return False
            self._header = header
            return True

    def _token(self, parameters: dict[str, str]) -> str:
        realm = parameters.get("realm", "")
        place = urlsplit(realm)
        if place.scheme != "https" and not (place.scheme == "http" and self._base.startswith("http://")):
            raise self._refused(
                f"It asks for the password at {place.scheme}://{place.hostname}, which is not encrypted."
            )
        asked = {name: parameters[name] for name in ("service", "scope") if parameters.get(name)}
        credentials = self._credentials
        if credentials is not None and credentials.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token, "client_id": _CLIENT}
            response = self._exchange("POST", realm, data={**asked, **form})
        else:
            known = credentials is not None and bool(credentials.user)
            headers = {"Authorization": credentials.basic} if known and credentials is not None else {}
            response = self._exchange("GET", realm, params=asked, headers=headers)
        if response.status_code != 200:
            raise self._refused(f"Its token service at {place.hostname} answered {response.status_code}.")
        return self._token_in(response)

    def _token_in(self, response: requests.Response) -> str:
        try:
            data: Any = response.json()
            token = data.get("token") or data.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise self._refused("Its token service gave no token.")
        return token

    def _refused(self, why: str) -> Unavailable:
        return refused(self._who, why, anonymous=self.is_anonymous)


def refused(who: str, why: str, *, anonymous: bool) -> Unavailable:
    """The error for a registry that does not let us in; `who` is its host."""
    return Unavailable(
        f"The registry {who} refuses access.",
        why=why,
        hint=f"{'Log in' if anonymous else 'Check the user and its rights, and log in again'}: docker login {who}",
        code="registry-denied",
    )
