"""`gpufn doctor`: what works on this machine or cluster, and how to mend the rest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from adapter.cli.checks import Check, Finding, Verdict, all_checks, failed
from adapter.cli.cluster import Cluster, cluster_options
from adapter.cli.output import Column, Output, output_options
from adapter.cli.state import state_folder, state_option

_SIGNS = {Verdict.OK: ("✓", "green"), Verdict.WARNING: ("!", "yellow"), Verdict.FAILED: ("✗", "red")}
_COLUMNS = [Column(key.upper(), key) for key in ("name", "verdict", "reason", "fix")]


@click.command()
@cluster_options
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(1, 65535), help="Port that `gpufn up` would use."
)
@state_option
@output_options
def command(cluster: Cluster | None, port: int, state: Path | None, output: Output) -> int:
    """Say what works on this machine, or on a cluster, and how to mend the rest.

    ✓ works, ! works with less, ✗ does not work. Exit code 1 when anything does not. Nothing is changed.
    """
    if cluster is None:
        return _report(all_checks(state_folder(state), port), output)
    with cluster.connected() as connection:
        from adapter.cli.cluster_checks import cluster_checks

        return _report(cluster_checks(connection), output)


def _report(checks: Iterable[Check], output: Output) -> int:
    findings = []
    for check in checks:
        try:
            found = check()
        except OSError as exc:  # a check that cannot even try has found something
            found = failed(getattr(check, "__name__", "check").removeprefix("check_"), str(exc))
        for finding in found if isinstance(found, list) else [found]:
            findings.append(finding)
            if output.form in ("table", "wide"):
                _show(finding)
    if output.form not in ("table", "wide"):
        output.rows([finding.to_json() for finding in findings], _COLUMNS)
    return int(any(finding.verdict is Verdict.FAILED for finding in findings))


def _show(finding: Finding) -> None:
    sign, colour = _SIGNS[finding.verdict]
    click.echo(f"{click.style(sign, fg=colour)} {finding.name:<11} {finding.reason}")
    if finding.fix:
        click.echo(f"{'':<13} → {finding.fix}")
