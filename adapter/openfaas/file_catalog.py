"""The desired state of one machine: functions, namespaces and secrets, as files that survive a kill at any moment.

    <state>/functions/<name>.<namespace>.json    one deploy, with its revision
    <state>/namespaces/<name>.json
    <state>/secrets/<namespace>/<name>           the value, 0600

Each file is written beside its place, synced and renamed: it is the old one or the new one, whole. What a kill
left beside its place is removed when the next life begins.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapter.errors import ConfigError, StorageError
from adapter.files import sync, write_whole
from adapter.openfaas.catalog import (
    Entry,
    ImageFacts,
    Listener,
    check_unused,
    namespace_exists,
    secret_exists,
    unknown_namespace,
    unknown_secret,
)
from adapter.openfaas.wire import DEFAULT_NAMESPACE, FunctionDeployment, unknown_function

logger = logging.getLogger(__name__)


class FileCatalog:
    """See `adapter.openfaas.catalog.Catalog`. Methods are short and blocking, a file each, and raise `StorageError` where
    the disk refuses. Nobody else writes these files: there is nothing to listen to."""

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
            except (ConfigError, ValueError, KeyError, TypeError):
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

    def listen(self, listener: Listener) -> None:
        """Nobody else writes."""

    async def put(self, deployment: FunctionDeployment, created_at: str, image: ImageFacts | None = None) -> Entry:
        """What is known of an image is not kept: hosts of this machine look at it themselves."""
        old = self._entries.get(deployment.key)
        entry = Entry(deployment, old.revision + 1 if old else 1, old.created_at if old else created_at)
        data = {"deployment": deployment.to_json(), "revision": entry.revision, "created_at": entry.created_at}
        _write(self._functions / f"{deployment.key}.json", json.dumps(data, indent=1).encode())
        self._entries[deployment.key] = entry
        return entry

    async def remove(self, key: str) -> Entry:
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
            raise unknown_namespace(name)
        path = self._namespaces / f"{name}.json"
        data: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        return {"name": name, "annotations": data.get("annotations", {}), "labels": data.get("labels", {})}

    async def put_namespace(self, name: str, facts: dict[str, Any], *, new: bool) -> None:
        """Raises `Conflict` for a new one that exists, `NotFound` for an old one that does not."""
        if new and name in self.namespaces():
            raise namespace_exists(name)
        if not new:
            self.namespace(name)
        else:
            self._remove_secrets(name)  # of one of that name that was not removed whole
        _write(self._namespaces / f"{name}.json", json.dumps(facts).encode())

    async def remove_namespace(self, name: str) -> None:
        """With its secrets: whoever makes one of that name later is somebody else. Raises `Conflict`, `NotFound`."""
        self.namespace(name)
        check_unused(name, self.functions(name))
        self._remove_secrets(name)
        _remove(self._namespaces / f"{name}.json")

    def _remove_secrets(self, namespace: str) -> None:
        for name in self._names(namespace):
            _remove(self._secrets / namespace / name)

    # Secrets ------------------------------------------------------------------------------------

    async def secrets(self, namespace: str) -> list[str]:
        return self._names(namespace)

    async def missing_secrets(self, namespace: str, names: Sequence[str]) -> list[str]:
        there = self._names(namespace)
        return [name for name in names if name not in there]

    def _names(self, namespace: str) -> list[str]:
        folder = self._secrets / namespace
        paths = folder.glob("*") if folder.is_dir() else ()
        return sorted(path.name for path in paths if not path.name.startswith("."))

    async def put_secret(self, namespace: str, name: str, value: bytes, *, new: bool) -> None:
        """Raises `Conflict`, `NotFound`."""
        exists = name in self._names(namespace)
        if new and exists:
            raise secret_exists(namespace, name)
        if not new and not exists:
            raise unknown_secret(namespace, name)
        _write(self._secrets / namespace / name, value)

    async def remove_secret(self, namespace: str, name: str) -> None:
        """Raises `NotFound`."""
        if name not in self._names(namespace):
            raise unknown_secret(namespace, name)
        _remove(self._secrets / namespace / name)


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
