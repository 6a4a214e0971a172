"""`gpufn usage`: who held what for how long, and what it costs, from the ledger of a state folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from adapter.cli.cluster import Cluster, cluster_options
from adapter.cli.ledger import open_ledger
from adapter.cli.output import NOTHING, Column, Output, format_instant, note, output_options, warn
from adapter.cli.period import period
from adapter.cli.scope import Scope, scope_options
from adapter.cli.state import state_folder, state_option
from adapter.errors import ConfigError
from adapter.policy.pricing import DEFAULT_CLASS, PricePlan
from adapter.policy.report import GROUP_ALIASES, GROUPS, ReportRow, report, unit_of
from adapter.records import LeaseInterval, LeasePhase

_Command = TypeVar("_Command", bound=Callable[..., Any])
_EMPTY = "Nothing was held in this time. A wider one: --for 7d"


@click.group()
def command() -> None:
    """Report GPU-seconds and what they cost.

    A second of half a GPU is half a GPU-second. Replicas without a GPU count replica-seconds. Replicas that
    run are counted up to their last heartbeat, ten seconds ago at most.
    """


def _period_options(command: _Command) -> _Command:
    for option in (
        click.option("--end", metavar="INSTANT", help="End, excluded [default: now]."),
        click.option("--start", metavar="INSTANT", help="Start, included: 2026-11-20 or 2026-11-20T08:00:00+01:00."),
        click.option(
            "--for", "words", metavar="TIME", help="today, yesterday, month, last-month, 24h, 7d [default: today]."
        ),
    ):
        command = option(command)
    return command


def _read_groups(_context: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    words = value.replace(",", " ").replace("-", "_").split()
    names = tuple(dict.fromkeys(GROUP_ALIASES.get(word, word) for word in words))
    for name in names:
        if name not in GROUPS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(GROUPS)}.")
    return names


@command.command("report")
@cluster_options
@_period_options
@click.option(
    "--by", default="function,namespace", show_default=True, metavar="NAMES", callback=_read_groups,
    help=f"One or more of {', '.join(GROUPS)}.",
)  # fmt: skip
@click.option(
    "--prices", type=click.Path(path_type=Path, dir_okay=False), help="Price plan (YAML); default: no prices."
)
@state_option
@output_options
def report_command(
    cluster: Cluster | None,
    words: str | None,
    start: str | None,
    end: str | None,
    by: tuple[str, ...],
    prices: Path | None,
    state: Path | None,
    output: Output,
) -> None:
    """Add up what was held, by function or otherwise. Times are UTC.

    ALLOCATED is all time but parked, in which a replica gives its GPU back; RUNNING is the part of it with a
    request in flight, RESTORING that until a replica could take one, whatever the way: plain loads too. A price plan names the price classes of functions (gpufn.dev/price-class):

    \b
      currency: EUR
      classes:
        standard:
          per_gpu_second: 0.000583
          per_replica_second: 0.00001
          billed: [restoring, running, idle, draining]
    """  # noqa: D301  # click wants the character, to leave a paragraph as it is
    chosen = period(words, start, end, time.time_ns())
    plan = read_plan(prices)
    with open_ledger(state, cluster) as ledger:
        intervals = ledger.summary(chosen.start_ns, chosen.end_ns) if ledger else []
        starts = ledger.starts(limit=None, since_ns=chosen.start_ns) if ledger else []
    rows = report(intervals, starts, plan, start_ns=chosen.start_ns, end_ns=chosen.end_ns, by=by)
    output.rows([_row(row, by, plan) for row in rows], _columns(by, plan, rows, output), empty=_EMPTY)
    if rows:
        note(f"{chosen}{f'; prices: {prices}' if prices else ''}")
    unpriced = sorted({interval.price_class for interval in intervals} - set(plan.classes))
    if prices and unpriced:
        instead = DEFAULT_CLASS if DEFAULT_CLASS in plan.classes else "nothing"
        warn(f"{prices} has no price for {', '.join(unpriced)}: counted as {instead}.")


@command.command("leases")
@cluster_options
@scope_options
@click.option("--raw", is_flag=True, help="As they are in the ledger: a new one at each heartbeat.")
@_period_options
@state_option
@output_options
def leases_command(
    cluster: Cluster | None,
    scope: Scope,
    raw: bool,
    words: str | None,
    start: str | None,
    end: str | None,
    state: Path | None,
    output: Output,
) -> None:
    """List the intervals behind a report: every one that overlaps its time.

    One line says how long a replica was in one phase, and has the id of the first of its intervals in the ledger.
    """
    chosen = period(words, start, end, time.time_ns())
    with open_ledger(state, cluster) as ledger:
        found = ledger.intervals(chosen.start_ns, chosen.end_ns, scope.name) if ledger else []
    intervals = [interval for interval in found if scope.has(interval.function, interval.namespace)]
    if not intervals and cluster is None:
        scope.require_known(state_folder(state))
    rows = [_lease_row(interval) for interval in (intervals if raw else merged(intervals))]
    output.rows(rows, _lease_columns(scope), empty=_EMPTY)
    if intervals:
        note(str(chosen))


def merged(intervals: Iterable[LeaseInterval]) -> list[LeaseInterval]:
    """Those that follow each other and differ in nothing else as one, under the first's id; in order."""
    whole: list[LeaseInterval] = []
    last_of: dict[tuple[str, str], int] = {}  # replica and device -> where its latest is
    for interval in intervals:
        held = interval.replica, interval.device
        at = last_of.get(held)
        if at is not None and _goes_on(whole[at], interval):
            whole[at] = replace(whole[at], ended_at_ns=interval.ended_at_ns)
        else:
            last_of[held] = len(whole)
            whole.append(interval)
    return whole


