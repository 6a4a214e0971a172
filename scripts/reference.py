"""Writes docs/reference/*.md from the code they describe, so that they cannot say anything else.

`make docs` writes them; `tests/unit/test_docs.py` fails while they are not current.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click
from prometheus_client import CollectorRegistry

from adapter import errors
from adapter.agent.metrics import Metrics as AgentMetrics
from adapter.cli.main import COMMANDS, INTERRUPTED, gpufn
from adapter.controller.metrics import AdmissionMetrics, ControllerMetrics, InformerCollector
from adapter.errors import AdapterError
from adapter.keys import CONFIG_FILE, DOMAIN
from adapter.ledger.metrics import Metrics as LedgerMetrics
from adapter.openfaas.cluster_settings import ProviderSettings
from adapter.openfaas.metrics import Metrics as GatewayMetrics
from adapter.openfaas.queue import LANE_LIMIT
from adapter.packaging.application import IGNORE_FILE, LEFT_BEHIND, SECRET
from adapter.packaging.creator import CA_SETTINGS
from adapter.packaging.requirements import LOCK_FILE, PYLOCK_FILE
from adapter.packaging.settings import LAUNCH_SETTINGS, BuildSettings
from adapter.replica import ReplicaSettings
from adapter.runtime.metrics import Metrics as ReplicaMetrics
from adapter.spec import FIELDS, Field
from adapter.units import format_size

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTICE = "<!-- Written by scripts/reference.py (make docs) from the code. Edit that. -->\n"

REPLICA_METRICS = {
    "http_requests_total": "requests answered, by status code and method (of-watchdog's name)",
    "http_request_duration_seconds": "seconds until a request was answered (of-watchdog's name)",
    "http_requests_in_flight": "requests being handled (of-watchdog's name)",
    "gpufn_starts_total": "starts, by the rung that served and whether it came up",
    "gpufn_start_phase_seconds_total": "seconds spent in each phase of starts",
    "gpufn_rung_failures_total": "faster rungs that were not taken, by reason",
    "gpufn_snapshots_total": "process snapshots, by how far they came",
    "gpufn_model_exits_total": "model processes that ended unasked, by reason",
    "gpufn_busy_seconds_total": "seconds with at least one request in flight",
}
"""What a replica's own metrics mean; their names are checked against what it serves."""


REFUSALS = (
    ("gateway", "`scale.queue` requests wait for a replica already", "503 `queue-full`, Retry-After"),
    ("gateway", "one has waited for `limits.start_timeout`", "504 `prepare-timeout`, `start-timeout`, `queue-timeout`"),
    ("gateway", "a start failed a moment ago", "503 with that failure's code, Retry-After"),
    ("gateway", "its budget of this day is spent, and none of its replicas runs", "429 `budget-spent`, Retry-After"),
    ("gateway", f"{LANE_LIMIT} asynchronous ones of the function wait already", "503 `queue-full`, Retry-After"),
    ("replica", "`GPUFN_HELD` requests wait for its start already", "503"),
    ("replica", "`GPUFN_QUEUE` requests wait for one of its threads already", "429"),
)
"""Bounds on requests, in the order in which one meets them."""


def pages() -> dict[str, str]:
    """File name -> content of every generated page."""
    return {
        "gpufn-toml.md": gpufn_toml(),
        "settings.md": settings(),
        "exit-codes.md": exit_codes(),
        "metrics.md": metrics(),
        "buildpack.md": buildpack(),
        "cli.md": command_line(),
    }


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def default_of(item: Field) -> str:
    """A default as a user would write it."""
    value = item.default
    if item.name == "in_flight":
        return "`8`, with a GPU `1`"
    if value is None:
        return f'`"{item.form.none}"`'
    if item.name.endswith("_s"):
        return f'`"{value:g}s"`'
    if item.name.endswith("_bytes"):
        return f'`"{format_size(value).replace(".0", "")}"`' if value else "`0`"
    if isinstance(value, tuple):
        return "`[]`"
    return f"`{value:g}`" if isinstance(value, int | float) else f'`"{value}"`'


def gpufn_toml() -> str:
    rows = (
        (
            f"`[{f.table}]` `{f.key}`",
            "–" if f.is_built_in else f"`{DOMAIN}/{f.annotation}`",
            default_of(f),
            f.form.accepted,
            f.doc,
        )
        for f in FIELDS
    )
    return (
        f"{NOTICE}# {CONFIG_FILE} and annotations\n\n"
        f"A function asks for what it needs in `{CONFIG_FILE}` beside its handler. The annotation of a deployment wins over\n"
        "the key of the file, so that one image can be deployed with different policies. Unknown keys are refused, with\n"
        "the nearest known one; annotations of other domains are nobody's business here. Keys without an annotation are\n"
        "built into the image.\n\n" + table(("key", "annotation", "default", "written as", "meaning"), rows)
    )


