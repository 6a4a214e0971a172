"""User and password of a registry, from where Docker and Podman keep them. Nothing here ends up in an error or a log."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter.errors import ConfigError
from adapter.registry.reference import DOCKER_HUB, Reference

_HELPER_TIMEOUT_S = 30.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9._-]+")
_DOCKER_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", DOCKER_HUB)
_NO_PASSWORD_USER = "<token>"  # noqa: S105  # how helpers say that the secret is an identity token
_LIMIT_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Credentials:
    """User and password, or an identity token that is exchanged for short-lived ones."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """Value of an ``Authorization`` header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def find_credentials(reference: Reference, environ: Mapping[str, str] = os.environ) -> Credentials | None:
    """The first that is kept for this registry; None where there is none.

    Looks where REGISTRY_AUTH_FILE says and nowhere else where that is set; else in Docker's config.json
    (DOCKER_CONFIG names its folder), then in Podman's auth.json. Raises `ConfigError` for a file that cannot be
    read and a credential helper that fails.
    """
    for path in _files(environ):
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            raise ConfigError(f"{path} cannot be read.", why=f"{exc.strerror}.", code="bad-credentials-file") from exc
        found = _from_config(_parse(path, data), reference, path, environ)
        if found is not None:
            return found
    return None


def credentials_in(config: bytes, reference: Reference) -> Credentials | None:
    """What a Docker configuration that somebody handed us keeps for this registry, as a Kubernetes Secret has it.

    No program that it may name is run. Raises `ConfigError`.
    """
    source = Path("the Docker configuration")
    return _from_config({"auths": _table(_parse(source, config), "auths")}, reference, source, {})


def _files(environ: Mapping[str, str]) -> Iterator[Path]:
    if environ.get("REGISTRY_AUTH_FILE"):
        yield Path(environ["REGISTRY_AUTH_FILE"])
        return
    home = Path(environ.get("HOME") or "/root")
    yield Path(environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json"
    if environ.get("XDG_RUNTIME_DIR"):
        yield Path(environ["XDG_RUNTIME_DIR"]) / "containers/auth.json"
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers/auth.json"


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data[:_LIMIT_BYTES])
        if isinstance(config, dict):
            return config
    except (ValueError, RecursionError):
        pass
    raise ConfigError(
        f"{path} is no registry configuration.",
        why="It is not a JSON object.",
        hint="Write it anew: docker login, or podman login.",
        code="bad-credentials-file",
    )


def _from_config(
    config: Mapping[str, Any], reference: Reference, path: Path, environ: Mapping[str, str]
) -> Credentials | None:
    keys = _keys(reference)
    helpers, entries = _table(config, "credHelpers"), _table(config, "auths")
    for key in keys:
        if isinstance(helpers.get(key), str):
            return _ask_helper(helpers[key], key, environ)
    by_place = {_place(name): entry for name, entry in entries.items()}
    for key in keys:
        entry = entries.get(key) or by_place.get(key)
        found = _from_entry(entry, path) if isinstance(entry, dict) else None
        if found is not None:
            return found
    store = config.get("credsStore")
    if isinstance(store, str) and store:
        return _ask_helper(store, _DOCKER_HUB_KEYS[0] if reference.host == DOCKER_HUB else reference.host, environ)
    return None


def _table(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = config.get(name)
    return table if isinstance(table, dict) else {}


def _keys(reference: Reference) -> list[str]:
    """Names under which credentials may be kept, the closest first: Podman also keeps them by repository."""
    if reference.host == DOCKER_HUB:
        return list(_DOCKER_HUB_KEYS)
    parts = reference.repository.split("/")
    below = ["/".join([reference.host, *parts[:count]]) for count in range(len(parts), 0, -1)]
    return [*below, reference.host]


def _place(name: str) -> str:
    """``https://host/v1/`` and ``host`` are the same registry."""
    return name.partition("://")[2].split("/")[0] if "://" in name else name


def _from_entry(entry: Mapping[str, Any], path: Path) -> Credentials | None:
    token = str(entry.get("identitytoken") or "")
    user, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if entry.get("auth"):
        try:
            text = base64.b64decode(str(entry["auth"]), validate=True).decode()
        except ValueError:
            raise ConfigError(
                f"{path} holds credentials that cannot be read.",
                why="They are not base64 of USER:PASSWORD.",
                hint="Log in again: docker login, or podman login.",
                code="bad-credentials-file",
            ) from None
        user, _, password = text.partition(":")
    if not token and not user:
        return None
    return Credentials(user, password.rstrip("\0"), token)


def _ask_helper(name: str, key: str, environ: Mapping[str, str]) -> Credentials | None:
    """What the program ``docker-credential-NAME`` keeps; None where it has nothing for this registry."""
    program = f"docker-credential-{name}"
    if not _HELPER_NAME.fullmatch(name):
        raise _helper_failed(program[:80], "Its name has characters that none has.")
    try:
        done = subprocess.run(
            [program, "get"],
            input=key,
            capture_output=True,
            text=True,
            timeout=_HELPER_TIMEOUT_S,
            env=dict(environ),
            check=False,
        )
    except FileNotFoundError:
        raise _helper_failed(program, "It is not on the PATH.") from None
    except subprocess.TimeoutExpired:
        raise _helper_failed(program, f"It did not answer in {_HELPER_TIMEOUT_S:.0f} s.") from None
    except (OSError, UnicodeDecodeError):
        raise _helper_failed(program, "It does not run.") from None
    if done.returncode != 0:
        if "not found" in done.stdout + done.stderr:
            return None
        raise _helper_failed(program, f"It ended with code {done.returncode}.")  # its words may hold the secret
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _helper_failed(program, "Its answer is not what such a program says.") from None
    return Credentials(identity_token=secret) if user == _NO_PASSWORD_USER else Credentials(user, secret)


def _helper_failed(program: str, why: str) -> ConfigError:
    return ConfigError(
        f"{program} gives no credentials.",
        why=why,
        hint="Mend it, or name another file of credentials with REGISTRY_AUTH_FILE.",
        code="credential-helper-failed",
    )
