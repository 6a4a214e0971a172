"""Changes to a JSON document that belongs to others, as JSON Patch (RFC 6902).

Objects and arrays on the way to a change are made where they are missing (or null), arrays are only ever added to, and
each change is one operation at the first level that is new: a patch says no more than what changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Path: TypeAlias = tuple[str | int, ...]
"""Names of members and indices of elements, from the document's root."""


def pointer(path: Path) -> str:
    """The path as a JSON pointer (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def copied(value: Any) -> Any:
    """Of JSON, and so in a third of the time that a copy of just anything takes."""
    if isinstance(value, Mapping):
        return {name: copied(inner) for name, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


class Editor:
    """A copy of `document` that is changed, and the `operations` that change the document in the same way."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document: Any = copied(document)
        self.operations: list[dict[str, Any]] = []

    def get(self, *path: str | int) -> Any:
        """What is there; None where nothing is."""
        here = self.document
        for part in path:
            here = _inner(here, part)
            if here is None:
                return None
        return here

    def put(self, path: Path, value: Any) -> None:
        """Make `value` the member of an object that `path` ends with. Nothing happens where it is already."""
        depth, here = self._walk(path[:-1])
        present = isinstance(here, dict) and path[depth] in here and depth == len(path) - 1
        if present and here[path[depth]] == value:
            return
        for name in reversed(path[depth + 1 :]):
            value = {name: value}
        replaces = isinstance(here, dict) and path[depth] in here
        self._say("replace" if replaces else "add", path[: depth + 1], value)
        here[path[depth]] = copied(value)

    def append(self, path: Path, value: Any) -> None:
        """Add to the end of the array at `path`."""
        array = self.get(*path)
        if array is None:
            self.put(path, [value])
            return
        self._say("add", (*path, "-"), value)
        array.append(copied(value))

    def remove(self, path: Path) -> None:
        """Take a member away. Nothing happens where it is not."""
        here = self.get(*path[:-1])
        if isinstance(here, dict) and path[-1] in here:
            del here[path[-1]]
            self.operations.append({"op": "remove", "path": pointer(path)})

    def _walk(self, path: Path) -> tuple[int, Any]:
        """How far `path` exists, and what is there."""
        here = self.document
        for depth, part in enumerate(path):
            inner = _inner(here, part)
            if inner is None:
                return depth, here
            here = inner
        return len(path), here

    def _say(self, operation: str, path: Path, value: Any) -> None:
        self.operations.append({"op": operation, "path": pointer(path), "value": copied(value)})


def _inner(here: Any, part: str | int) -> Any:
    if isinstance(here, list):
        return here[part] if isinstance(part, int) and part < len(here) else None
    return here.get(part) if isinstance(here, dict) else None
