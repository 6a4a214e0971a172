"""Function folders: which folder an OpenFaaS `image` means on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapter.errors import NotFound
from adapter.keys import CONFIG_FILE, HANDLER_FILE
from adapter.spec import read_config, read_handler_shape

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")


class FunctionFolders:
    """Folders below (or being) the given roots that hold a ``handler.py``.

    An image is known by its last path component without tag and digest: ``ghcr.io/me/embed:1`` is the
    folder ``embed``. Nothing outside the roots can be named.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [root.resolve() for root in roots]

    def all(self) -> dict[str, Path]:
        """Name -> folder; the first root that has a name wins."""
        found: dict[str, Path] = {}
        for root in self.roots:
            if _has_handler(root):
                found.setdefault(root.name, root)
            for handler in sorted(root.glob(f"*/{HANDLER_FILE}")):
                found.setdefault(handler.parent.name, handler.parent)
        return found

    def resolve(self, image: str) -> Path:
        """Raises `NotFound` naming the folders that exist."""
        name = image.split("@", 1)[0].rsplit("/", 1)[-1].split(":", 1)[0]
        known = self.all()
        if not _NAME.fullmatch(name) or name not in known:
            new = name if _NAME.fullmatch(name) else "NAME"
            raise NotFound(
                f"No function folder for the image {image!r}.",
                why="`gpufn up` runs folders: an image's last part, without its tag, names one. "
                f"Known: {', '.join(sorted(known)) or 'none'} (below {', '.join(map(str, self.roots))}).",
                hint=f"Create it with: gpufn init {new}, or start: gpufn up --functions FOLDER",
                code="image-unknown",
            )
        return known[name]

    def config(self, image: str) -> tuple[dict[str, Any], str]:
        """The tables of its `gpufn.toml`, and that file's name. Raises as `resolve`, and where the folder is none."""
        return config_in(self.resolve(image))


def config_in(folder: Path) -> tuple[dict[str, Any], str]:
    """The tables of a function folder's `gpufn.toml`, and that file's name. Raises `HandlerError`, `ConfigError`."""
    read_handler_shape(folder)
    return read_config(folder), str(folder / CONFIG_FILE)


def _has_handler(folder: Path) -> bool:
    try:
        return (folder / HANDLER_FILE).is_file()
    except OSError:  # a folder that may not be read holds nothing for us
        return False
