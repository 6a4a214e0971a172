"""Layers of a build: folders beside `<name>.toml`, as the Buildpack API has them. Knows nothing of what is in them.

A layer says in its metadata what it was made from. When a build wants the same again, it says so and leaves no
folder: the layer of the previous image then stays, by its digest, without being made or even fetched.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MADE_FROM = "made-from"
SIZE = "size-bytes"
WHAT = "what"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a layer is for: in the image, and in the cache of builds."""

    launch: bool = False
    cache: bool = False


LAUNCH = Kind(launch=True)
CACHE = Kind(cache=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a layer. `changed`: what it is made from that is not as before; empty: reused, or new."""

    name: str
    what: str
    size_bytes: int
    is_reused: bool
    changed: tuple[str, ...] = ()


class Layers:
    """The layers of one buildpack, below `root` (`CNB_LAYERS_DIR`)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outcomes: list[Outcome] = []

    def __getitem__(self, name: str) -> Path:
        """The folder of the layer `name`."""
        return self.root / name

    def restored(self, name: str) -> dict[str, Any]:
        """The metadata of the layer in the previous image; empty where there is none."""
        metadata = read_toml(self.root / f"{name}.toml").get("metadata", {})
        return metadata if isinstance(metadata, dict) else {}

    def is_current(self, name: str, made_from: Mapping[str, str]) -> bool:
        """Whether the previous image has the layer, made from the same."""
        return self.restored(name).get(MADE_FROM) == dict(made_from)

    def reuse(self, name: str) -> None:
        """Keep the layer of the previous image, which `is_current` said is there."""
        metadata = self.restored(name)
        shutil.rmtree(self[name], ignore_errors=True)
        self._write(name, LAUNCH, metadata)
        self.outcomes.append(Outcome(name, str(metadata.get(WHAT, "")), int(metadata.get(SIZE, 0)), is_reused=True))

    @contextmanager
    def making(self, name: str, made_from: Mapping[str, str]) -> Iterator[Making]:
        """A new, empty folder for the layer, which counts when the block ends well; otherwise nothing is left of it."""
        before = self.restored(name).get(MADE_FROM)
        self.drop(name)
        making = Making(self[name])
        making.folder.mkdir(parents=True)
        try:
            yield making
        except BaseException:
            self.drop(name)
            raise
        size = folder_size(making.folder)
        self._write(name, LAUNCH, {WHAT: making.what, SIZE: size, **making.metadata, MADE_FROM: dict(made_from)})
        changed = sorted(k for k in {*before, *made_from} if before.get(k) != made_from.get(k)) if before else ()
        self.outcomes.append(Outcome(name, making.what, size, is_reused=False, changed=tuple(changed)))

    def keep_cache(self, name: str) -> Path:
        """The folder of a layer that only later builds see; what an earlier one left is in it."""
        folder = self[name]
        folder.mkdir(parents=True, exist_ok=True)
        self._write(name, CACHE, {})
        return folder

    def drop(self, name: str) -> None:
        """The image gets no layer `name`."""
        shutil.rmtree(self[name], ignore_errors=True)
        for path in self.root.glob(f"{name}.*"):
            if path.name == f"{name}.toml" or path.name.startswith(f"{name}.sbom."):
                path.unlink()

    def _write(self, name: str, kind: Kind, metadata: Mapping[str, Any]) -> None:
        types = {"launch": kind.launch, "build": False, "cache": kind.cache}
        (self.root / f"{name}.toml").write_text(to_toml({"types": types, "metadata": metadata}), encoding="utf-8")


@dataclass(slots=True)
class Making:
    """A layer that is being made: its folder, and what a person is told is in it."""

    folder: Path
    what: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def set_env(self, name: str, value: str, kind: str = "default", *, delimiter: str = "") -> None:
        """A variable of the image's processes: `kind` is override, default, prepend or append."""
        folder = self.folder / "env.launch"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.{kind}").write_text(value, encoding="utf-8")
        if delimiter:
            (folder / f"{name}.delim").write_text(delimiter, encoding="utf-8")


def folder_size(folder: Path) -> int:
    """Bytes of all files below, each once however often it is linked."""
    seen, size = set(), 0
    for parent, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(parent, name))
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                size += status.st_size
    return size


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file; none where it cannot be read."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return data
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}  # a layer whose file cannot be read is made anew


def to_toml(data: Mapping[str, Any], prefix: str = "") -> str:
    """TOML of tables, lists of tables, and plain values. Keys are ours and need no quotes beyond JSON's."""
    plain = [f"{_key(k)} = {_value(v)}\n" for k, v in data.items() if not _is_table(v) and not _is_tables(v)]
    text = "".join(plain)
    for key, value in data.items():
        name = prefix + _key(key)
        if _is_table(value):
            text += f"\n[{name}]\n{to_toml(value, f'{name}.')}"
        elif _is_tables(value):
            text += "".join(f"\n[[{name}]]\n{to_toml(item, f'{name}.')}" for item in value)
    return text


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else _value(key)


def _value(value: Any) -> str:
    """JSON's strings, numbers, lists and words are TOML's, but for one control character that JSON leaves be."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
