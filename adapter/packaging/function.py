"""The function in an application folder: where it lies, and what it asks for. Reads; runs no code of the user."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import ConfigError, HandlerError
from adapter.keys import CONFIG_FILE, HANDLER_FILE
from adapter.spec import FunctionSpec, HandlerShape, parse_spec, read_config, read_handler_shape

PLACES = ("", "function", "fn")
"""Folders of an application where a function may lie: as gpufn has it, as OpenFaaS's templates, as func."""


@dataclass(frozen=True, slots=True)
class Function:
    """One function: its folder, the tables of its file, what it asks for, and what its handler defines."""

    folder: Path
    config: dict[str, Any]
    spec: FunctionSpec
    shape: HandlerShape

    @property
    def config_json(self) -> str:
        """`gpufn.toml` as compact JSON, the same for the same keys."""
        return json.dumps(self.config, separators=(",", ":"), sort_keys=True, ensure_ascii=False, default=str)


def function_folder(app: Path) -> Path | None:
    """The folder of `app` that a function lies in; None where there is neither a handler nor a `gpufn.toml`.

    Raises `ConfigError` where there are two.
    """
    handlers = [place for place in PLACES if (app / place / HANDLER_FILE).is_file()]
    if len(handlers) > 1:
        names = " and ".join(str(Path(place) / HANDLER_FILE) for place in handlers)
        raise ConfigError(
            f"There are two handlers: {names}.",
            why="One image is one function.",
            hint="Remove one, or build the folder of the one that is meant.",
            code="two-handlers",
        )
    configs = [place for place in PLACES if (app / place / CONFIG_FILE).exists()]
    if len(configs) > 1 or (handlers and configs and handlers != configs):
        names = " and ".join(str(Path(place) / CONFIG_FILE) for place in configs)
        raise ConfigError(
            f"It is not clear which function {names} belongs to.",
            why=f"{CONFIG_FILE} lies beside the handler: {Path((handlers or ['.'])[0]) / HANDLER_FILE}.",
            hint="Move it there, or remove it.",
            code="two-handlers",
        )
    found = handlers or configs
    return app / found[0] if found else None


def read_function(folder: Path) -> Function:
    """Raises `ConfigError` and `HandlerError`: the file, or the handler, cannot be used."""
    config = read_config(folder)
    return Function(folder, config, parse_spec(config, {}), read_handler_shape(folder))


def is_function(app: Path, *, any_handler: bool = False) -> bool:
    """Whether the buildpack is meant: there is a `gpufn.toml`, or a handler that defines `load` (or any handler).

    Raises `ConfigError` for two functions, and what `read_function` does where the user clearly meant us.
    """
    folder = function_folder(app)
    if folder is None:
        return False
    if (folder / CONFIG_FILE).exists() or any_handler:
        read_function(folder)
        return True
    try:
        return read_handler_shape(folder).has_load
    except HandlerError:
        return False  # somebody else's handler.py