def _goes_on(first: LeaseInterval, second: LeaseInterval) -> bool:
    """Whether `second` says that what `first` says lasted longer."""
    begun = replace(second, id=first.id, started_at_ns=first.started_at_ns, ended_at_ns=first.ended_at_ns)
    return first.ended_at_ns == second.started_at_ns and first == begun


def read_plan(path: Path | None) -> PricePlan:
    """The plan of a file; without one, everything is free. Raises `ConfigError`."""
    if path is None:
        return PricePlan()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        why = (exc.strerror if isinstance(exc, OSError) else None) or " ".join(str(exc).split())
        raise ConfigError(f"The price plan {path} cannot be read.", why=f"{why}.", code="bad-prices") from exc
    return PricePlan.parse(data, str(path))


def _row(row: ReportRow, by: Sequence[str], plan: PricePlan) -> dict[str, Any]:
    """A row under its wire names; nanoseconds rounded to whole ones here, and only here."""
    return {
        **dict(zip(by, row.group, strict=True)),
        "unit": row.unit,
        "gpu_models": sorted(row.gpu_models),
        "allocated_ns": round(row.allocated_ns),
        **{f"{phase.value}_ns": round(row.phase_ns.get(phase, Decimal(0))) for phase in LeasePhase},
        "busy_ratio": round(row.busy_ratio, 6),
        "starts": None if "phase" in by else row.starts,
        "failed_starts": None if "phase" in by else row.failed_starts,
        "cost": format(row.cost.normalize(), "f") if plan.classes else None,
        "currency": plan.currency or None,
    }


def _columns(by: Sequence[str], plan: PricePlan, rows: Sequence[ReportRow], output: Output) -> list[Column]:
    money = f" {plan.currency}" if plan.currency else ""
    shows_models = "gpu_model" not in by and any(row.gpu_models for row in rows)
    return [
        *(Column(name.upper().replace("_", " "), name) for name in by),
        *([Column("GPU", "gpu_models")] if shows_models else []),
        Column("UNIT", "unit"),
        Column("ALLOCATED", "allocated_ns", _seconds, right=True),
        *(Column(phase.value.upper(), f"{phase.value}_ns", _seconds, right=True) for phase in LeasePhase),
        Column("BUSY", "busy_ratio", lambda ratio: f"{ratio:.0%}", right=True),
        *([] if "phase" in by else [Column("STARTS", "starts", right=True)]),
        *([] if "phase" in by else [Column("FAILED", "failed_starts", right=True, wide=True)]),
        *([Column(f"COST{money}", "cost", _money, right=True)] if plan.classes else []),
        *([Column("CURRENCY", "currency")] if plan.classes and output.form == "csv" else []),
    ]


def _lease_row(interval: LeaseInterval) -> Mapping[str, Any]:
    row = {name: getattr(interval, name) for name in LeaseInterval.__slots__}
    return row | {
        "phase": interval.phase.value,
        "unit": unit_of(interval),
        "held_ns": interval.ended_at_ns - interval.started_at_ns,
    }


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e9:,.2f}" if nanoseconds else NOTHING


def _money(text: str) -> str:
    return f"{Decimal(text):,.4f}"


def _lease_columns(scope: Scope) -> list[Column]:
    return [
        Column("ID", "id"),
        Column("FUNCTION", "function"),
        Column("NAMESPACE", "namespace", wide=scope.namespace is not None),
        Column("REVISION", "revision", wide=True),
        Column("TENANT", "tenant", wide=True),
        Column("CLASS", "price_class", wide=True),
        Column("PHASE", "phase"),
        Column("DEVICE", "device"),
        Column("GPU", "gpu_model", wide=True),
        Column("SHARE", "share", lambda share: f"{share:g}", right=True),
        Column("STARTED", "started_at_ns", format_instant),
        Column("ENDED", "ended_at_ns", format_instant),
        Column("SECONDS", "held_ns", lambda ns: f"{ns / 1e9:,.3f}", right=True),
    ]
