"""Settings of a program, from its environment: a frozen dataclass whose fields say where they are read from.

    @dataclass(frozen=True, slots=True)
    class Settings:
        port: int = variable("GPUFN_PORT", as_port, 8080, "where requests arrive")

Standard library only. A variable that is set to nothing is set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, TypeVar

from adapter.errors import ConfigError

T = TypeVar("T")


def variable(name: str, parse: Callable[[str], Any], default: Any, doc: str) -> Any:
    """A field that is read by `parse`, which raises `ValueError` with what it accepts. `doc` is for people."""
    return field(default=default, metadata={"name": name, "parse": parse, "doc": doc})


def required(name: str, parse: Callable[[str], Any], doc: str) -> Any:
    """A field without a default; `doc` says where to take it from. Such fields come first."""
    return variable(name, parse, MISSING, doc)


def from_environment(cls: type[T], environ: Mapping[str, str]) -> T:
    """Raises `ConfigError` that names the variable, what it says, and what is accepted."""
    values: dict[str, Any] = {}
    for item in fields(cls):  # type: ignore[arg-type]  # every class with such fields is a dataclass
        name, doc = item.metadata["name"], item.metadata["doc"]
        text = environ.get(name)
        if text is not None:
            values[item.name] = _parsed(name, text, doc, item.metadata["parse"])
        elif item.default is MISSING:
            raise ConfigError(
                f"The variable {name} is not set.",
                why=f"It says: {doc}. There is no default.",
                hint="Set it in the component's environment; the manifests of gpufn do.",
                code="no-variable",
            )
    return cls(**values)


def _parsed(name: str, text: str, doc: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except ValueError as exc:
        message = f"The variable {name}={text!r} cannot be used."
        raise ConfigError(message, why=f"It says: {doc}.", hint=f"Accepted: {exc}.", code="bad-variable") from exc


# What is accepted -----------------------------------------------------------------------------------


def as_text(text: str) -> str:
    if not text:
        raise ValueError("a text that is not empty")
    return text


def as_path(text: str) -> Path:
    if not text:
        raise ValueError("a path")
    return Path(text)


def as_port(text: str) -> int:
    """0: a free one."""
    if not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise ValueError("a port, 0 to 65535")
    return int(text)


def as_log_level(text: str) -> str:
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError("debug, info, warning or error")
    return text