def settings() -> str:
    def default(name: str, value: Any) -> str:
        if name.endswith("_bytes"):
            return f"`{format_size(value).replace('.0', '')}`"
        text = (
            ",".join(value)
            if isinstance(value, tuple)
            else str(value).lower()
            if isinstance(value, bool)
            else str(value)
        )
        return f"`{text}`" if text else "–"

    rows = (
        (", ".join(f"`{name}`" for name in f.metadata["names"]), default(f.name, f.default), f.metadata["doc"])
        for f in fields(ReplicaSettings)
    )
    return (
        f"{NOTICE}# Settings of a replica\n\n"
        "A replica's entrypoint (`python -m adapter.runtime`) reads these environment variables, the first that is set\n"
        "of each row. Whoever starts a replica sets them: `gpufn up`, a container engine, a kubelet. The names of\n"
        "of-watchdog and Knative are honoured. A value that cannot be used stops the replica with a message that names\n"
        "it. All other variables are the function's own.\n\n"
        + table(("variables", "default", "meaning"), rows)
        + "\nDurations are written `30`, `30s`, `1m30s` or `250ms`, sizes `4096`, `16Mi` or `2G`.\n\n"
        "## Settings of the OpenFaaS provider on a cluster\n\n"
        "`python -m adapter.openfaas` takes flags, and under them variables of its environment, OpenFaaS's own among them.\n\n"
        + table(
            ("flag", "variable", "default", "meaning"),
            (
                (
                    f"`{f.metadata['flag']}`",
                    f"`{f.metadata['variable']}`" if f.metadata["variable"] else "–",
                    default(f.name, f.default),
                    f.metadata["doc"],
                )
                for f in fields(ProviderSettings)
            ),
        )
    )


def buildpack() -> str:
    def default(value: Any) -> str:
        return f"`{value}`" if value else "–"

    build = ((f"`{f.metadata['name']}`", default(f.default), f.metadata["doc"]) for f in fields(BuildSettings))
    launch = ((f"`{item.name}`", default(item.default), item.doc) for item in LAUNCH_SETTINGS)
    return (
        f"{NOTICE}# The buildpack\n\n"
        "`gpufn/gpu-function` makes an image of a function folder. Its settings are variables of a build (`pack build --env`,\n"
        "`gpufn build --env`, a file in the platform's `env` folder) and of a launch (`docker run --env`). A build setting that\n"
        "is not known is refused.\n\n## At the build\n\n"
        + table(("setting", "default", "meaning"), build)
        + "\n`gpufn build --ca FILE` makes the build trust a bundle of CA certificates (PEM), for packages and weights, and no\n"
        f"other: it sets {_codes(CA_SETTINGS)}. No layer has it. Other platforms: a\n"
        "file of a binding, and these variables with its path; see [build in CI](../how-to/build-in-ci.md).\n\n"
        "pip's own variables count too: `PIP_INDEX_URL`, `PIP_EXTRA_INDEX_URL`, `PIP_CERT`, `PIP_NO_INDEX`. `BPE_NAME`,\n"
        "`BPE_DEFAULT_NAME` and `BPE_OVERRIDE_NAME` set the variable `NAME` of the image, as other buildpacks have it.\n\n"
        "## At the launch\n\n"
        + table(("setting", "default", "meaning"), launch)
        + "\nAll [settings of a replica](settings.md) count beside them.\n\n"
        "## Requirements\n\n"
        f"Packages come from `{LOCK_FILE}` where there is one, else from `{PYLOCK_FILE}`, else from `requirements.txt`; those of\n"
        "`requirements-nodeps.txt` without what they depend on. Hashes are kept to. The layer is made anew when these files,\n"
        "the wheels, Python, or the packages of the base image change, and not when an index has something newer: pin what\n"
        "must be fixed.\n\n"
        "## What is not in an image\n\n"
        f"- What tools leave behind: {_codes(LEFT_BEHIND)}. A slash in front: only at the top.\n"
        f"- What holds secrets: {_codes(SECRET)}.\n"
        f"- What `{IGNORE_FILE}` says, a pattern a line; `!PATTERN` brings back what a line before left out.\n\n"
        "A link that leads out of the folder, a pipe, a socket and a device are refused.\n\n"
        "## Exit codes\n\n"
        "`bin/detect`: 0 passes, 100 is not meant, any other is an error of the folder. `bin/build`: 0, or an error in three\n"
        "lines; the lifecycle then ends with 51 and exports nothing.\n"
    )


