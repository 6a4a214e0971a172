"""`gpufn starts`: how replicas came up, phase by phase: as a table, as bars, as a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from adapter.cli.cluster import Cluster, cluster_options
from adapter.cli.ledger import open_ledger
from adapter.cli.news import skipped_news
from adapter.cli.output import NOTHING, Column, Output, format_instant, note, output_options
from adapter.cli.scope import Scope, scope_options
from adapter.cli.state import state_folder, state_option
from adapter.cli.timeline import bars, picture
from adapter.errors import ConfigError
from adapter.records import PhaseName, StartRecord
from adapter.units import format_duration, parse_duration_s


@click.command()
@cluster_options
@scope_options
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
    cluster: Cluster | None,
    scope: Scope,
    last: int,
    since: str | None,
    timeline: bool,
    picture_file: Path | None,
    state: Path | None,
    output: Output,
) -> None:
    """Show how replicas came up, phase by phase, the latest last.

    RUNG is the one of the start ladder that served: resume, restore, start or load; -o wide says which faster
    ones were skipped, --timeline why. Phases may overlap. TOTAL is wall time, from asking for the replica until
    the first answer has ended. A call that came while the function was still being prepared waited for that
    too: X-Duration-Seconds of its answer and the metric gateway_functions_seconds count all of it.

    Of a cluster, a start begins when its pod was made: SCHEDULE lasts until it had a node, PULL until its images were
    there.
    """
    with open_ledger(state, cluster) as ledger:
        records = [] if ledger is None else ledger.starts(scope.name, scope.namespace, last, _since_ns(since))
    if not records and cluster is None:
        scope.require_known(state_folder(state))
    records.reverse()
    if picture_file is not None:
        _write(picture_file, picture(records))
    if timeline and output.for_people and records:
        click.echo(bars(records))
    elif output.form in ("json", "yaml"):
        output.rows([record.to_json() for record in records], ())
    else:
        output.rows(
            [_row(r, output) for r in records],
            _columns(records, scope, output),
            name="replica",
            empty=_empty(scope, cluster),
        )


def _empty(scope: Scope, cluster: Cluster | None) -> str:
    said = f"No starts{f' of {scope}' if scope.name else ''}."
    if cluster is not None:  # whose functions answer at addresses that only their framework knows
        return f"{said} Agents tell of one some seconds after its pod is ready. Of other namespaces: -A"
    return f"{said} Call a function: gpufn invoke {scope.name or 'NAME'}"


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


def _row(record: StartRecord, output: Output) -> dict[str, Any]:
    """One start, flat: phases that come twice (a rung that failed, and the next one) are added up."""
    row: dict[str, Any] = record.to_json()
    if record.error and output.for_people:
        row["rung"] += " failed"
    row["skipped"] = [f"{s.rung.value}: {_first_sentence(s.reason) or s.code}" for s in skipped_news(record)]
    for phase in record.phases:
        key = f"{phase.name.value}_ns"
        row[key] = row.get(key, 0) + phase.end_ns - phase.start_ns
    return row


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def _columns(records: Sequence[StartRecord], scope: Scope, output: Output) -> list[Column]:
    present = {phase.name for record in records for phase in record.phases}
    failed = any(record.error for record in records)
    for_people = output.form != "csv"
    return [
        Column("STARTED", "started_at_ns", format_instant),
        Column("FUNCTION", "function"),
        Column("NAMESPACE", "namespace", wide=for_people and scope.namespace is not None),
        Column("RUNG", "rung"),
        Column("TOTAL", "total_ns", _duration, right=True),
        *(Column(n.value.upper(), f"{n.value}_ns", _duration, right=True) for n in PhaseName if n in present),
        Column("REVISION", "revision", wide=for_people),
        Column("REPLICA", "replica", wide=for_people),
        Column("HELD", "held_requests", right=True, wide=for_people),
        Column("SKIPPED", "skipped", wide=for_people),
        *([Column("ERROR", "error")] if failed or not for_people else []),
    ]


def _duration(nanoseconds: int | None) -> str:
    return NOTHING if nanoseconds is None else format_duration(nanoseconds / 1e9)
