"""`gpufn nodes`: the GPUs of a running gateway, who holds them and who was parked there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adapter.cli.output import NOTHING, Column, Output, note, output_options
from adapter.cli.state import GatewayClient, gateway_option, state_option
from adapter.units import format_size


def _replicas(held: list[dict[str, Any]]) -> str:
    """``embed-1 running 8.0Gi, chat-2 idle 4.0Gi``."""
    return ", ".join(f"{h['replica']} {h['state']} {format_size(h['bytes'])}" for h in held) or NOTHING


def _names(held: list[dict[str, Any]]) -> str:
    return ", ".join(h["replica"] for h in held) or NOTHING


_COLUMNS = [
    Column("GPU", "uuid"),
    Column("NODE", "node", wide=True),
    Column("MODEL", "model"),
    Column("MEMORY", "memory_bytes", format_size, right=True),
    Column("FREE", "free_bytes", format_size, right=True),
    Column("HELD BY", "holders", _replicas),
    Column("PARKED", "parked", _names),
    Column("DRIVER", "driver", wide=True),
]


@click.command()
@gateway_option
@state_option
@output_options
def command(gateway: str, state: Path | None, output: Output) -> None:
    """List GPUs, who holds their memory, and who was parked there.

    FREE is what no replica has been granted, whatever the driver says: a parked process has given its memory
    back, and the driver does not see it. A MIG slice is a GPU of its own.
    """
    nodes = GatewayClient(gateway, state).get_json("/gpufn/v1/nodes")
    rows = [{"node": node["node"], "driver": node["driver"], **device} for node in nodes for device in node["devices"]]
    output.rows(rows, _COLUMNS, empty=" ".join(f"{node['node']} has no GPU. {node['why_not']}" for node in nodes))
    waiting = [function for node in nodes for function in node["waiting"]]
    if waiting:
        note(f"Waiting for one: {', '.join(waiting)}")
