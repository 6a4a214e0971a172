"""What fetching weights needs and a builder may lack: clients of hubs and of HTTP. For one build; in no layer."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter.errors import ConfigError

_NEEDS = {
    "hf": ("huggingface_hub", "huggingface_hub>=1.0"),
    "oci": ("requests", "requests>=2.31,<3"),
    "https": ("requests", "requests>=2.31,<3"),
    "http": ("requests", "requests>=2.31,<3"),
}
"""Scheme of a source -> a module, and the requirement that brings it."""


def missing_for(source: str) -> str:
    """The requirement that fetching from `source` lacks here; empty: none."""
    module, requirement = _NEEDS.get(source.partition("://")[0], ("", ""))
    return requirement if module and importlib.util.find_spec(module) is None else ""


@contextmanager
def tools_for(source: str, install: Callable[[Path, str], None]) -> Iterator[None]:
    """While it lasts, what `source` needs can be imported. `install` puts a requirement into a folder.

    Raises `ConfigError` with what `install` said.
    """
    requirement = missing_for(source)
    if not requirement:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="gpufn-fetch-") as folder:
        try:
            install(Path(folder), requirement)
        except ConfigError as exc:
            raise ConfigError(
                "What fetches the weights cannot be installed.",
                why=exc.why,
                hint=f"Let the build reach an index, or put {requirement} and what it needs into its wheels.",
                code="build-extra",
            ) from exc
        sys.path.append(folder)  # at the end: what the builder has goes first
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(folder)
