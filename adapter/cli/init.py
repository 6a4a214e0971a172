"""`gpufn init`: write a new function folder."""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path

import click

from adapter.cli.output import note
from adapter.cli.templates import TEMPLATES, files_of
from adapter.errors import ConfigError, Conflict

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_NAME_LIMIT = 63
"""Of a DNS label: function names become host names in clusters."""


@click.command()
@click.argument("name")
@click.option(
    "--template", type=click.Choice(TEMPLATES), default=TEMPLATES[0], show_default=True,
    help="minimal: a greeting; embed: sentence embeddings with torch.",
)  # fmt: skip
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder to make it in. Default: here.",
)
def command(name: str, template: str, into: Path) -> None:
    """Write a new function folder called NAME."""
    check_name(name)
    folder = into / name
    write_folder(folder, files_of(template, name))
    click.echo(f"✓ {folder} is a function: edit {folder / 'handler.py'}")
    note(f"  next: gpufn run {folder}")


def check_name(name: str) -> None:
    """Raises `ConfigError` for what OpenFaaS and Kubernetes would not take as a function's name."""
    if len(name) <= _NAME_LIMIT and _NAME.fullmatch(name):
        return
    near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_NAME_LIMIT].strip("-")
    raise ConfigError(
        f"{name!r} cannot be the name of a function.",
        why=f"OpenFaaS and Kubernetes take a-z, 0-9 and - between them, at most {_NAME_LIMIT}.",
        hint=f"Try: gpufn init {near}" if near else "Choose a name such as my-function.",
        code="bad-name",
    )


def write_folder(folder: Path, files: dict[str, str]) -> None:
    """Write all of `files` or nothing. Raises `Conflict` where `folder` holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(
            f"{folder} exists already.",
            why="It holds something that would be overwritten." if folder.is_dir() else "It is a file.",
            hint="Choose another name, or empty it first.",
            code="folder-exists",
        )
    draft = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        for path, content in files.items():
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            (draft / path).write_text(content, encoding="utf-8")
        draft.rename(folder)
    except OSError as exc:
        shutil.rmtree(draft, ignore_errors=True)
        raise ConfigError(f"{folder} cannot be written.", why=f"{exc.strerror}.", code="unwritable") from exc
