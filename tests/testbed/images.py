"""Images without a builder: of static programs, and of a function on a base image of `scripts/base-image.sh`.

All are OCI archives for containerd. What a node has already is left out of them: many functions share a base, and one
with torch has a gigabyte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import platform
import tarfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
NAME_ANNOTATIONS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


@dataclasses.dataclass(frozen=True)
class Base:
    """An image to build on: its configuration, the descriptors of its layers, and the OCI layout that has them."""

    config: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]] = ()
    layout: Path = Path()


SCRATCH = Base({"architecture": ARCHITECTURE, "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}})


def read_base(layout: Path, image: str) -> Base:
    """The image of that name in an OCI layout."""
    index = json.loads((layout / "index.json").read_text())
    found = next(item for item in index["manifests"] if item["annotations"][NAME_ANNOTATIONS[1]] == image)
    manifest = json.loads(_blob(layout, found["digest"]).read_text())
    return Base(json.loads(_blob(layout, manifest["config"]["digest"]).read_text()), manifest["layers"], layout)


@dataclasses.dataclass(frozen=True)
class Image:
    """`layers` (tar files) over `base`; `settings` are those of an OCI configuration (Entrypoint, Env, User, …)."""

    name: str
    settings: Mapping[str, Any]
    layers: Sequence[Path]
    base: Base = SCRATCH

    @property
    def base_digests(self) -> frozenset[str]:
        return frozenset(layer["digest"] for layer in self.base.layers)


def program_image(name: str, program: Path, folder: Path) -> Image:
    """An image with nothing in it but a static program, which it runs as nobody. `folder` takes its layer."""
    layer = write_layer({program.name: program}, folder / f"{program.name}.layer")
    return Image(name, {"Entrypoint": [f"/{program.name}"], "Env": ["PATH=/"], "User": "65532:65532"}, [layer])


def write_layer(files: Mapping[str, Path | bytes], path: Path) -> Path:
    """A layer of these files and folders, by their path inside; the same content makes the same bytes."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with tarfile.open(new, "w", format=tarfile.PAX_FORMAT) as tar:
        for inside, content in sorted(files.items()):
            if isinstance(content, bytes):
                _member(tar, inside, content, 0o644)
            elif content.is_dir():
                for each in sorted(content.rglob("*")):
                    if each.is_file():
                        _file(tar, f"{inside}/{each.relative_to(content)}", each)
            else:
                _file(tar, inside, content)
    return new.rename(path)


def write_archive(images: Sequence[Image], path: Path, *, without: Collection[str] = ()) -> Path:
    """An OCI archive of all of them, but for the layers of bases `without` (digests); it appears whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    with tarfile.open(new, "w") as archive:
        bases = {digest: image.base.layout for image in images for digest in image.base_digests}
        for digest in bases.keys() - set(without):
            _file(archive, _blob(Path(), digest).as_posix(), _blob(bases[digest], digest))
        manifests = [_add(archive, image) for image in images]
        _member(archive, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        _member(archive, "index.json", json.dumps({"schemaVersion": 2, "manifests": manifests}).encode())
    return new.rename(path)


def _add(archive: tarfile.TarFile, image: Image) -> dict[str, Any]:
    """Adds an image's blobs; returns its entry in the index."""
    layers = [_add_layer(archive, layer) for layer in image.layers]
    base = image.base.config
    before = base["rootfs"]["diff_ids"]
    config = {
        **base,
        "config": {**base.get("config", {}), **image.settings},
        "rootfs": {"type": "layers", "diff_ids": [*before, *(layer["digest"] for layer in layers)]},
        "history": [{"created_by": "gpufn testbed"} for _ in [*before, *layers]],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _add_json(archive, config, CONFIG_TYPE),
        "layers": [*image.base.layers, *layers],
    }
    return {**_add_json(archive, manifest, MANIFEST_TYPE), "annotations": dict.fromkeys(NAME_ANNOTATIONS, image.name)}


def _add_layer(archive: tarfile.TarFile, layer: Path) -> dict[str, Any]:
    with layer.open("rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(1 << 20):
            digest.update(piece)
        descriptor = _descriptor(f"sha256:{digest.hexdigest()}", stream.tell(), LAYER_TYPE)
        stream.seek(0)
        info = tarfile.TarInfo(_blob(Path(), descriptor["digest"]).as_posix())
        info.size = descriptor["size"]
        archive.addfile(info, stream)
    return descriptor


def _add_json(archive: tarfile.TarFile, value: Mapping[str, Any], kind: str) -> dict[str, Any]:
    content = json.dumps(value).encode()
    descriptor = _descriptor(f"sha256:{hashlib.sha256(content).hexdigest()}", len(content), kind)
    _member(archive, _blob(Path(), descriptor["digest"]).as_posix(), content)
    return descriptor


def _descriptor(digest: str, size: int, kind: str) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest, "size": size}


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def _file(tar: tarfile.TarFile, inside: str, path: Path) -> None:
    info = tarfile.TarInfo(inside.lstrip("/"))
    status = path.stat()
    info.size, info.mode = status.st_size, 0o755 if status.st_mode & 0o100 else 0o644
    with path.open("rb") as stream:
        tar.addfile(info, stream)


def _member(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name.lstrip("/"))
    info.size, info.mode = len(content), mode
    tar.addfile(info, io.BytesIO(content))
