"""`gpufn logs`: what a function's replicas print."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click

from adapter.cli.output import note
from adapter.cli.scope import namespace_option, split_name
from adapter.cli.state import GatewayClient, gateway_option, state_option
from adapter.errors import Unavailable
from adapter.units import parse_duration_s

_CONNECT_S = 10


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--tail", type=click.IntRange(0), default=0, metavar="N", help="Only the last N lines.")
@click.option("--since", metavar="DURATION", help="Only lines of the last 30s, 5m, 2h, ….")
@click.option("--replica", default="", help="Only lines of this replica.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form.")
@namespace_option
@gateway_option
@state_option
def command(
    name: str,
    follow: bool,
    tail: int,
    since: str | None,
    replica: str,
    output: str,
    namespace: str,
    gateway: str,
    state: Path | None,
) -> None:
    """Print what the function NAME has printed: time (UTC), replica, line.

    While a snapshot is taken, a second process loads beside the one that serves: its lines stand under the
    same replica.
    """
    import requests

    name, namespace = split_name(name, namespace)
    query = {
        "name": name,
        "namespace": namespace,
        "instance": replica,
        "tail": str(tail),
        "since": _since(since),
        "follow": str(follow).lower(),
    }
    client = GatewayClient(gateway, state)
    limits = (_CONNECT_S, None)  # a followed log may be silent for long
    printed = False
    with client.request("GET", "/system/logs", params=query, stream=True, timeout=limits) as response:
        try:
            for line in response.iter_lines(chunk_size=None):
                printed = True
                click.echo(line.decode() if output == "json" else _text(json.loads(line)))
        except requests.RequestException as exc:
            raise Unavailable("The gateway is gone.", why=f"{exc}.", code="no-gateway") from exc
    if not printed:
        note(f"{name} has printed nothing{' in that time' if since else ''}.")


def _since(since: str | None) -> str:
    if since is None:
        return ""
    try:
        start = datetime.now(timezone.utc) - timedelta(seconds=parse_duration_s(since))
    except (ValueError, OverflowError) as exc:
        raise click.BadParameter(f"{since!r} is not {exc}.", param_hint="'--since'") from exc
    return start.isoformat().replace("+00:00", "Z")


def _text(line: dict[str, Any]) -> str:
    when = datetime.fromisoformat(line["timestamp"]).astimezone(timezone.utc)
    return f"{when:%Y-%m-%dT%H:%M:%SZ} {line['instance']}  {line['text']}"
