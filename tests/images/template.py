"""What `faas-cli build` gives to docker, made without faas-cli; tests/contract/openfaas keeps that it is the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SKIPPED = ("build", "template")
"""Entries of a function's folder that faas-cli leaves out."""


def shrink_wrapped(template: Path, function: Path, context: Path) -> Path:
    """The build context: the template's files, and over its folder `function` those of the function."""
    shutil.copytree(template, context, symlinks=True)
    for path in function.iterdir():
        target = context / "function" / path.name
        if path.name in SKIPPED:
            continue
        if path.is_dir():
            shutil.copytree(path, target, copy_function=_linked, dirs_exist_ok=True)
        else:
            _linked(path, target)
    return context


def _linked(source: Path | str, target: Path | str) -> None:
    """Wheels are large, and nobody writes to them."""
    if os.path.exists(target):
        os.unlink(target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
