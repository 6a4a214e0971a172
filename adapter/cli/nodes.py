"""`gpufn nodes`: the GPUs of a gateway or a cluster, who holds them, and what else their nodes have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapter.cli.cluster import Cluster, cluster_options
from adapter.cli.list import age, instant_ns
from adapter.cli.output import NOTHING, Column, Output, note, output_options
from adapter.cli.state import GatewayClient, gateway_option, state_option
from adapter.units import format_size

if TYPE_CHECKING:
    from adapter.cli.cluster_nodes import Holding, NodeFacts
    from adapter.policy.placement import Offer


@click.command()
@cluster_options
@gateway_option
@state_option
@output_options
def command(cluster: Cluster | None, gateway: str, state: Path | None, output: Output) -> None:
    """List GPUs, who holds them, and who was parked there.

    Of a gateway, FREE is what no replica has been granted, whatever the driver says: a parked process has given its
    memory back, and the driver does not see it. A MIG slice is a GPU of its own.

    Of a cluster, one line is one GPU resource of one node. A pod that takes a snapshot is named among those who hold
    a GPU, which counts as free all the same: any function's pod takes its place. AGENT is how long a node's agent has
    run. PROBLEM says why nothing new goes there, or what the agent cannot do; -o wide names snapshots and all pods that
    hold a GPU.
    """
    if cluster is None:
        _of_gateway(GatewayClient(gateway, state), output)
    else:
        _of_cluster(cluster, output)


# Of a gateway ---------------------------------------------------------------------------------------------------------


def _replicas(held: list[dict[str, Any]]) -> str:
    """``embed-1 running 8.0Gi, chat-2 idle 4.0Gi``."""
    return ", ".join(f"{h['replica']} {h['state']} {format_size(h['bytes'])}" for h in held) or NOTHING


def _names(held: list[dict[str, Any]]) -> str:
    return ", ".join(h["replica"] for h in held) or NOTHING


_GATEWAY_COLUMNS = [
    Column("GPU", "uuid"),
    Column("NODE", "node", wide=True),
    Column("MODEL", "model"),
    Column("MEMORY", "memory_bytes", format_size, right=True),
    Column("FREE", "free_bytes", format_size, right=True),
    Column("HELD BY", "holders", _replicas),
    Column("PARKED", "parked", _names),
    Column("DRIVER", "driver", wide=True),
]


def _of_gateway(client: GatewayClient, output: Output) -> None:
    nodes = client.get_json("/gpufn/v1/nodes")
    rows = [{"node": node["node"], "driver": node["driver"], **device} for node in nodes for device in node["devices"]]
    empty = " ".join(f"{node['node']} has no GPU. {node['why_not']}" for node in nodes)
    output.rows(rows, _GATEWAY_COLUMNS, empty=empty)
    waiting = [function for node in nodes for function in node["waiting"]]
    if waiting:
        note(f"Waiting for one: {', '.join(waiting)}")


# Of a cluster ---------------------------------------------------------------------------------------------------------


def _of_cluster(cluster: Cluster, output: Output) -> None:
    from adapter.cli.cluster_nodes import read_nodes

    found = [facts for facts in cluster.ask(read_nodes) if facts.is_of_interest]
    rows = [_row(facts, offer) for facts in found for offer in facts.node.offers or (None,)]
    if output.for_people:
        rows = [row | {"problem": "; ".join(row["problems"]), "agent": _agent(row["agent"])} for row in rows]
    output.rows(
        rows,
        _cluster_columns(output),
        empty="No node of this cluster has GPUs, as far as it tells: gpufn doctor --cluster",
    )


def _row(facts: NodeFacts, offer: Offer | None) -> dict[str, Any]:
    """One GPU resource of one node; with no resource where a node has an agent alone."""
    node, agent = facts.node, facts.agent
    resource = offer.resource if offer else ""
    capability = offer.compute_capability if offer else None
    return {
        "node": node.name,
        "resource": resource,
        "model": offer.model if offer else "",
        "memory_bytes": offer.memory_bytes if offer else 0,
        "compute_capability": ".".join(map(str, capability)) if capability else "",
        "mig_profile": offer.mig_profile if offer else "",
        "shares": offer.shares if offer else 1,
        "total": offer.allocatable if offer else 0,
        "used": offer.used if offer else 0,
        "free": offer.free if offer else 0,
        "holders": [_holder(held) for held in facts.held if held.resource == resource],
        "snapshots": [{"name": name, "bytes": size} for name, size in sorted(node.snapshots.items())],
        "spot": node.is_spot,
        "driver": str(facts.said.get("driver") or ""),
        "agent": {"pod": agent.pod, "ready": agent.is_ready, "started_at": agent.started_at} if agent else None,
        "observed_at": str(facts.said.get("observedAt") or ""),
        "problems": list(_problems(facts)),
    }


def _holder(held: Holding) -> dict[str, Any]:
    return {
        "pod": held.pod,
        "namespace": held.namespace,
        "function": held.function,
        "units": held.units,
        "takes_snapshot": held.takes,
    }


def _problems(facts: NodeFacts) -> Iterable[str]:
    from adapter.policy.placement import CLOSED

    if facts.node.why_not:
        yield CLOSED.get(facts.node.why_not, facts.node.why_not).removeprefix("It is ").rstrip(".")
    if why_not := facts.said.get("whyNot"):
        yield str(why_not).rstrip(".")
    restore = facts.said.get("restore") or {}
    if restore.get("works") is False:
        yield f"no snapshots: {str(restore.get('whyNot') or 'CRIU does not work').rstrip('.')}"


def _agent(agent: Mapping[str, Any] | None) -> str:
    """``5h``, the age of one that is ready; else what is wrong."""
    if agent is None:
        return "none"
    if not agent["ready"]:
        return "not ready"
    return age(instant_ns(agent["started_at"])) if agent["started_at"] else "ready"


def _holders(held: list[dict[str, Any]]) -> str:
    """Functions by name, each once and with its count, snapshots that are being taken, and pods of others:
    ``default/trainer-0``."""
    units: dict[str, int] = {}
    for each in held:
        who = each["function"] or f"{each['namespace']}/{each['pod']}"
        who = f"snapshot of {each['takes_snapshot']}" if each["takes_snapshot"] else who
        units[who] = units.get(who, 0) + each["units"]
    return ", ".join(who if count == 1 else f"{who} ×{count}" for who, count in units.items()) or NOTHING


def _pods(held: list[dict[str, Any]]) -> str:
    return ", ".join(f"{each['namespace']}/{each['pod']}" for each in held) or NOTHING


def _snapshots(found: list[dict[str, Any]]) -> str:
    return ", ".join(f"{each['name']} {format_size(each['bytes'])}" for each in found) or NOTHING


def _size(size_bytes: int) -> str:
    return format_size(size_bytes) if size_bytes else NOTHING


def _cluster_columns(output: Output) -> list[Column]:
    wide = output.form == "wide"
    problems = "problem" if output.for_people else "problems"
    return [
        Column("NODE", "node"),
        Column("RESOURCE", "resource", wide=True),
        Column("MODEL", "model"),
        Column("MEMORY", "memory_bytes", _size, right=True),
        Column("TOTAL", "total", right=True),
        Column("USED", "used", right=True),
        Column("FREE", "free", right=True),
        Column("HELD BY", "holders", _pods if wide else _holders),
        Column("SNAPSHOTS", "snapshots", _snapshots if wide else lambda found: str(len(found)), right=not wide),
        Column("SPOT", "spot", lambda is_spot: "spot" if is_spot else NOTHING),
        Column("AGENT", "agent"),
        Column("DRIVER", "driver", wide=True),
        Column("PROBLEM", problems),
    ]
