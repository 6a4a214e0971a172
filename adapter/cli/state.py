"""Where the state folder is, and how commands reach the gateway that runs over it."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from adapter.errors import AdapterError, ConfigError, Conflict, GpuError, NotFound, Overloaded, Timeout, Unavailable
from adapter.keys import ENV_HOME, ERROR_HEADER, GATEWAY_FILE, PASSWORD_FILE, USER_FILE

DEFAULT_GATEWAY = "http://127.0.0.1:8080"

_ERRORS: dict[int, type[AdapterError]] = {
    400: ConfigError, 404: NotFound, 409: Conflict, 413: ConfigError, 422: ConfigError, 429: Overloaded,
    502: Unavailable, 503: Unavailable, 504: Timeout,
}  # fmt: skip
"""What an answer's status means for the exit code."""
_NO_GPU = frozenset({"no-node"})
"""Codes that mean it more exactly: there is no GPU to be had."""

state_option = click.option(
    "--state", type=click.Path(path_type=Path), envvar=ENV_HOME, show_envvar=True,
    help="State folder. Default: ~/.local/state/gpufn.",
)  # fmt: skip

gateway_option = click.option(
    "-g", "--gateway", envvar="OPENFAAS_URL", show_envvar=True, default=DEFAULT_GATEWAY, show_default=True,
    help="Address of the gateway.",
)  # fmt: skip


def state_folder(chosen: Path | None) -> Path:
    """The folder to use: as chosen, else $XDG_STATE_HOME/gpufn, else ~/.local/state/gpufn."""
    if chosen is not None:
        return chosen.resolve()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "gpufn"


class GatewayClient:
    """HTTP to a gateway. Errors are `AdapterError`s.

    User and password are those of the address, else those of the state folder, which only the gateway that runs
    over it gets to see, and this machine's own addresses.
    """

    def __init__(self, url: str, state: Path | None = None) -> None:
        import requests

        self._url = url.rstrip("/")
        self._state = state_folder(state)
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between us and this machine
        user, password = (_text_of(self._state / name) for name in (USER_FILE, PASSWORD_FILE))
        if user and password and "@" not in _place(url) and self._is_ours():
            self._session.auth = (user, password)

    def _is_ours(self) -> bool:
        return _is_loopback(self._url) or _place(self._url) == _place(_text_of(self._state / GATEWAY_FILE))

    def request(self, method: str, path: str, *, ok: tuple[int, ...] = (200, 202), **options: Any) -> Any:
        """A response with a status of `ok`. Raises the `AdapterError` that fits any other."""
        response = send(self._session, method, self._url + path, **options)
        if response.status_code in ok:
            return response
        if response.status_code == 401 and "Authorization" not in response.request.headers:
            raise Unavailable(
                f"The gateway at {shown(self._url)} wants a password.",
                why=f"The one of {self._state} goes only to the gateway that runs over that folder.",
                hint="Name its folder with --state, or log in with: -g http://USER:PASSWORD@HOST",
                code="unauthorized",
            )
        raise error_of(response)

    def get_json(self, path: str, **query: Any) -> Any:
        return self.request("GET", path, params=query).json()


def send(session: Any, method: str, url: str, **options: Any) -> Any:
    """Whatever the gateway answers. Raises `Unavailable` where none does, `Timeout` where it takes too long."""
    import requests

    base = shown(url)
    try:
        return session.request(method, url, timeout=options.pop("timeout", 60), **options)
    except requests.ReadTimeout as exc:
        raise Timeout(f"{base} did not answer in time.", why=_short(exc), code="no-answer") from exc
    except (requests.RequestException, UnicodeError) as exc:
        raise Unavailable(
            f"No gateway answers at {base}.", why=_short(exc), hint="Start one with: gpufn up", code="no-gateway"
        ) from exc


def _text_of(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"{path} cannot be read.",
            why=f"{exc}.",
            hint="Mend it, or name another folder with --state.",
            code="bad-state",
        ) from exc


def _place(url: str) -> str:
    """Scheme, host and port of an address, and user and password if it has them."""
    return "/".join(url.split("/", 3)[:3])


def shown(url: str) -> str:
    """An address for people: a password in it is nobody else's business."""
    scheme, _, rest = _place(url).rpartition("//")
    return f"{scheme}//{rest.rpartition('@')[2]}"


def _is_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def error_of(response: Any) -> AdapterError:
    """What an answer says went wrong: in JSON, or in up to three lines of text with the code in a header."""
    status = response.status_code
    if status == 401:
        return Unavailable(
            "The gateway refuses the password.", hint="Name its state folder with --state.", code="unauthorized"
        )
    kind = _ERRORS.get(status, AdapterError)
    try:
        said = response.json()["error"]
        message, why, hint, code = (str(said.get(key, "")) for key in ("message", "why", "hint", "code"))
        return (GpuError if code in _NO_GPU else kind)(message, why=why, hint=hint, code=code)
    except (ValueError, KeyError, TypeError, AttributeError):
        code = response.headers.get(ERROR_HEADER) or f"http-{status}"
        lines = response.text.strip().splitlines()[:3] or [f"The gateway answered {status}."]
    return kind(lines[0], why=" ".join(lines[1:2]), hint=" ".join(lines[2:]), code=code)


def _short(error: Exception) -> str:
    reason = getattr(error.args[0], "reason", error) if error.args else error
    return str(reason).rsplit(": ", 1)[-1] + "."
