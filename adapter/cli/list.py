"""`gpufn list`: functions, what their replicas do, and how the last one came up."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from adapter.cli.output import Column, Output, output_options
from adapter.cli.state import GatewayClient, gateway_option, namespace_option, state_option
from adapter.units import format_duration

_STARTS = 1000
"""The latest of all functions; one that has not started for longer shows none."""

_STATUS = "gpufn.dev/status"

_COLUMNS = [
    Column("NAME", "name"),
    Column("NAMESPACE", "namespace", wide=True),
    Column("READY", "ready"),
    Column("STATUS", "status"),
    Column("LAST START", "last_start"),
    Column("CALLS", "invocations", right=True),
    Column("AGE", "age", right=True),
    Column("IMAGE", "image", wide=True),
    Column("PROBLEM", "problem", wide=True),
]


@click.command()
@namespace_option
@click.option("-A", "--all-namespaces", is_flag=True, help="Of every namespace.")
@click.option("-q", "--quiet", is_flag=True, help="Names only; same as -o name.")
@gateway_option
@state_option
@output_options
def command(
    namespace: str, all_namespaces: bool, quiet: bool, gateway: str, state: Path | None, output: Output
) -> None:
    """List functions and their replicas.

    READY counts replicas that take requests, of those wanted. LAST START says how a replica last came up.
    """
    client = GatewayClient(gateway, state)
    namespaces = client.get_json("/system/namespaces") if all_namespaces else [namespace]
    found = [f for name in namespaces for f in client.get_json("/system/functions", namespace=name)]
    replicas = client.get_json("/gpufn/v1/replicas")
    starts = client.get_json("/gpufn/v1/starts", limit=_STARTS)
    rows = [row(function, replicas, starts) for function in found]
    if quiet:
        output = Output("name")
    output.rows(rows, _COLUMNS, empty="No functions. Deploy one: faas-cli deploy --image FOLDER --name NAME")


def row(function: dict[str, Any], replicas: list[dict[str, Any]], starts: list[dict[str, Any]]) -> dict[str, Any]:
    """One function as a row; `starts` are the latest first."""
    own = [replica for replica in replicas if _is_of(replica, function)]
    last = next((start for start in starts if _is_of(start, function)), None)
    problem = function.get("annotations", {}).get(_STATUS, "")
    ready, wanted = function.get("availableReplicas", 0), function.get("replicas", 0)
    return {
        "name": function["name"],
        "namespace": function["namespace"],
        "ready": f"{ready}/{wanted}",
        "status": problem.partition(":")[0] or _states(own),
        "last_start": None if last is None else last_start(last),
        "invocations": int(function.get("invocationCount", 0)),
        "created_at": function["createdAt"],
        "age": age(function["createdAt"]),
        "image": function["image"],
        "problem": problem.partition(":")[2].strip(),
    }


def _is_of(thing: dict[str, Any], function: dict[str, Any]) -> bool:
    return bool(thing["function"] == function["name"] and thing["namespace"] == function["namespace"])


def _states(replicas: list[dict[str, Any]]) -> str:
    """``zero``, ``serving``, or ``2 serving, 1 parked``."""
    counts = Counter(replica["state"] for replica in replicas)
    if len(replicas) < 2:
        return next(iter(counts), "zero")
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def last_start(record: dict[str, Any]) -> str:
    """``85ms restore``."""
    how = "failed" if record["error"] else record["rung"]
    return f"{format_duration(record['total_ns'] / 1e9)} {how}"


def age(created_at: str) -> str:
    """Since an RFC 3339 time: ``12s``, ``5m``, ``3h``, ``9d``."""
    created = datetime.fromisoformat(created_at.replace("Z", "+00:00"))
    seconds = max(0, int((datetime.now(timezone.utc) - created).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
