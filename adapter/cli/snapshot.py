"""`gpufn snapshot`: the snapshots of a state folder: taken before the first call, listed, looked into, thrown away."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from adapter.cli import artifact
from adapter.cli.interrupt import run_interruptible
from adapter.cli.kept import Kept, kept, may_go, remove
from adapter.cli.output import (
    NOTHING,
    Column,
    Output,
    format_instant,
    note,
    output_options,
    progress,
    show,
    single_output_options,
)
from adapter.cli.run import deployment_of, function_options, open_host
from adapter.cli.scope import Scope, namespace_option, scope_options, split_name
from adapter.cli.state import state_folder, state_option
from adapter.errors import Conflict, NotFound, SnapshotCorrupt
from adapter.snapshot.store import Snapshot, Store, compare
from adapter.units import format_duration, format_size, parse_duration_s

_EMPTY = "They are taken after a function's first start, or by: gpufn snapshot create FOLDER"


@click.group()
def command() -> None:
    """Create, list, inspect, push, pull and prune snapshots.

    A snapshot is a function's memory once it has loaded: replicas start from it instead of loading again.
    """


artifact.register(command)


@command.command("list")
@scope_options
@state_option
@output_options
def list_command(scope: Scope, state: Path | None, output: Output) -> None:
    """List snapshots, of all functions or of the one that is named."""
    items = kept(_store(state), scope)
    if not items:
        scope.require_known(state_folder(state))
    empty = f"No snapshots{f' of {scope}' if scope.name else ''}. {_EMPTY}"
    output.rows([item.to_json() for item in items], _columns(scope), name="key", empty=empty)


@command.command("inspect")
@click.argument("which", metavar="FUNCTION|KEY|IMAGE")
@click.option("--verify", "verifies", is_flag=True, help="Read all of it and compare checksums.")
@namespace_option
@artifact.plain_http_option
@state_option
@single_output_options
def inspect_command(
    which: str, verifies: bool, namespace: str, plain_http: bool, state: Path | None, output: Output
) -> None:
    """Show one snapshot: of a function the newest, or that whose key begins so. Of an image, those in its registry.

    IDENTITY is what has to be equal for a replica to start from it. What has a / or an @ is an image.
    """
    if artifact.is_image(which):
        artifact.inspect_image(which, plain_http, output)
        return
    item = _choose(kept(_store(state)), which, namespace)
    if item.snapshot is None:
        raise SnapshotCorrupt(
            f"The snapshot {item.path.name} is damaged.",
            why=item.damage,
            hint=f"Remove it with: gpufn snapshot prune {item.function}",
        )
    if verifies:
        compare(item.snapshot)
    facts = {
        **item.to_json(),
        "identity": item.snapshot.identity,
        "facts": item.snapshot.facts,
        "files": item.snapshot.files,
    }
    if output.for_people:
        _show(facts, files=output.form == "wide")
    else:
        output.value(facts)


@command.command("prune")
@scope_options
@click.option("--unused-for", metavar="DURATION", help="Also those that nothing started from for so long: 12h, 30m.")
@click.option("--all", "everything", is_flag=True, help="Also the newest of each function.")
@click.option("--removed", is_flag=True, help="Also all of functions that are not deployed (any more, or yet).")
@click.option("--dry-run", is_flag=True, help="Only show what would go.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@state_option
@output_options
def prune_command(
    scope: Scope,
    unused_for: str | None,
    everything: bool,
    removed: bool,
    dry_run: bool,
    yes: bool,
    state: Path | None,
    output: Output,
) -> None:
    """Remove snapshots that are damaged, or that a newer one of the same function has replaced.

    Of one namespace's functions, of all with -A, or of the one that is named. What a running or parked replica
    was restored from stays.
    """
    items = kept(_store(state), scope)
    if not items:
        scope.require_known(state_folder(state))
    due = may_go(
        items,
        everything=everything,
        removed=(lambda item: not item.scope.is_known(state_folder(state))) if removed else None,
        unused_since_ns=_instant_before(unused_for),
    )
    output.rows([item.to_json() for item in due], _columns(scope), name="key", empty="Nothing to prune.")
    if not due or dry_run:
        return
    if not yes:
        _ask(due)
    remove(due)
    note(f"✓ removed {_count(due)}")


@command.command("create")
@click.argument("what", metavar="[FOLDER|IMAGE]", default=".")
@click.option("--name", default="", help="The function that an image will be. Default: the image's own name.")
@click.option("--push", is_flag=True, help="Then put an image's snapshot beside it in the registry.")
@artifact.plain_http_option
@function_options
@namespace_option
@single_output_options
def create_command(
    what: str,
    name: str,
    push: bool,
    plain_http: bool,
    variables: tuple[str, ...],
    python: Path | None,
    envs: Path | None,
    state: Path | None,
    namespace: str,
    output: Output,
) -> None:
    """Take the snapshots of the function in FOLDER (default: here), so that its first start is fast already.

    It is loaded as `gpufn up` loads it, with the same name, settings and environment; what it prints comes to
    standard error. Variables count where `gpufn.toml` lists them under [snapshot] env.

    With the name of an IMAGE it is run once in a container that serves nobody, has no network and sees no secret;
    --push shares the snapshot: it is the memory of the function, and who may read the repository may read it.
    """
    os.umask(0o077)
    folder, where = Path(what), state_folder(state)
    if folder.exists() or what.startswith((".", "/")):
        _require_folder(folder)
        if push:
            raise click.UsageError("Only the snapshot of an image can be pushed.")
        result = run_interruptible(_create(folder.resolve(), variables, namespace, where, envs, python))
    else:
        from adapter.cli.image_snapshot import create_from_image

        result = run_interruptible(create_from_image(what, name, namespace, variables, where))
        if push:
            store = Store(where / "snapshots")
            result["pushed"] = artifact.push_snapshots(
                store, _newest(store, result["key"]), result["image"], plain_http=plain_http
            )
    if not output.for_people:
        output.value(result)
        return
    size, seconds = format_size(result["bytes"]), format_duration(result["seconds"])
    click.echo(f"✓ {result['function']}.{namespace} has a snapshot: {result['key']}, {size}, taken in {seconds}")
    if not push:
        note(f"  next: gpufn snapshot inspect {result['key']}")


def _newest(store: Store, key: str) -> Snapshot:
    """The process snapshot of that key, which has just been taken."""
    return next(item.snapshot for item in kept(store) if item.snapshot is not None and item.key == key)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise click.BadParameter(f"{folder} is no folder.", param_hint="'[FOLDER|IMAGE]'")


async def _create(
    folder: Path, variables: tuple[str, ...], namespace: str, state: Path, envs: Path | None, python: Path | None
) -> dict[str, Any]:
    deployment = deployment_of(folder, variables, namespace)
    async with open_host(folder, state, envs, python, echo=sys.stderr) as host:
        with progress("Environment"):
            await host.prepare(deployment)
        with progress("Snapshot"):
            names = {"function": deployment.name, "namespace": deployment.namespace}
            return {**names, **await host.take_snapshot(deployment)}


def _store(state: Path | None) -> Store:
    return Store(state_folder(state) / "snapshots")


def _choose(items: Sequence[Kept], which: str, namespace: str) -> Kept:
    """The newest of a function, else the one whose key begins with `which`. Raises `NotFound`, `Conflict`."""
    scope = Scope(*split_name(which, namespace))
    named = [item for item in items if item.is_in(scope)]
    if named:
        return max(named, key=lambda item: item.snapshot.created_at_ns if item.snapshot else 0)
    keyed = [item for item in items if item.key.startswith(which)]
    if not keyed:
        raise NotFound(
            f"No snapshot of {scope}, and no key begins so.",
            hint="See them all: gpufn snapshot list -A",
            code="no-snapshot",
        )
    if len(keyed) > 1:
        raise Conflict(
            f"{which!r} begins more than one key.",
            why=", ".join(f"{item.key} ({item.function})" for item in keyed) + ".",
            hint=f"Name one whole, or its function: gpufn snapshot inspect {keyed[0].function}",
            code="ambiguous-key",
        )
    return keyed[0]


def _show(facts: Mapping[str, Any], *, files: bool) -> None:
    shown = {
        **{name: facts[name] for name in ("function", "namespace", "tenant", "kind", "key", "state", "path")},
        "size": format_size(facts["size_bytes"]),
        "created": format_instant(facts["created_at_ns"]),
        "used": format_instant(facts["used_at_ns"]),
        **{f"{name} size".removeprefix("bytes "): format_size(facts["facts"][f"{name}_bytes"])
           for name in ("mapped", "copied") if f"{name}_bytes" in facts["facts"]},
        **{name: facts["facts"][name] for name in ("criu_version", "weights") if name in facts["facts"]},
    }  # fmt: skip
    Output().value(shown)
    click.echo("IDENTITY")
    for name, value in facts["identity"].items():
        click.echo(f"  {name:<10}  {value}")
    if files:
        click.echo("FILES")
        for name, entry in facts["files"].items():
            click.echo(f"  {format_size(entry['size']):>8}  {name}")


def _instant_before(duration: str | None) -> int | None:
    if duration is None:
        return None
    try:
        return time.time_ns() - round(parse_duration_s(duration) * 1e9)
    except ValueError as exc:
        raise click.BadParameter(f"Write {exc}.", param_hint="'--unused-for'") from exc


def _ask(due: Sequence[Kept]) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("Nobody is there to ask. Say --yes to remove them, or --dry-run to look.")
    click.confirm(f"Remove {_count(due)}?", abort=True, err=True)


def _count(due: Sequence[Kept]) -> str:
    size = format_size(sum(item.size_bytes for item in due))
    return f"{len(due)} snapshot{'' if len(due) == 1 else 's'} ({size})"


def _columns(scope: Scope) -> list[Column]:
    now_ns = time.time_ns()

    def age(at_ns: int | None) -> str:
        return NOTHING if at_ns is None else format_duration(max(0.0, (now_ns - at_ns) / 1e9))

    return [
        Column("FUNCTION", "function"),
        Column("NAMESPACE", "namespace", wide=scope.namespace is not None),
        Column("KIND", "kind"),
        Column("KEY", "key"),
        Column("SIZE", "size_bytes", format_size, right=True),
        Column("AGE", "created_at_ns", age, right=True),
        Column("UNUSED", "used_at_ns", age, right=True),
        Column("STATE", "state"),
        Column("TENANT", "tenant", wide=True),
        Column("PATH", "path", wide=True),
        Column("DAMAGE", "damage", show, wide=True),
    ]
