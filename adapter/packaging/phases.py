"""`bin/detect` and `bin/build` of the buildpack: what the lifecycle hands over, exit codes, and errors as three lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from adapter.errors import AdapterError, ConfigError
from adapter.packaging.function import is_function
from adapter.packaging.layers import to_toml
from adapter.packaging.settings import BuildSettings

FAIL = 100
"""Exit code of a `detect` that is not meant; any other but 0 is an error."""

_PLAN = {"provides": [{"name": "gpufn"}], "requires": [{"name": "gpufn"}]}


def detect(environ: Mapping[str, str]) -> int:
    """Exit code; passes where the folder holds a function, with a build plan of our own."""
    settings = BuildSettings.from_env(environ)
    if not is_function(Path.cwd(), any_handler=settings.detect == "on"):
        print("no gpufn.toml, and no handler.py that defines `load`")  # noqa: T201  # the lifecycle shows it
        return FAIL
    _folder(environ, "CNB_BUILD_PLAN_PATH").write_text(to_toml(_PLAN), encoding="utf-8")
    return 0


def build(environ: Mapping[str, str]) -> int:
    """Exit code of the build of the folder that is current."""
    from adapter.packaging.build import Places, build as build_function

    places = Places(
        app=Path.cwd(),
        layers=_folder(environ, "CNB_LAYERS_DIR"),
        buildpack=_folder(environ, "CNB_BUILDPACK_DIR"),
        platform=_folder(environ, "CNB_PLATFORM_DIR"),
    )
    build_function(places, environ, _say)
    return 0


def run(phase: str) -> int:
    """One phase; its errors are printed as three lines on standard error."""
    os.umask(0o022)  # modes are part of a layer
    try:
        return {"detect": detect, "build": build}[phase](os.environ)
    except AdapterError as error:
        print(error.to_text(), file=sys.stderr, flush=True)  # noqa: T201
        return error.exit_code
    except RecursionError:
        text = ConfigError(
            "The folder is nested too deeply.",
            why="It has folders in folders beyond what Python can follow, about a thousand.",
            hint="Leave out what made them: a list of patterns goes into .gpufnignore, before the build.",
            code="too-deep",
        ).to_text()
        print(text, file=sys.stderr, flush=True)  # noqa: T201
        return 1
    except OSError as error:
        text = ConfigError(
            f"The {phase} phase could not go on.",
            why=f"{error.strerror}: {error.filename}." if error.filename else f"{error}.",
            hint="See that the build has room on its disk, and may write where it must.",
            code="build-failed",
        ).to_text()
        print(text, file=sys.stderr, flush=True)  # noqa: T201
        return 1


def _say(line: str) -> None:
    print(f"  {line}", flush=True)  # noqa: T201


def _folder(environ: Mapping[str, str], name: str) -> Path:
    if not environ.get(name):
        raise ConfigError(
            f"{name} is not set.",
            why="A buildpack is run by the lifecycle of Cloud Native Buildpacks, API 0.8 or newer.",
            hint="Build with: gpufn build FOLDER, or pack build",
            code="no-lifecycle",
        )
    return Path(environ[name])
