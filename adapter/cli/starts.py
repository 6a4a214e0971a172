"""`gpufn starts`: how replicas came up, phase by phase: as a table, as bars, as a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from adapter.cli.ledger import open_ledger
from adapter.cli.output import NOTHING, Column, Output, format_instant, note, output_options
from adapter.cli.state import state_option
from adapter.cli.timeline import bars, picture
from adapter.errors import ConfigError
from adapter.records import PhaseName, StartRecord
from adapter.units import format_duration, parse_duration_s


@click.command()
@click.argument("function", required=False)
@click.option("-n", "--namespace", help="Only starts in this namespace.")
@click.option("--last", default=20, show_default=True, type=click.IntRange(1, 100_000), help="How many, at most.")
@click.option("--since", metavar="DURATION", help="Only those of the last 30m, 2h, ….")
@click.option("--timeline", is_flag=True, help="Draw each start's phases as bars.")
@click.option(
    "--picture", "picture_file", metavar="FILE.svg", type=click.Path(path_type=Path, dir_okay=False),
    help="Write the starts as a picture, one lane each, all to one scale.",
)  # fmt: skip
@state_option
@output_options
def command(
    function: str | None,
    namespace: str | None,
    last: int,
    since: str | None,
    timeline: bool,
    picture_file: Path | None,
    state: Path | None,
    output: Output,
) -> None:
    """Show how replicas came up, phase by phase, the latest last.

    PATH is the rung of the start ladder that served: resume, restore, start or load; -o wide says why faster
    ones were skipped. Phases may overlap; TOTAL is wall time, from the first request to its answer.
    """
    with open_ledger(state) as ledger:
        records = [] if ledger is None else ledger.starts(function, namespace, last, _since_ns(since))
    records.reverse()
    if picture_file is not None:
        _write(picture_file, picture(records))
    if timeline and output.form in ("table", "wide") and records:
        click.echo(bars(records))
    elif output.form in ("json", "yaml"):
        output.rows([record.to_json() for record in records], ())
    else:
        hint = f"No starts{f' of {function}' if function else ''} yet. Call a function: gpufn invoke NAME"
        output.rows([_row(record) for record in records], _columns(records, output), empty=hint)


def _since_ns(since: str | None) -> int:
    if since is None:
        return 0
    try:
        return time.time_ns() - round(parse_duration_s(since) * 1e9)
    except ValueError as exc:
        raise click.BadParameter(f"{since!r} is not {exc}.", param_hint="'--since'") from exc


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"The picture cannot be written to {path}.", why=f"{exc.strerror}.", code="bad-file") from exc
    note(f"✓ wrote {path}")


def _row(record: StartRecord) -> dict[str, Any]:
    """One start, flat: phases that come twice (a rung that failed, and the next one) are added up."""
    row: dict[str, Any] = record.to_json()
    row |= {"started_at": record.started_at_ns, "path": record.rung.value + (" failed" if record.error else "")}
    row["skipped"] = [
        f"{skipped.rung.value}: {skipped.reason.rstrip('.') or skipped.code}" for skipped in record.skipped
    ]
    for phase in record.phases:
        key = f"{phase.name.value}_ns"
        row[key] = row.get(key, 0) + phase.end_ns - phase.start_ns
    return row


def _columns(records: Sequence[StartRecord], output: Output) -> list[Column]:
    present = {phase.name for record in records for phase in record.phases}
    failed = any(record.error for record in records)
    return [
        Column("STARTED", "started_at_ns" if output.form == "csv" else "started_at", format_instant),
        Column("FUNCTION", "function"),
        Column("NAMESPACE", "namespace", wide=output.form != "csv"),
        Column("PATH", "path"),
        Column("TOTAL", "total_ns", _duration, right=True),
        *(Column(n.value.upper(), f"{n.value}_ns", _duration, right=True) for n in PhaseName if n in present),
        Column("REVISION", "revision", wide=True),
        Column("REPLICA", "replica", wide=True),
        Column("HELD", "held_requests", right=True, wide=True),
        Column("SKIPPED", "skipped", _sentences, wide=True),
        *([Column("ERROR", "error")] if failed else []),
    ]


def _duration(nanoseconds: int | None) -> str:
    return NOTHING if nanoseconds is None else format_duration(nanoseconds / 1e9)


def _sentences(reasons: Sequence[str]) -> str:
    return "; ".join(reasons) or NOTHING
