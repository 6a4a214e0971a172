"""`gpufn buildpack`: the buildpack as a folder, for `pack` and for builder images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import click

from adapter import replica
from adapter.cli.output import note
from adapter.packaging.assemble import assemble
from adapter.packaging.layers import folder_size
from adapter.units import format_size


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--wheels",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of wheels to bring: what the shim needs, for builds without an index.",
)
@click.option(
    "--criu",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the private CRIU to bring. Default: the one that `make criu` made, where there is one.",
)
@click.option("--no-criu", is_flag=True, help="Bring none: images then take the base image's.")
def command(folder: Path, wheels: Path | None, criu: Path | None, no_criu: bool) -> None:
    """Write the buildpack into FOLDER: for `pack --buildpack FOLDER`, or to make a builder image with."""
    brought = None if no_criu else criu or private_criu()
    assemble(folder.absolute(), wheels=wheels, criu=brought)
    click.echo(f"✓ {folder}: {format_size(folder_size(folder))}{'' if brought else ', without CRIU'}")
    note(f"  next: pack build IMAGE --path FUNCTION --buildpack {folder} --builder BUILDER")


def private_criu(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of the CRIU that scripts/install-criu.sh makes; None: it has not been made here."""
    path = Path(replica.private_criu(environ))
    return path.parent if path.exists() else None
