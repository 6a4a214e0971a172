"""Prints what extras of a project ask for, one requirement a line, extras that they name themselves resolved.

python3 requirements.py pyproject.toml cluster,agent
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib  # pip is there wherever an image is built


def requirements(project: dict[str, Any], extras: Iterable[str]) -> list[str]:
    """`project` is the table of that name in pyproject.toml. Raises `KeyError` for an extra that is none."""
    lines = list(project.get("dependencies", ()))
    for name in extras:
        for line in project["optional-dependencies"][name]:
            own = re.fullmatch(rf"{re.escape(project['name'])}\[([\w,-]+)\]", line)
            lines += requirements(project, own[1].split(",")) if own else [line]
    return sorted(set(lines))


if __name__ == "__main__":
    table = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
    print("\n".join(requirements(table, sys.argv[2].split(","))))
