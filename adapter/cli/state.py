"""Where the state folder is, and how commands reach the gateway that runs over it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from adapter.errors import AdapterError, NotFound, Unavailable
from adapter.keys import ENV_HOME

DEFAULT_GATEWAY = "http://127.0.0.1:8080"

state_option = click.option(
    "--state", type=click.Path(path_type=Path), envvar=ENV_HOME, show_envvar=True,
    help="State folder. Default: ~/.local/state/gpufn.",
)  # fmt: skip

gateway_option = click.option(
    "-g", "--gateway", envvar="OPENFAAS_URL", show_envvar=True, default=DEFAULT_GATEWAY, show_default=True,
    help="Address of the gateway.",
)  # fmt: skip

namespace_option = click.option(
    "-n", "--namespace", default="openfaas-fn", show_default=True, help="Namespace of the function."
)


def state_folder(chosen: Path | None) -> Path:
    """The folder to use: as chosen, else $XDG_STATE_HOME/gpufn, else ~/.local/state/gpufn."""
    if chosen is not None:
        return chosen.resolve()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "gpufn"


class GatewayClient:
    """HTTP to a gateway, with the password of the state folder. Errors of both are `AdapterError`s."""

    def __init__(self, url: str, state: Path | None = None) -> None:
        import requests

        self._url = url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between us and this machine
        password = state_folder(state) / "basic-auth-password"
        if password.exists():
            self._session.auth = ("admin", password.read_text().strip())

    def request(self, method: str, path: str, *, ok: tuple[int, ...] = (200, 202), **options: Any) -> Any:
        """A response with a status of `ok`. Raises `Unavailable`, `NotFound`, `AdapterError`."""
        import requests

        try:
            response = self._session.request(method, self._url + path, timeout=options.pop("timeout", 60), **options)
        except requests.RequestException as exc:
            raise Unavailable(
                f"No gateway answers at {self._url}.", why=_short(exc), hint="Start one with: gpufn up", code="no-gateway"
            ) from exc
        if response.status_code in ok:
            return response
        raise _error_of(response)

    def get_json(self, path: str, **query: Any) -> Any:
        return self.request("GET", path, params=query).json()


def _error_of(response: Any) -> AdapterError:
    if response.status_code == 401:
        return Unavailable(
            "The gateway refuses the password.", hint="Name its state folder with --state.", code="unauthorized"
        )
    try:
        said = response.json()["error"]
        message, why, hint, code = (str(said.get(key, "")) for key in ("message", "why", "hint", "code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        first, *rest = response.text.strip().splitlines() or [f"The gateway answered {response.status_code}."]
        message, why, hint, code = first, " ".join(rest[:-1] or rest), "".join(rest[1:][-1:]), f"http-{response.status_code}"
    kind: Callable[..., AdapterError] = NotFound if response.status_code == 404 else AdapterError
    return kind(message, why=why, hint=hint, code=code)


def _short(error: Exception) -> str:
    reason = getattr(error.args[0], "reason", error) if error.args else error
    return str(reason).rsplit(": ", 1)[-1] + "."
