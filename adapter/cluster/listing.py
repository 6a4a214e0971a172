"""Reads a list of Kubernetes objects one by one.

A list of some megabytes parsed in one go stops an event loop for as long as that takes, and has every object in memory
at once; read by this, it does neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from typing import Any

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
ITEM = "items[]"
"""Name under which `read_list` tells of one item."""


def read_list(text: str) -> Iterator[tuple[str, Any]]:
    """The members of a JSON object as ``(name, value)``; of its ``items``, each one as ``(ITEM, value)``.

    In the order of the text. `ValueError` where it is no such object; what came before that has been told.
    """
    at = _past(text, 0, "{")
    if _char(text, at) == "}":
        _end(text, at + 1)
        return
    while True:
        name, at = _value(text, at)
        if not isinstance(name, str):
            raise ValueError("a member has no name")
        at = _past(text, at, ":")
        if name == "items" and _char(text, at) == "[":
            at = yield from _items(text, at)
        else:
            value, at = _value(text, at)
            yield name, value
        if _char(text, at) == "}":
            _end(text, at + 1)
            return
        at = _past(text, at, ",")


def _items(text: str, at: int) -> Generator[tuple[str, Any], None, int]:
    """Of the array at `at`; returns where it ends."""
    at = _past(text, at, "[")
    if _char(text, at) == "]":
        return _skip(text, at + 1)
    while True:
        value, at = _value(text, at)
        yield ITEM, value
        if _char(text, at) == "]":
            return _skip(text, at + 1)
        at = _past(text, at, ",")


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _char(text: str, at: int) -> str:
    return text[at : at + 1]


def _past(text: str, at: int, mark: str) -> int:
    at = _skip(text, at)
    if _char(text, at) != mark:
        raise ValueError(f"no {mark} at {at}")
    return _skip(text, at + 1)


def _value(text: str, at: int) -> tuple[Any, int]:
    value, end = _DECODER.raw_decode(text, at)
    return value, _skip(text, end)


def _end(text: str, at: int) -> None:
    if _skip(text, at) != len(text):
        raise ValueError(f"something more at {at}")
