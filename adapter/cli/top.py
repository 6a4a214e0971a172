"""`gpufn top`: the replicas of a running gateway as they are now."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from adapter.cli.output import Column, Output, note, output_options
from adapter.cli.state import GatewayClient, gateway_option, state_option

_COLUMNS = [
    Column("REPLICA", "replica"),
    Column("FUNCTION", "function"),
    Column("NAMESPACE", "namespace", wide=True),
    Column("REVISION", "revision", wide=True),
    Column("STATE", "state"),
    Column("IN-FLIGHT", "in_flight", right=True),
    Column("PATH", "rung"),
    Column("SNAPSHOT", "building_snapshot", lambda builds: "building" if builds else "–", wide=True),
]


@click.command()
@click.argument("function", required=False)
@click.option("-w", "--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option(
    "--every", "every_s", default=2.0, show_default=True, type=click.FloatRange(0.1, 3600), metavar="SECONDS",
    help="With --watch: how often.",
)  # fmt: skip
@gateway_option
@state_option
@output_options
def command(
    function: str | None, watch: bool, every_s: float, gateway: str, state: Path | None, output: Output
) -> None:
    """Show replicas as they are now.

    PATH is the rung of the start ladder by which a replica came up; it has none while it starts.
    """
    client = GatewayClient(gateway, state)
    redraw = watch and sys.stdout.isatty() and output.form in ("table", "wide")
    while True:
        rows = _replicas(client, function)
        if redraw:
            click.clear()
            note(f"{time.strftime('%H:%M:%S')}  {len(rows)} replicas at {gateway}; Ctrl-C ends this")
        output.rows(rows, _COLUMNS, empty="No replicas: everything is at zero." if not redraw else "")
        if not watch:
            return
        time.sleep(every_s)


def _replicas(client: GatewayClient, function: str | None) -> list[dict[str, Any]]:
    """In order of functions; a name with a namespace, ``embed.openfaas-fn``, means that one only."""
    rows: list[dict[str, Any]] = client.get_json("/gpufn/v1/replicas")
    chosen = [r for r in rows if function is None or function in (r["function"], f"{r['function']}.{r['namespace']}")]
    return sorted(chosen, key=lambda r: (r["function"], r["namespace"], r["replica"]))
