"""What a user may set at a build (`BP_GPUFN_*`) and at a launch (`BPL_GPUFN_*`): two tables, and how they are read.

`docs/reference/buildpack.md` is written from the tables. What a *replica* may be told is `adapter.replica`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from adapter.errors import ConfigError


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.replace(",", " ").split() if word)


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(", ".join(words[:-1]) + " or " + words[-1])
        return text

    return parse


def _setting(name: str, parse: Callable[[str], Any], default: Any, doc: str) -> Any:
    return field(default=default, metadata={"name": name, "parse": parse, "doc": doc})


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """One build's settings."""

    detect: str = _setting(
        "BP_GPUFN_DETECT",
        _one_of("auto", "on"),
        "auto",
        "which folders are functions; auto: those with gpufn.toml, or whose handler defines `load`; on: any with a handler",
    )
    from_base: tuple[str, ...] = _setting(
        "BP_GPUFN_FROM_BASE",
        _words,
        (),
        "packages that the base image brings, `torch` say: their lines in the requirements are left out",
    )
    wheels: str = _setting(
        "BP_GPUFN_WHEELS",
        str,
        "",
        "folder of wheels that packages come from, and no index then; default: `wheels/` of the function, where there is one",
    )
    pip_cache: str = _setting(
        "BP_GPUFN_PIP_CACHE", _one_of("on", "off"), "on", "keep what pip downloaded for the next build"
    )
    criu: str = _setting(
        "BP_GPUFN_CRIU",
        _one_of("auto", "bring", "off"),
        "auto",
        "whether the image gets a CRIU of its own; auto: where the build image has none that is new enough",
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> BuildSettings:
        """Raises `ConfigError` naming the variable, its value and the accepted form, also for one that is not known."""
        known = {item.metadata["name"]: item for item in fields(cls)}
        values = {}
        for name, text in sorted(environ.items()):
            if not name.startswith("BP_GPUFN_"):
                continue
            if name not in known:
                raise ConfigError(
                    f"Unknown build setting {name}.",
                    why="A setting that is not known would silently do nothing.",
                    hint="Known: " + ", ".join(known) + ".",
                    code="unknown-setting",
                )
            try:
                values[known[name].name] = known[name].metadata["parse"](text.strip())
            except ValueError as exc:
                raise ConfigError(
                    f"The build setting {name}={text!r} cannot be used.",
                    why=f"It says: {known[name].metadata['doc']}.",
                    hint=f"Accepted: {exc}.",
                    code="bad-setting",
                ) from exc
        return cls(**values)


class LaunchSetting(NamedTuple):
    """A variable that the launcher's script of the layer `environment` reads."""

    name: str
    default: str
    doc: str


SNAPSHOTS = LaunchSetting(
    "BPL_GPUFN_SNAPSHOTS", "auto", "`auto`: snapshots are kept where a folder for them is mounted; `off`: never"
)
CRIU = LaunchSetting("BPL_GPUFN_CRIU", "auto", "`off`: no process snapshots are taken or restored")
LAUNCH_SETTINGS = (SNAPSHOTS, CRIU)

_BPE_KINDS = {"DEFAULT": "default", "OVERRIDE": "override", "APPEND": "append", "PREPEND": "prepend", "DELIM": "delim"}


def launch_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """``NAME.kind`` -> value of the variables that an image is to start with, as `BPE_*` of a build names them.

    The convention of other buildpacks: ``BPE_NAME`` and ``BPE_OVERRIDE_NAME`` set, ``BPE_DEFAULT_NAME`` only where
    nothing else does. `func` says so where an image listens.
    """
    found = {}
    for name, value in environ.items():
        if not name.startswith("BPE_"):
            continue
        kind, _, rest = name.removeprefix("BPE_").partition("_")
        if kind in _BPE_KINDS and rest:
            found[f"{rest}.{_BPE_KINDS[kind]}"] = value
        else:
            found[f"{name.removeprefix('BPE_')}.override"] = value
    return found