def _codes(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _classes(root: type[AdapterError] = AdapterError) -> Iterator[type[AdapterError]]:
    yield root
    for below in root.__subclasses__():
        yield from _classes(below)


def exit_codes() -> str:
    classes = [kind for kind in _classes() if kind.__module__ == errors.__name__]
    by_code: dict[int, list[str]] = {
        0: ["done"],
        2: ["wrong usage: an unknown option or argument"],
        INTERRUPTED: ["Ctrl-C; but `gpufn up` has then done its work, drains and ends with 0"],
    }
    for kind in classes:
        by_code.setdefault(kind.exit_code, []).append(f"`{kind.__name__}`")
    return (
        f"{NOTICE}# Exit codes and errors\n\n"
        "Every error says what happened, why, and what to do, and ends its first line with a code in brackets that\n"
        "stays the same: search for that. On HTTP the same error is\n"
        '`{"error": {"code", "message", "why", "hint"}}`; on `/system/…`, whose answers faas-cli prints, it is plain text\n'
        "with the code in the header `X-Gpufn-Error`.\n\n"
        "## Exit codes of `gpufn`\n\n"
        + table(("code", "when"), ((code, ", ".join(names)) for code, names in sorted(by_code.items())))
        + "\n`gpufn doctor` ends with 1 when a check fails.\n\n## Errors\n\n"
        + table(
            ("error", "exit code", "HTTP status", "code, unless a case has its own"),
            ((f"`{kind.__name__}`", kind.exit_code, kind.http_status, f"`{kind.default_code}`") for kind in classes),
        )
        + "\n## Too many requests: who refuses what\n\n"
        "`gpufn up` gives a replica no more than it takes: the replica's own bounds are for other gateways.\n\n"
        + table(("who", "when", "answer"), REFUSALS)
    )


def metrics() -> str:
    return (
        f"{NOTICE}# Metrics\n\n"
        "Prometheus text format. Money is never a metric: it comes from the ledger (`gpufn usage`).\n\n"
        "## `gpufn up`: `/metrics` on its port\n\n"
        "The `gateway_…` names are OpenFaaS's, so that its dashboards work. `function_name` and `function` are\n"
        "`<name>.<namespace>`.\n\n"
        + table(("metric", "type", "labels", "meaning"), _collected(GatewayMetrics().registry))
        + "\n## A replica: `/metrics` on port 8081 (`GPUFN_METRICS_PORT`)\n\n"
        "Replicas that `gpufn up` starts serve none: the gateway counts for them.\n\n"
        + table(("metric", "type", "meaning"), _replica_metrics())
        + "\n## On a cluster\n\n"
        "Each component serves `/metrics` on port 8080; the provider those of `gpufn up`, on 8081. All others have\n"
        "`gpufn_build_info`, whose label is the version, and what Prometheus says of a process (`process_…`).\n"
        + "\n### The webhook and the controller\n\n"
        "What they know of the cluster:\n\n"
        + table(("metric", "type", "labels", "meaning"), _collected(_registered(partial(InformerCollector, ()))))
        + "\n### The webhook\n\n"
        + table(("metric", "type", "labels", "meaning"), _collected(_registered(AdmissionMetrics)))
        + "\n### The controller\n\n"
        + table(("metric", "type", "labels", "meaning"), _collected(_registered(ControllerMetrics)))
        + "\n### The ledger\n\n"
        + table(("metric", "type", "labels", "meaning"), _collected(_registered(LedgerMetrics)))
        + "\n### An agent\n\n"
        + table(("metric", "type", "labels", "meaning"), _collected(_registered(AgentMetrics)))
    )


def _registered(kind: Callable[[CollectorRegistry], object]) -> CollectorRegistry:
    registry = CollectorRegistry()
    kind(registry)
    return registry


def _collected(registry: CollectorRegistry) -> Iterator[tuple[str, ...]]:
    collectors = registry._collector_to_names  # noqa: SLF001  # labels are nowhere public before a first sample
    for collector in collectors:
        for family in collector.collect():
            name = family.name + ("_total" if family.type == "counter" else "")
            own = family if isinstance(collector, InformerCollector) else collector
            labels = ", ".join(f"`{label}`" for label in getattr(own, "_labelnames", ())) or "–"
            yield f"`{name}`", family.type, labels, family.documentation


def _replica_metrics() -> Iterator[tuple[str, ...]]:
    served = [line.split() for line in ReplicaMetrics("f", "n")._lines([], 0, 0) if line.startswith("# TYPE ")]  # noqa: SLF001
    for _, _, name, kind in served:
        yield f"`{name}`", kind, REPLICA_METRICS[name]


def command_line() -> str:
    intro = (
        f"{NOTICE}# Command line\n\n"
        "Answers go to standard output, everything else to standard error. Every option can be set by a variable\n"
        "`GPUFN_<COMMAND>_<OPTION>`; a flag wins. Exit codes: [exit-codes.md](exit-codes.md).\n"
    )
    parts = [intro]
    for name in COMMANDS:
        command = gpufn.get_command(click.Context(gpufn), name)
        assert command is not None
        parts += _command_page(f"gpufn {name}", command, 2)
    return "".join(parts)


def _command_page(path: str, command: click.Command, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=path, max_content_width=110, terminal_width=110)
    yield f"\n{'#' * level} {path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None:
                yield from _command_page(f"{path} {name}", below, level + 1)


def main() -> int:
    for name, content in pages().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
