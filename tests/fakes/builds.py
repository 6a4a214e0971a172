"""Wheels made on the spot, and builds of function folders with the real pip, as the lifecycle runs them."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from adapter.packaging.build import Places, build
from adapter.packaging.layers import Outcome

HANDLER = "def load(device):\n    return 1\n\n\ndef handle(event, context):\n    return str(context.model)\n"
SHIM_WHEELS = {"flask": "3.1.0", "gunicorn": "27.0.1", "tomli": "2.2.1"}


def wheel(folder: Path, name: str, version: str = "1.0", *, requires: str = "", source: str = "") -> Path:
    """A wheel with one module, which holds its version and what `source` says."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    requirement = f"Requires-Dist: {requires}\n" if requires else ""
    files = {
        f"{name}.py": f"version = {version!r}\n{source}",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: MIT\n{requirement}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_digest(text)},{len(text.encode())}\n" for path, text in files.items())
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(zipfile.ZipInfo(member), text)
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@dataclasses.dataclass
class Builder:
    """Builds `folder` anew at each call, in the same places, so that two builds can be compared."""

    folder: Path
    work: Path
    wheels: Path
    lines: list[str] = dataclasses.field(default_factory=list)

    @property
    def places(self) -> Places:
        return Places(self.work / "app", self.work / "layers", self.work / "buildpack", self.work / "platform")

    @property
    def layers(self) -> Path:
        return self.places.layers

    def __call__(self, **settings: str) -> dict[str, Outcome]:
        places = self.places
        shutil.rmtree(places.app, ignore_errors=True)
        shutil.copytree(self.folder, places.app, symlinks=True)
        for path in (places.layers, places.buildpack, places.platform):
            path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(places.buildpack / "wheels", ignore_errors=True)
        shutil.copytree(self.wheels, places.buildpack / "wheels")
        environ = {**os.environ, "PIP_NO_INDEX": "1", "BP_GPUFN_CRIU": "off", **settings}
        self.lines.clear()
        return {outcome.name: outcome for outcome in build(places, environ, self.lines.append)}

    def exported(self) -> None:
        """What the lifecycle does between two builds: layers keep their metadata, and nothing else is there."""
        for path in self.layers.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name in {"launch.toml", "build.toml"}:
                path.unlink()


def digest_of(folder: Path) -> str:
    """Of all that a layer's archive would hold: names, modes, links and contents, no times."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        whole.update(f"{path.relative_to(folder)} {path.lstat().st_mode:o} {len(content)}\n".encode() + content)
    return whole.hexdigest()
