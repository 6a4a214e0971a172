"""`gpufn describe`: one function in full."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from adapter.cli.list import facts, is_of, last_start, shown
from adapter.cli.news import snapshot_news
from adapter.cli.output import Output, format_instant, note, single_output_options
from adapter.cli.scope import DEFAULT_NAMESPACE, namespace_option, split_name
from adapter.cli.state import GatewayClient, gateway_option, state_option
from adapter.units import format_duration

_STARTS = 5


@click.command()
@click.argument("name")
@namespace_option
@gateway_option
@state_option
@single_output_options
def command(name: str, namespace: str, gateway: str, state: Path | None, output: Output) -> None:
    """Show the function NAME in full: what was deployed, its replicas, its snapshot, its latest starts."""
    name, namespace = split_name(name, namespace)
    client = GatewayClient(gateway, state)
    function = client.get_json(f"/system/function/{name}", namespace=namespace)
    replicas = [r for r in client.get_json("/gpufn/v1/replicas") if is_of(r, function)]
    snapshots = client.get_json("/gpufn/v1/snapshots")
    keep_alives = client.get_json("/gpufn/v1/keep-alives")
    starts = client.get_json("/gpufn/v1/starts", function=name, namespace=namespace, limit=_STARTS)
    inside = "" if namespace == DEFAULT_NAMESPACE else f".{namespace}"
    whole = {
        **facts(function, replicas, starts),
        "url": f"{gateway.rstrip('/')}/function/{name}{inside}",
        "replicas": replicas,
        "snapshot": next((s for s in snapshots if s["function"] == f"{name}.{namespace}"), None),
        "keep_alive": next((k for k in keep_alives if k["function"] == f"{name}.{namespace}"), None),
        "starts": starts,
        "environment": function["envVars"],
        "secrets": function["secrets"],
        "labels": function["labels"],
        "annotations": function["annotations"],
        "limits": function.get("limits", {}),
        "requests": function.get("requests", {}),
        "constraints": function["constraints"],
    }
    if not output.for_people:
        output.value(whole)
        return
    output.value(_shown(whole))
    if whole["problem"]:
        note(f"! {whole['problem']}")


def _shown(whole: Mapping[str, Any]) -> dict[str, Any]:
    """For people: one line a fact."""
    summary = shown(whole)
    return {
        **{key: whole[key] for key in ("name", "namespace", "url", "image", "status")},
        "ready": summary["ready"],
        "replicas": [f"{r['replica']} {r['state']} {r['in_flight']} in flight" for r in whole["replicas"]],
        "snapshot": snapshot_news(whole["snapshot"]) if whole["snapshot"] else "",
        "keep_alive": _keep_alive(whole["keep_alive"]),
        "latest_starts": [last_start(s["total_ns"], s["rung"], s["error"]) for s in whole["starts"]],
        "invocations": whole["invocations"],
        "created": f"{format_instant(whole['created_at_ns'])} ({summary['age']} ago)",
        "environment": sorted(whole["environment"]),  # names only: values may be secret
        "secrets": whole["secrets"],
        "labels": _pairs(whole["labels"]),
        "annotations": _pairs(whole["annotations"]),
        "limits": _pairs(whole["limits"]),
        "constraints": whole["constraints"],
    }


def _keep_alive(chosen: Mapping[str, Any] | None) -> str:
    """``26.4s idle: a cold start takes …``."""
    if chosen is None:
        return ""
    return f"{format_duration(chosen['seconds']) + ' idle' if chosen['seconds'] else 'for ever'}: {chosen['reason']}"


def _pairs(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in sorted(values.items()) if key != "gpufn.dev/status"]
