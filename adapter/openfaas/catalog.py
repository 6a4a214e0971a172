"""The desired state: functions, namespaces and secrets, as files that survive a kill at any moment.

    <state>/functions/<name>.<namespace>.json    one deploy, with its revision
    <state>/namespaces/<name>.json
    <state>/secrets/<namespace>/<name>           the value, 0600

Each file is written beside its place, synced and renamed: it is the old one or the new one, whole. What a kill
left beside its place is removed when the next life begins.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import Conflict, NotFound, StorageError
from adapter.files import sync, write_whole
from adapter.openfaas.wire import DEFAULT_NAMESPACE, FunctionDeployment, secret_command, unknown_function

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A deployed function. `revision` counts its deploys; `created_at` is RFC 3339."""

    deployment: FunctionDeployment
    revision: int
    created_at: str


class Catalog:
    """The state folder's durable part. Methods are short and blocking, a file each, and raise `StorageError` where
    the disk refuses."""

    def __init__(self, state: Path) -> None:
        self._functions = state / "functions"
        self._namespaces = state / "namespaces"
        self._secrets = state / "secrets"
        for folder in (self._functions, self._namespaces, self._secrets):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for part in folder.rglob(".*.part"):
                part.unlink()
        self._entries = self._read()

    def _read(self) -> dict[str, Entry]:
        entries = {}
        for path in sorted(self._functions.glob("*.json")):
            try:
                data = json.loads(path.read_bytes())
                deployment = FunctionDeployment.from_json(data["deployment"])
                entries[deployment.key] = Entry(deployment, int(data["revision"]), str(data["created_at"]))
            except (ValueError, KeyError, TypeError):
                fields = {"file": path.name}
                logger.exception("a function's file cannot be read and is left out", extra={"fields": fields})
        return entries

    def functions(self, namespace: str | None = None) -> list[Entry]:
        return [e for e in self._entries.values() if namespace is None or e.deployment.namespace == namespace]

    def get(self, key: str) -> Entry:
        """Raises `NotFound`."""
        try:
            return self._entries[key]
        except KeyError:
            raise unknown_function(key) from None

    def put(self, deployment: FunctionDeployment, created_at: str) -> Entry:
        old = self._entries.get(deployment.key)
        entry = Entry(deployment, old.revision + 1 if old else 1, old.created_at if old else created_at)
        data = {"deployment": deployment.to_json(), "revision": entry.revision, "created_at": entry.created_at}
        _write(self._functions / f"{deployment.key}.json", json.dumps(data, indent=1).encode())
        self._entries[deployment.key] = entry
        return entry

    def remove(self, key: str) -> Entry:
        """Raises `NotFound`."""
        entry = self.get(key)
        _remove(self._functions / f"{key}.json")
        del self._entries[key]
        return entry

    # Namespaces ---------------------------------------------------------------------------------

    def namespaces(self) -> list[str]:
        return sorted({DEFAULT_NAMESPACE, *(path.stem for path in self._namespaces.glob("*.json"))})

    def namespace(self, name: str) -> dict[str, Any]:
        """Raises `NotFound`."""
        if name not in self.namespaces():
            raise NotFound(f"No namespace {name}.", code="namespace-unknown")
        path = self._namespaces / f"{name}.json"
        data: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        return {"name": name, "annotations": data.get("annotations", {}), "labels": data.get("labels", {})}

    def put_namespace(self, name: str, facts: dict[str, Any], *, new: bool) -> None:
        """Raises `Conflict` for a new one that exists, `NotFound` for an old one that does not."""
        if new and name in self.namespaces():
            raise Conflict(f"The namespace {name} exists already.", code="namespace-exists")
        if not new:
            self.namespace(name)
        else:
            self._remove_secrets(name)  # of one of that name that was not removed whole
        _write(self._namespaces / f"{name}.json", json.dumps(facts).encode())

    def remove_namespace(self, name: str) -> None:
        """With its secrets: whoever makes one of that name later is somebody else. Raises `Conflict`, `NotFound`."""
        self.namespace(name)
        used = [entry.deployment.service for entry in self.functions(name)]
        if used or name == DEFAULT_NAMESPACE:
            what = f"it has functions: {', '.join(used)}" if used else "it is the default one"
            raise Conflict(f"The namespace {name} cannot be removed: {what}.", code="namespace-in-use")
        self._remove_secrets(name)
        _remove(self._namespaces / f"{name}.json")

    def _remove_secrets(self, namespace: str) -> None:
        for name in self.secrets(namespace):
            _remove(self._secrets / namespace / name)

    # Secrets ------------------------------------------------------------------------------------

    def secrets(self, namespace: str) -> list[str]:
        folder = self._secrets / namespace
        return (
            sorted(path.name for path in folder.glob("*") if not path.name.startswith(".")) if folder.is_dir() else []
        )

    def put_secret(self, namespace: str, name: str, value: bytes, *, new: bool) -> None:
        """Raises `Conflict`, `NotFound`."""
        exists = name in self.secrets(namespace)
        if new and exists:
            hint = f"Change it with: {secret_command('update', name, namespace)}"
            raise Conflict(f"The secret {name} exists already.", hint=hint, code="secret-exists")
        if not new and not exists:
            raise _unknown_secret(namespace, name)
        _write(self._secrets / namespace / name, value)

    def remove_secret(self, namespace: str, name: str) -> None:
        """Raises `NotFound`."""
        if name not in self.secrets(namespace):
            raise _unknown_secret(namespace, name)
        _remove(self._secrets / namespace / name)


def _unknown_secret(namespace: str, name: str) -> NotFound:
    hint = f"Create it with: {secret_command('create', name, namespace)}"
    return NotFound(f"No secret {name} in the namespace {namespace}.", hint=hint, code="secret-unknown")


def _write(path: Path, data: bytes) -> None:
    try:
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700)
            sync(path.parent.parent)
        write_whole(path, data)
    except OSError as exc:
        raise _unwritable(exc) from exc


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        sync(path.parent)
    except OSError as exc:
        raise _unwritable(exc) from exc


def _unwritable(error: OSError) -> StorageError:
    return StorageError(
        "The gateway's state cannot be written.",
        why=f"{error.strerror}.",
        hint="Make room on the disk of its state folder, then try again.",
        code="state-unwritable",
    )
