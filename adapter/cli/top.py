"""`gpufn top`: the replicas of a running gateway as they are now."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from adapter.cli.output import NOTHING, Column, Output, note, output_options
from adapter.cli.scope import Scope, scope_options
from adapter.cli.state import GatewayClient, gateway_option, state_option


@click.command()
@scope_options
@click.option("-w", "--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option(
    "--every", "every_s", default=2.0, show_default=True, type=click.FloatRange(0.1, 3600), metavar="SECONDS",
    help="With --watch: how often.",
)  # fmt: skip
@gateway_option
@state_option
@output_options
def command(scope: Scope, watch: bool, every_s: float, gateway: str, state: Path | None, output: Output) -> None:
    """Show replicas as they are now.

    RUNG is that of the start ladder by which a replica came up; it has none while it starts.
    """
    client = GatewayClient(gateway, state)
    redraw = watch and sys.stdout.isatty() and output.for_people
    while True:
        rows = _replicas(client, scope)
        if redraw:
            click.clear()
            note(f"{time.strftime('%H:%M:%S')}  {len(rows)} replicas at {gateway}; Ctrl-C ends this")
        output.rows(rows, _columns(scope), empty="" if redraw else _empty(scope))
        if not watch:
            return
        time.sleep(every_s)


def _replicas(client: GatewayClient, scope: Scope) -> list[dict[str, Any]]:
    """In order of functions. Raises `NotFound` for a function that is not deployed."""
    rows: list[dict[str, Any]] = client.get_json("/gpufn/v1/replicas")
    chosen = [row for row in rows if scope.has(row["function"], row["namespace"])]
    if not chosen and scope.name and scope.namespace:
        client.get_json(f"/system/function/{scope.name}", namespace=scope.namespace)
    return sorted(chosen, key=lambda r: (r["function"], r["namespace"], r["replica"]))


def _empty(scope: Scope) -> str:
    return f"No replicas of {scope}: it is at zero." if scope.name else "No replicas: everything is at zero."


def _columns(scope: Scope) -> list[Column]:
    return [
        Column("REPLICA", "replica"),
        Column("FUNCTION", "function"),
        Column("NAMESPACE", "namespace", wide=scope.namespace is not None),
        Column("REVISION", "revision", wide=True),
        Column("STATE", "state"),
        Column("IN-FLIGHT", "in_flight", right=True),
        Column("RUNG", "rung"),
        Column("SNAPSHOT", "building_snapshot", lambda builds: "building" if builds else NOTHING, wide=True),
    ]
