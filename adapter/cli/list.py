"""`gpufn list`: functions, what their replicas do, and how the last one came up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from adapter.cli.output import Column, Output, output_options
from adapter.cli.scope import Scope, namespaces_options
from adapter.cli.state import GatewayClient, gateway_option, state_option
from adapter.units import format_duration

_STARTS = 1000
"""The latest of all functions; one that has not started for longer shows none."""

_STATUS = "gpufn.dev/status"
_NOTE = "note"
"""Of a status that is no state: the function runs."""


@click.command()
@click.option("-q", "--quiet", is_flag=True, help="Names only; same as -o name.")
@namespaces_options
@gateway_option
@state_option
@output_options
def command(scope: Scope, quiet: bool, gateway: str, state: Path | None, output: Output) -> None:
    """List functions and their replicas.

    READY counts replicas that take requests, of those wanted. LAST START says how a replica last came up,
    INVOCATIONS how many were answered since the gateway runs. -o wide says what a STATUS of failed means.
    """
    client = GatewayClient(gateway, state)
    namespaces = [scope.namespace] if scope.namespace else client.get_json("/system/namespaces")
    found = [f for name in namespaces for f in client.get_json("/system/functions", namespace=name)]
    replicas = client.get_json("/gpufn/v1/replicas")
    starts = client.get_json("/gpufn/v1/starts", limit=_STARTS)
    rows = [facts(function, replicas, starts) for function in found]
    if quiet:
        output = Output("name")
    if output.for_people:
        rows = [row | shown(row) for row in rows]
    empty = "No functions. Deploy one: faas-cli deploy -f FOLDER/stack.yaml"
    output.rows(rows, _columns(scope, output), empty=empty)


def facts(
    function: Mapping[str, Any], replicas: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One function in numbers; `starts` are the latest first."""
    own = [replica for replica in replicas if is_of(replica, function)]
    last: Mapping[str, Any] = next((start for start in starts if is_of(start, function)), {})
    word, _, problem = function.get("annotations", {}).get(_STATUS, "").partition(":")
    return {
        "name": function["name"],
        "namespace": function["namespace"],
        "ready": function.get("availableReplicas", 0),
        "wanted": function.get("replicas", 0),
        "status": _states(own) if word in ("", _NOTE) else word,
        "last_start_at_ns": last.get("started_at_ns"),
        "last_start_ns": last.get("total_ns"),
        "last_start_rung": last.get("rung"),
        "last_start_error": last.get("error"),
        "invocations": int(function.get("invocationCount", 0)),
        "created_at_ns": instant_ns(function["createdAt"]),
        "image": function["image"],
        "problem": problem.strip(),
    }


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """What a table says of `facts`."""
    last = ""
    if row["last_start_rung"]:
        last = last_start(row["last_start_ns"], row["last_start_rung"], row["last_start_error"])
    return {"ready": f"{row['ready']}/{row['wanted']}", "last_start": last, "age": age(row["created_at_ns"])}


def is_of(thing: Mapping[str, Any], function: Mapping[str, Any]) -> bool:
    return bool(thing["function"] == function["name"] and thing["namespace"] == function["namespace"])


def _states(replicas: Sequence[Mapping[str, Any]]) -> str:
    """``zero``, ``serving``, or ``2 serving, 1 parked``."""
    counts = Counter(replica["state"] for replica in replicas)
    if len(replicas) < 2:
        return next(iter(counts), "zero")
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def last_start(total_ns: int, rung: str, error: str) -> str:
    """``85ms restore``."""
    return f"{format_duration(total_ns / 1e9)} {'failed' if error else rung}"


def age(created_at_ns: int) -> str:
    """``12s``, ``5m``, ``3h``, ``9d``."""
    seconds = max(0, (time.time_ns() - created_at_ns) // 10**9)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def instant_ns(text: str) -> int:
    """Of an RFC 3339 time in whole seconds."""
    return int(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()) * 10**9


def _columns(scope: Scope, output: Output) -> list[Column]:
    if output.form == "csv":
        return [Column(key.upper(), key) for key in _KEYS]
    return [
        Column("NAME", "name"),
        Column("NAMESPACE", "namespace", wide=scope.namespace is not None),
        Column("READY", "ready"),
        Column("STATUS", "status"),
        Column("LAST START", "last_start"),
        Column("INVOCATIONS", "invocations", right=True),
        Column("AGE", "age", right=True),
        Column("IMAGE", "image", wide=True),
        Column("PROBLEM", "problem", wide=True),
    ]


_KEYS = (
    "name", "namespace", "ready", "wanted", "status", "last_start_at_ns", "last_start_ns", "last_start_rung",
    "last_start_error", "invocations", "created_at_ns", "image", "problem",
)  # fmt: skip
