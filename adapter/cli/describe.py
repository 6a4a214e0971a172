"""`gpufn describe`: one function in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adapter.cli.list import last_start, row
from adapter.cli.output import Output, note, output_options
from adapter.cli.state import GatewayClient, gateway_option, namespace_option, state_option
from adapter.units import format_duration, format_size

_STARTS = 5


@click.command()
@click.argument("name")
@namespace_option
@gateway_option
@state_option
@output_options
def command(name: str, namespace: str, gateway: str, state: Path | None, output: Output) -> None:
    """Show the function NAME in full: what was deployed, its replicas, its snapshot, its latest starts."""
    name, _, inside = name.partition(".")
    namespace = inside or namespace
    client = GatewayClient(gateway, state)
    function = client.get_json(f"/system/function/{name}", namespace=namespace)
    facts = {
        **function,
        "url": f"{gateway.rstrip('/')}/function/{name}" + (f".{namespace}" if inside else ""),
        "replica_states": [r for r in client.get_json("/gpufn/v1/replicas") if _is(r, name, namespace)],
        "snapshot": next(
            (s for s in client.get_json("/gpufn/v1/snapshots") if s["function"] == f"{name}.{namespace}"), None
        ),
        "starts": client.get_json("/gpufn/v1/starts", function=name, namespace=namespace, limit=_STARTS),
    }
    if output.form not in ("table", "wide"):
        output.value(facts)
        return
    output.value(_shown(facts))
    problem = row(function, [], [])["problem"]
    if problem:
        note(f"! {problem}")


def _is(replica: dict[str, Any], name: str, namespace: str) -> bool:
    return bool(replica["function"] == name and replica["namespace"] == namespace)


def _shown(facts: dict[str, Any]) -> dict[str, Any]:
    """For people: one line a fact."""
    summary = row(facts, facts["replica_states"], facts["starts"])
    return {
        "name": facts["name"],
        "namespace": facts["namespace"],
        "url": facts["url"],
        "image": facts["image"],
        "status": summary["status"],
        "ready": summary["ready"],
        "replicas": [f"{r['replica']} {r['state']} {r['in_flight']} in flight" for r in facts["replica_states"]],
        "snapshot": _snapshot(facts["snapshot"]),
        "latest_starts": [last_start(record) for record in facts["starts"]],
        "invocations": summary["invocations"],
        "created": f"{facts['createdAt']} ({summary['age']} ago)",
        "environment": sorted(facts["envVars"]),  # names only: values may be secret
        "secrets": facts["secrets"],
        "labels": _pairs(facts["labels"]),
        "annotations": _pairs(facts["annotations"]),
        "limits": _pairs(facts.get("limits", {})),
        "constraints": facts["constraints"],
    }


def _pairs(values: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in sorted(values.items()) if key != "gpufn.dev/status"]


def _snapshot(news: dict[str, Any] | None) -> str:
    if news is None:
        return ""
    if news["state"] == "published":
        return f"{format_size(news['bytes'])}, taken in {format_duration(news['seconds'])}"
    return f"{news['state']}: {news['reason']}".rstrip(": ")
