"""Nodes and pods of a real GPU cluster: Alibaba's trace "openb" (cluster-trace-gpu-v2023; Weng et al., USENIX ATC 2023).

Not part of this repository: its terms allow research and study. The files ``openb_node_list_gpu_node.csv`` and
``openb_pod_list_gpuspec33.csv`` of github.com/alibaba/clusterdata, folder cluster-trace-gpu-v2023/csv, are looked for in
the folder that the variable GPUFN_TRACES names.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapter.errors import ConfigError

NODES_FILE, PODS_FILE = "openb_node_list_gpu_node.csv", "openb_pod_list_gpuspec33.csv"
NODE_COUNT = 1000


@dataclass(frozen=True, slots=True)
class TraceNode:
    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    model: str


@dataclass(frozen=True, slots=True)
class TracePod:
    """`gpus` are whole ones: who asked for a part of one gets one, whoever places it. `models`: any of them will do."""

    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    models: tuple[str, ...]


def read_nodes(count: int = NODE_COUNT) -> list[TraceNode]:
    """`count` of them, chosen by a fixed seed. Raises `ConfigError` where the trace is not here."""
    rows = [
        TraceNode(row["sn"], int(row["cpu_milli"]), int(row["memory_mib"]), int(row["gpu"]), row["model"])
        for row in _rows(NODES_FILE)
    ]
    return random.Random(1).sample(rows, count)  # noqa: S311  # the same each time, not secret


def read_pods() -> list[TracePod]:
    """In the order in which they were made. Raises `ConfigError` where the trace is not here."""
    return [
        TracePod(
            row["name"],
            int(row["cpu_milli"]),
            int(row["memory_mib"]),
            int(row["num_gpu"]),
            tuple(sorted(set(filter(None, row["gpu_spec"].split("|"))))),
        )
        for row in _rows(PODS_FILE)
    ]


def _rows(name: str) -> Iterator[dict[str, str]]:
    path = Path(os.environ.get("GPUFN_TRACES", "")) / name
    try:
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)
    except OSError as exc:
        raise ConfigError(
            f"The trace {name} is not here.",
            why="It is not ours to give away.",
            hint="Get it from github.com/alibaba/clusterdata (cluster-trace-gpu-v2023/csv), and set GPUFN_TRACES.",
            code="trace-missing",
        ) from exc
