"""Weights as an artifact of a registry: a manifest by its digest, each layer one file named by its title.

As ``oras push`` makes them. The digest of the manifest fixes those of the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from adapter.errors import ConfigError
from adapter.packaging.weights_source import Entry, Progress, disk_error, unsafe

TITLE = "org.opencontainers.image.title"
_UNPACK = "io.deis.oras.content.unpack"
_LAYERS_LIMIT = 4096


class ArtifactSource:
    """The artifact `digest` of `repository` in the registry `host`. `connect` makes the client; tests give another."""

    def __init__(self, host: str, repository: str, digest: str, connect: Callable[[str], Any] | None = None) -> None:
        self._name = f"{host}/{repository}@{digest}"
        self._digest = digest
        self._connect = connect or _connect
        self._layers: dict[str, Any] = {}

    @property
    def pinned(self) -> str:
        return f"oci://{self._name}"

    def entries(self) -> list[Entry]:
        from adapter.registry.client import Descriptor

        with self._connect(self._name) as client:
            data = client.get_manifest(self._digest).data
        layers = data.get("layers")
        if not isinstance(layers, list) or len(layers) > _LAYERS_LIMIT:
            raise unsafe(self.pinned, "It is no artifact: its manifest has no layers, or too many.")
        entries = []
        for layer in map(Descriptor.from_json, layers):
            name = layer.annotations.get(TITLE)
            if name is None or layer.annotations.get(_UNPACK) == "true":
                raise unsafe(
                    self.pinned,
                    f"A layer of the type {layer.media_type[:80]!r} is no plain file"
                    + (" with a title." if name is None else ", but a folder in an archive."),
                    "Push the files one by one: oras push REGISTRY/REPOSITORY FILE …",
                )
            self._layers[name] = layer
            entries.append(Entry(name, layer.size))
        return entries

    def fetch(self, entry: Entry, folder: Path, progress: Progress) -> Path:
        layer = self._layers[entry.name]
        path = folder / entry.name
        part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file, self._connect(self._name) as client:
                client.save_blob(layer.digest, layer.size, _writer(file, entry, progress))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return path


def _writer(file: IO[bytes], entry: Entry, progress: Progress) -> Callable[[memoryview], None]:
    def write(piece: memoryview) -> None:
        try:
            file.write(piece)
        except OSError as exc:  # the client takes an OSError for the network's
            raise disk_error(exc, entry.name) from exc
        progress(entry.name, file.tell(), entry.size)

    return write


def _connect(name: str) -> Any:
    """A client that is logged in as docker and podman are. Raises `ConfigError`."""
    try:
        from adapter.registry.client import Client
        from adapter.registry.credentials import find_credentials
        from adapter.registry.reference import Reference
    except ImportError as exc:
        raise ConfigError(
            "Weights cannot be fetched from a registry.",
            why=f"{exc.name} is not installed here.",
            hint="Install gpufn[build] where images are built.",
            code="build-extra",
        ) from exc
    reference = Reference.parse(name)
    return Client(reference, find_credentials(reference))
