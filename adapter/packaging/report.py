"""What an image that was built is made of: its layers by name, what is in them, and when they change. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapter.packaging.assemble import BUILDPACK_ID

METADATA_LABEL = "io.buildpacks.lifecycle.metadata"

_CHANGES = {
    "packages": "a requirement, a wheel, Python or a package of the base image changes",
    "shim": "gpufn changes",
    "criu": "the CRIU that the buildpack brings changes",
    "environment": "the function moves, or BPE_… change",
    "weights": "the weights' source changes",
    "app": "a file of the folder changes",
    "sbom": "a package changes",
    "launcher": "the builder's lifecycle changes",
    "config": "a package or a setting changes",
    "process-types": "the start command changes",
}
_WHAT = {
    "app": "the function folder",
    "sbom": "bill of materials",
    "launcher": "what starts the process",
    "config": "the lifecycle's notes",
    "process-types": "the process `web`",
}
_LOG_NAMES = {"launch.sbom": "sbom"}


@dataclass(frozen=True, slots=True)
class BuiltLayer:
    """One layer above the run image. `size_bytes` as it is pushed, or as files where an engine keeps the image."""

    layer: str
    what: str
    size_bytes: int | None
    is_reused: bool
    changes_when: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def built_layers(config: Mapping[str, Any], sizes: Sequence[int], reused: Collection[str]) -> list[BuiltLayer]:
    """The layers that a build put on its run image, as the image's configuration names them.

    `sizes` are those of the image's layers in order; empty where they are not known. `reused` holds names as the
    lifecycle's log has them.
    """
    labels = (config.get("config") or {}).get("Labels") or {}
    metadata = json.loads(labels.get(METADATA_LABEL) or "{}")
    by_digest = dict(zip((config.get("rootfs") or {}).get("diff_ids") or (), sizes, strict=False))
    kept = {_LOG_NAMES.get(name, name) for name in reused}
    return [_layer(name, what, by_digest.get(digest, size), kept) for name, what, digest, size in _entries(metadata)]


def _entries(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str, str, int | None]]:
    """Name, content, digest, and size as files where that is known, of each layer."""
    for buildpack in metadata.get("buildpacks") or ():
        for name, entry in sorted(buildpack.get("layers", {}).items()):
            if entry.get("launch"):
                data = entry.get("data") or {}
                shown = name if buildpack.get("key") == BUILDPACK_ID else f"{buildpack.get('key')}:{name}"
                yield shown, str(data.get("what", "")), entry.get("sha", ""), data.get("size-bytes")
    for entry in metadata.get("app") or ():
        yield "app", _WHAT["app"], entry.get("sha", ""), None
    for name in ("sbom", "launcher", "config", "process-types"):
        if entry := metadata.get(name):
            yield name, _WHAT[name], entry.get("sha", ""), None


def _layer(name: str, what: str, size: int | None, kept: Collection[str]) -> BuiltLayer:
    return BuiltLayer(name, what, size, name in kept, _CHANGES.get(name, ""))
