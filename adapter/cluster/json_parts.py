"""Parts of other people's JSON, read leniently: what is not of the form that it should have is not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def object_in(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = of.get(key)
    return value if isinstance(value, Mapping) else {}


def objects_in(of: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects of a list."""
    value = of.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
