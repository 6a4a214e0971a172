"""`gpufn build`: a function folder as an image, by the lifecycle of Cloud Native Buildpacks and our buildpack."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from adapter.cli.buildpack import private_criu
from adapter.cli.output import Column, Output, note, output_options, progress
from adapter.errors import AdapterError, ConfigError, NotFound
from adapter.packaging.creator import (
    ENGINES,
    Request,
    Transcript,
    create,
    found_engine,
    in_place,
    layout_path,
    no_image,
)
from adapter.packaging.report import BuiltLayer, built_layers
from adapter.registry.client import Client
from adapter.registry.credentials import find_credentials
from adapter.registry.reference import Reference, local_architecture
from adapter.units import format_size

_COLUMNS = (
    Column("LAYER", "layer"),
    Column("WHAT", "what"),
    Column("SIZE", "size_bytes", lambda size: "–" if size is None else format_size(size), right=True),
    Column("STATE", "is_reused", lambda reused: "reused" if reused else "new"),
    Column("NEXT TIME REUSED UNLESS", "changes_when"),
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("image", required=False)
@click.option("--builder", metavar="IMAGE", help="Image that builds: Python, the lifecycle. Not needed inside of one.")
@click.option("--run-image", metavar="IMAGE", help="Image that the function's image rests on.")
@click.option("--publish", is_flag=True, help="Push the image to its registry. Default: the engine here keeps it.")
@click.option(
    "--layout", type=click.Path(path_type=Path, file_okay=False), help="Write the image into this OCI layout folder."
)
@click.option("--cache", metavar="FOLDER|NAME", help="Folder or volume that keeps downloads between builds.")
@click.option(
    "-e", "--env", "variables", multiple=True, metavar="NAME=VALUE", help="Setting of the build: BP_…; repeatable."
)
@click.option(
    "--secret",
    "secrets",
    multiple=True,
    metavar="NAME=FILE",
    help="File that only the build sees, and no layer has: huggingface=FILE; repeatable.",
)
@click.option(
    "--ca",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="CA bundle (PEM) that the build trusts for packages and weights, and no other then; no layer has it.",
)
@click.option(
    "--wheels",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of wheels that packages come from, and no index then.",
)
@click.option("--engine", type=click.Choice(ENGINES), help="Container engine. Default: the first on the PATH.")
@click.option("--network", metavar="NAME", help="Network of the build. Default: the host's for a registry on loopback.")
@click.option("-v", "--verbose", is_flag=True, help="Show all that the lifecycle says.")
@output_options
def command(
    folder: Path,
    image: str | None,
    builder: str | None,
    run_image: str | None,
    publish: bool,
    layout: Path | None,
    cache: str | None,
    variables: tuple[str, ...],
    secrets: tuple[str, ...],
    ca: Path | None,
    wheels: Path | None,
    engine: str | None,
    network: str | None,
    verbose: bool,
    output: Output,
) -> None:
    """Build an image of the function in FOLDER. IMAGE is its name; default: the folder's.

    Runs the lifecycle in a container of the builder image, or in place where this is one. Says what each layer
    weighs, which were reused, and what will be next time.
    """
    if publish and layout:
        raise ConfigError("--publish and --layout cannot both be.", hint="Choose one.", code="bad-option")
    folder = folder.resolve()
    name = image or folder.name
    registries = [Reference.parse(ref) for ref in (name, run_image) if ref]
    is_local = any(ref.is_local for ref in registries)
    request = Request(
        folder=folder,
        image=name,
        builder=builder or "",
        run_image=run_image or "",
        publish=publish,
        layout=layout.absolute() if layout else None,
        cache=cache or "",
        settings=_pairs(variables, "--env"),
        secrets={key: Path(path) for key, path in _pairs(secrets, "--secret").items()},
        ca=ca,
        wheels=wheels,
        criu=private_criu(),
        network=network or ("host" if is_local and not in_place() else ""),
        engine=engine or "",
        registry_auth=_credentials(registries),
        insecure=tuple(sorted({ref.host for ref in registries if ref.is_local})),
    )
    if publish and run_image:
        _check_run_image(Reference.parse(run_image))
    with _phases(verbose=verbose) as watch:
        transcript = create(request, watch)
    layers = _layers(request, transcript)
    output.rows([layer.to_json() for layer in layers], _COLUMNS, name="layer")
    if output.for_people:
        new = sum(layer.size_bytes or 0 for layer in layers if not layer.is_reused)
        note(f"✓ {name}  {transcript.digest}  {format_size(new)} new")


def _check_run_image(reference: Reference) -> None:
    """Raises `NotFound` where its registry says that it is not there; any other answer is for the lifecycle to hear."""
    try:
        with Client(reference, find_credentials(reference)) as client:
            client.resolve(local_architecture())
    except NotFound as error:
        raise no_image(str(reference), "--run-image", error.why or error.message) from error
    except AdapterError:
        pass  # the build may be in another network than this process


def _pairs(words: Sequence[str], option: str) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"{option} {word} has no value.", hint=f"Write: {option} NAME=VALUE", code="bad-option")
        pairs[name] = value
    return pairs


def _credentials(registries: Sequence[Reference]) -> dict[str, str]:
    """A header a registry, of those that have credentials here."""
    found = {}
    for reference in registries:
        credentials = find_credentials(reference)
        if credentials is not None and credentials.user:
            found[reference.host] = credentials.basic
    return found


@contextmanager
def _phases(*, verbose: bool) -> Iterator[Any]:
    """Yields what watches the lifecycle: a line of progress a phase, and the buildpack's own lines below it."""
    with ExitStack() as stack:
        current = stack.enter_context(ExitStack())
        is_error = False  # the buildpack's own three lines, which the command ends with

        def watch(phase: str, line: str) -> None:
            nonlocal is_error
            is_error = line.startswith("✗ ") or (is_error and line.startswith("  "))
            if is_error:
                return
            if not line:
                current.close()
                current.enter_context(progress(phase.capitalize()))
            elif verbose or (phase == "BUILDING" and line.startswith("  ") and not line.startswith("   ")):
                note(line if verbose else f"  {line.strip()}")

        yield watch


