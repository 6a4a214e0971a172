"""`gpufn explain`: why a pod is where it is, and where a function would go now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from adapter.cli.cluster import Cluster, only_cluster_options
from adapter.cli.output import NOTHING, Column, Output, format_instant, format_table, single_output_options
from adapter.errors import GpuError
from adapter.units import format_duration

if TYPE_CHECKING:
    from adapter.cli.explained import Explained
    from adapter.policy.placement import Verdict

_EACH_NODE = 20
"""So many nodes that do not fit have a line each; more of them are told by reason."""


@click.command()
@click.argument("what", metavar="POD|FUNCTION")
@click.option("-n", "--namespace", help="Namespace of it [default: the context's].")
@only_cluster_options
@single_output_options
def command(what: str, namespace: str | None, cluster: Cluster, output: Output) -> None:
    """Say what gpufn understood of a pod or a function, and what each node is to it.

    Of a pod: what was decided when it was made, what the scheduler says, and how every node is judged now, the pod
    itself left out. Of a function: what its annotations, labels and limits say, which of two that say the same
    wins, how long it is kept warm and why, what it held of its budget today, which nodes have its snapshot, which pods
    take it on others or could not, and where its next replica would go. pod/NAME and function/NAME say which is meant
    where both are there.

    SCORE compares nodes: 100 is the best of them. WAKE is how long until it would answer there, estimated. Exit
    code 8 where no node fits.
    """
    from adapter.cli.explained import explained

    found = cluster.ask(lambda api: explained(api, what, namespace))
    if output.for_people:
        output.value(_shown(found))
        if found.verdicts:
            click.echo()
            click.echo(_table(found.verdicts, wide=output.form == "wide"))
    else:
        output.value(found.to_json())
    if not found.node and not any(verdict.fits for verdict in found.verdicts):
        raise _no_node(found)


def _no_node(found: Explained) -> GpuError:
    from adapter.policy.placement import explain, may_fit_later

    later = may_fit_later(found.verdicts)
    hint = "It waits until one is free" if later else "Only another node can help: an autoscaler's, or yours"
    return GpuError(
        f'No node can run "{found.name}" now.',
        why=explain(found.verdicts),
        hint=f"{hint}. See what there is: gpufn nodes --cluster",
        code="no-fitting-node",
    )


def _shown(found: Explained) -> dict[str, Any]:
    """For people: one line a fact, those that are not known left out."""
    facts: dict[str, Any] = {
        found.kind: f"{found.name} in {found.namespace}",
        "function": _function(found),
        "node": found.node,
        "asked": "; ".join(found.asked),
        "note": "; ".join([*found.notes, *_assumed(found)]),
        "when made": _decision(found.decision),
        "scheduler": found.scheduler,
        "snapshots": _snapshots(found),
        "kept": found.kept,
        "budget": found.budget,
    }
    return {key: value for key, value in facts.items() if value}


def _assumed(found: Explained) -> Iterable[str]:
    from adapter.policy.needs import LOAD_S

    if found.load_s is None and any(verdict.fits for verdict in found.verdicts):
        yield f"no load of it was measured yet: WAKE takes {format_duration(LOAD_S)} for one"


def _function(found: Explained) -> str:
    parts = [found.framework, f"revision {found.revision}" if found.revision else "", f"tenant {found.tenant}"]
    return f"{found.function} ({', '.join(filter(None, parts))})"


def _snapshots(found: Explained) -> str:
    if not found.snapshot:
        return ""
    return "; ".join([", ".join(found.snapshot_nodes) or f"no node has {found.snapshot} yet", *found.snapshot_work])


def _decision(decision: Mapping[str, Any]) -> str:
    """What the webhook's own annotation says, in one line."""
    if not decision:
        return ""
    at = f"{format_instant(decision['at_ns'])}: " if decision.get("at_ns") else ""
    resource = f"{decision['resource']} ×{decision.get('units', 1)}, " if decision.get("resource") else ""
    preferred = [f"{name} ({score:.0f}, {format_duration(wake_s)})" for name, score, wake_s in decision["prefer"][:5]]
    more = len(decision["prefer"]) - 5
    preferred += [f"{more} more"] if more > 0 else []
    return (
        f"{at}{resource}preferred {', '.join(preferred)}" if preferred else f"{at}{resource}{decision.get('why', '')}"
    )


_COLUMNS = [
    Column("NODE", "node"),
    Column("SCORE", "score", lambda score: NOTHING if score is None else f"{score:.0f}", right=True),
    Column("WAKE", "wake_s", lambda wake_s: NOTHING if wake_s is None else format_duration(wake_s), right=True),
    Column("RESOURCE", "resource"),
    Column("REASON", "reason"),
]


def _table(verdicts: Sequence[Verdict], *, wide: bool) -> str:
    rows = [_row(verdict) for verdict in verdicts if verdict.fits]
    others = [verdict for verdict in verdicts if not verdict.fits]
    rows += [_row(each) for each in others] if wide or len(others) <= _EACH_NODE else list(_by_reason(others))
    return format_table(rows, _COLUMNS)


def _row(verdict: Verdict) -> dict[str, Any]:
    if not verdict.fits:
        return {"node": verdict.node, "reason": verdict.reason}
    resource = f"{verdict.resource} ×{verdict.units}" if verdict.resource else ""
    return {
        "node": verdict.node,
        "score": verdict.score,
        "wake_s": verdict.wake_s,
        "resource": resource,
        "reason": "fits",
    }


def _by_reason(verdicts: Iterable[Verdict]) -> Iterable[dict[str, Any]]:
    """``412 nodes`` of one reason, the most first."""
    groups: dict[str, list[str]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.reason, []).append(verdict.node)
    for reason, nodes in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        yield {"node": nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes", "reason": reason}
