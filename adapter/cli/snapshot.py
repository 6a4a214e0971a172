"""`gpufn snapshot`: the snapshots of a state folder: taken before the first call, listed, looked into, thrown away."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from adapter.cli.kept import Kept, kept, may_go, remove
from adapter.cli.output import NOTHING, Column, Output, format_instant, note, output_options, progress, show
from adapter.cli.run import deployment_of, function_options, open_host
from adapter.cli.state import namespace_option, state_folder, state_option
from adapter.errors import Conflict, NotFound, SnapshotCorrupt
from adapter.snapshot.store import Store, verify
from adapter.units import format_duration, format_size, parse_duration_s

_EMPTY = "No snapshots yet. They are taken after a function's first start, or by: gpufn snapshot create FOLDER"


@click.group()
def command() -> None:
    """Create, list, inspect and prune snapshots.

    A snapshot is a function's memory once it has loaded: replicas start from it instead of loading again.
    """


@command.command("list")
@click.argument("function", required=False)
@state_option
@output_options
def list_command(function: str | None, state: Path | None, output: Output) -> None:
    """List snapshots, of all functions or of one: NAME or NAME.NAMESPACE."""
    output.rows([item.to_json() for item in kept(_store(state), function)], _columns(), empty=_EMPTY)


@command.command("inspect")
@click.argument("which", metavar="FUNCTION|KEY")
@click.option("--verify", "verifies", is_flag=True, help="Read all of it and compare checksums.")
@state_option
@output_options
def inspect_command(which: str, verifies: bool, state: Path | None, output: Output) -> None:
    """Show one snapshot: of a function the newest, or that whose key begins so.

    IDENTITY is what has to be equal for a replica to start from it.
    """
    item = _choose(kept(_store(state)), which)
    if item.snapshot is None:
        raise SnapshotCorrupt(
            f"The snapshot {item.path.name} is damaged.", why=item.damage, hint="Remove it with: gpufn snapshot prune"
        )
    if verifies:
        verify(item.snapshot, always=True)
    facts = {
        **item.to_json(),
        "identity": item.snapshot.identity,
        "facts": item.snapshot.facts,
        "files": item.snapshot.files,
    }
    if output.form in ("table", "wide"):
        _show(facts, files=output.form == "wide")
    else:
        output.value(facts)


@command.command("prune")
@click.argument("function", required=False)
@click.option("--unused-for", metavar="DURATION", help="Also those that nothing started from for so long: 12h, 30m.")
@click.option("--all", "everything", is_flag=True, help="Also the newest of each function.")
@click.option("--dry-run", is_flag=True, help="Only show what would go.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@state_option
@output_options
def prune_command(
    function: str | None,
    unused_for: str | None,
    everything: bool,
    dry_run: bool,
    yes: bool,
    state: Path | None,
    output: Output,
) -> None:
    """Remove snapshots that are damaged, or that a newer one of the same function has replaced.

    What a running or parked replica was restored from stays.
    """
    store = _store(state)
    due = may_go(kept(store, function), everything=everything, unused_since_ns=_instant_before(unused_for))
    output.rows([item.to_json() for item in due], _columns(), empty="Nothing to prune.")
    if not due or dry_run:
        return
    if not yes:
        _ask(due)
    remove(due)
    note(f"✓ removed {_count(due)}")


@command.command("create")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path())
@function_options
@namespace_option
@output_options
def create_command(
    folder: Path,
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
    """
    folder = folder.resolve()
    os.umask(0o077)
    result = asyncio.run(_create(folder, variables, namespace, state_folder(state), envs, python))
    if output.form not in ("table", "wide"):
        output.value(result)
        return
    size, seconds = format_size(result["bytes"]), format_duration(result["seconds"])
    click.echo(f"✓ {result['function']} has a snapshot: {result['key']}, {size}, taken in {seconds}")
    note(f"  next: gpufn snapshot inspect {result['key']}")


async def _create(
    folder: Path, variables: tuple[str, ...], namespace: str, state: Path, envs: Path | None, python: Path | None
) -> dict[str, Any]:
    deployment = deployment_of(folder, variables, namespace)
    host = open_host(folder, state, envs, python, echo=sys.stderr)
    try:
        with progress("Environment"):
            await host.prepare(deployment)
        with progress("Snapshot"):
            return {"function": deployment.key, **await host.take_snapshot(deployment)}
    finally:
        await host.close()


def _store(state: Path | None) -> Store:
    return Store(state_folder(state) / "snapshots")


def _choose(items: Sequence[Kept], which: str) -> Kept:
    """The newest of a function, else the one whose key begins with `which`. Raises `NotFound`, `Conflict`."""
    named = [item for item in items if item.is_of(which)]
    if named:
        return max(named, key=lambda item: item.snapshot.created_at_ns if item.snapshot else 0)
    keyed = [item for item in items if item.key.startswith(which)]
    if not keyed:
        raise NotFound(f"No snapshot of {which!r}.", hint="See them all: gpufn snapshot list", code="no-snapshot")
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
        **{name: facts[name] for name in ("function", "tenant", "kind", "key", "state", "path")},
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


def _columns() -> list[Column]:
    now_ns = time.time_ns()

    def age(at_ns: int | None) -> str:
        return NOTHING if at_ns is None else format_duration(max(0.0, (now_ns - at_ns) / 1e9))

    return [
        Column("FUNCTION", "function"),
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