# What it is made of ---------------------------------------------------------------------------------------------


def _layers(request: Request, transcript: Transcript) -> list[BuiltLayer]:
    if request.layout is not None:
        config, sizes = _of_layout(request.layout / layout_path(request.image))
    elif request.publish:
        config, sizes = _of_registry(Reference.parse(request.image))
    else:
        config, sizes = _of_engine(request), []
    return built_layers(config, sizes, transcript.reused)


def _of_layout(folder: Path) -> tuple[Mapping[str, Any], list[int]]:
    def blob(digest: str) -> Any:
        return json.loads((folder / "blobs" / digest.replace(":", "/")).read_bytes())

    index = json.loads((folder / "index.json").read_bytes())
    manifest = blob(index["manifests"][0]["digest"])
    return blob(manifest["config"]["digest"]), [layer["size"] for layer in manifest["layers"]]


def _of_registry(reference: Reference) -> tuple[Mapping[str, Any], list[int]]:
    with Client(reference, find_credentials(reference)) as client:
        manifest = client.get_manifest(client.resolve(local_architecture()).digest).data
        config = manifest["config"]
        return json.loads(client.get_blob(config["digest"], config["size"])), [e["size"] for e in manifest["layers"]]


def _of_engine(request: Request) -> Mapping[str, Any]:
    engine = request.engine or found_engine()
    command = [engine, "image", "inspect", request.image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AdapterError(
            f"{request.image} was built, and cannot be looked at.",
            why=done.stderr.strip(),
            hint=f"See that it is there: {engine} image ls",
            code="engine-failed",
        )
    found = json.loads(done.stdout)[0]
    return {"config": found["Config"], "rootfs": {"diff_ids": found["RootFS"]["Layers"]}}
