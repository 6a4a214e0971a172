"""The desired state: which functions, namespaces and secrets there are. Where it lies is its implementation's matter:
files (`adapter.openfaas.file_catalog`), or objects of a cluster (`adapter.openfaas.cluster_catalog`).

Reading functions and namespaces is immediate; whatever may wait for a disk or a server is awaited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from adapter.errors import Conflict, NotFound
from adapter.openfaas.wire import DEFAULT_NAMESPACE, FunctionDeployment, secret_command


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """One image as it was when it was deployed.

    `reference` is what replicas run. `is_ours`: it has our entrypoint, which holds requests while the function starts.
    `config` are the tables of its `gpufn.toml`. `user` is whom it runs as, `python_path` its PYTHONPATH.
    `note` says, for people, what could not be found out.
    """

    reference: str
    is_ours: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    user: str = ""
    python_path: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference, "is_ours": self.is_ours, "config": dict(self.config), "user": self.user,
            "python_path": self.python_path, "note": self.note,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageFacts:
        """Raises `KeyError`, `TypeError` for what is none."""
        texts = {name: str(data[name]) for name in ("reference", "user", "python_path", "note")}
        return cls(is_ours=bool(data["is_ours"]), config=dict(data["config"]), **texts)


@dataclass(frozen=True, slots=True)
class Entry:
    """A deployed function. `revision` counts its deploys; `created_at` is RFC 3339.

    `image` is what was found out of its image then, where hosts do not look themselves.
    """

    deployment: FunctionDeployment
    revision: int
    created_at: str
    image: ImageFacts | None = None


class Listener(Protocol):
    """Who is told of what others change in a catalog, and again of what its own user does."""

    def deployed(self, entry: Entry, *, first: bool = False) -> None:
        """A function is new, or has a new revision. May be told more than once. `first`: no other gateway has begun with
        it, as whoever takes a deploy does."""

    def removed(self, key: str) -> None: ...


class Catalog(Protocol):
    """Methods may raise `StorageError` or `Unavailable` where the desired state cannot be read or written."""

    def functions(self, namespace: str | None = None) -> list[Entry]: ...

    def get(self, key: str) -> Entry:
        """Raises `NotFound`."""

    async def put(self, deployment: FunctionDeployment, created_at: str, image: ImageFacts | None = None) -> Entry:
        """A new function, or a new revision of one."""

    async def remove(self, key: str) -> Entry:
        """Raises `NotFound`."""

    def listen(self, listener: Listener) -> None:
        """From now on, tell of changes; once, before the gateway begins."""

    # Namespaces ---------------------------------------------------------------------------------

    def namespaces(self) -> list[str]: ...

    def namespace(self, name: str) -> dict[str, Any]:
        """``{"name", "annotations", "labels"}``; raises `NotFound`."""

    async def put_namespace(self, name: str, facts: dict[str, Any], *, new: bool) -> None:
        """Raises `Conflict` for a new one that exists, `NotFound` for an old one that does not."""

    async def remove_namespace(self, name: str) -> None:
        """With its secrets: whoever makes one of that name later is somebody else. Raises `Conflict`, `NotFound`."""

    # Secrets ------------------------------------------------------------------------------------

    async def secrets(self, namespace: str) -> list[str]: ...

    async def missing_secrets(self, namespace: str, names: Sequence[str]) -> list[str]:
        """Those of `names` that a function in `namespace` cannot have."""

    async def put_secret(self, namespace: str, name: str, value: bytes, *, new: bool) -> None:
        """Raises `Conflict`, `NotFound`."""

    async def remove_secret(self, namespace: str, name: str) -> None:
        """Raises `NotFound`."""


def unknown_namespace(name: str, *, why: str = "", hint: str = "") -> NotFound:
    return NotFound(f"No namespace {name}.", why=why, hint=hint, code="namespace-unknown")


def namespace_exists(name: str) -> Conflict:
    return Conflict(f"The namespace {name} exists already.", code="namespace-exists")


def check_unused(name: str, functions: Sequence[Entry]) -> None:
    """Raises `Conflict` for a namespace that cannot be removed."""
    used = [entry.deployment.service for entry in functions]
    if used or name == DEFAULT_NAMESPACE:
        what = f"it has functions: {', '.join(used)}" if used else "it is the default one"
        raise Conflict(f"The namespace {name} cannot be removed: {what}.", code="namespace-in-use")


def unknown_secret(namespace: str, name: str) -> NotFound:
    hint = f"Create it with: {secret_command('create', name, namespace)}"
    return NotFound(f"No secret {name} in the namespace {namespace}.", hint=hint, code="secret-unknown")


def secret_exists(namespace: str, name: str) -> Conflict:
    hint = f"Change it with: {secret_command('update', name, namespace)}"
    return Conflict(f"The secret {name} exists already.", hint=hint, code="secret-exists")
