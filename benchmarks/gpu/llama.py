"""A Llama of 8 billion random weights, from zero to its first token, by each rung: `gpu_8b_*`.

Its weights are made at random on the GPU (`benchmarks/functions/llama`): the load rung reads no checkpoint, so it
is faster than a user's would be. Where 8 billion do not fit it has fewer layers, and its numbers another name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.bench import GB, Bench, available_bytes
from benchmarks.gpu.machine import memory_bytes
from benchmarks.gpu.rungs import by_rung
from benchmarks.results_file import Bar
from benchmarks.session import REPOSITORY, Answer
from benchmarks.wakes import Subject

FUNCTION = REPOSITORY / "benchmarks" / "functions" / "llama"
LAYERS = 32
_LAYER_BYTES, _REST_BYTES = 437 * 10**6, 2_101 * 10**6
"""bfloat16: of one layer, and of the words in and out."""

_GPU_SHARE, _HOST_SHARE, _DISK_SHARE = 1.15, 2.5, 1.6
"""Of the weights: working memory beside them; parked and in the page cache at once; weight and process snapshot."""


def run(bench: Bench) -> Iterable[Bar]:
    layers, why = fitting_layers(bench.folder)
    called = "8b" if layers == LAYERS else f"llama_{layers}_layers"
    functions = bench.folder / "functions"
    shutil.copytree(FUNCTION, functions / "llama")
    with_layers(functions / "llama" / "config.json", layers)
    facts = [{"layers": layers, "bytes": size_bytes(layers), "weights": "random", "smaller_because": why}]
    with bench.session(functions) as session:
        yield from by_rung(bench, session, llama(), called, has_build=True, facts=facts)


def llama() -> Subject:
    """The first answer is the right one: all later ones, whatever their rung, have its tokens."""
    first: list[bytes] = []

    def is_right(answer: Answer) -> bool:
        first.append(answer.body)
        return answer.status == 200 and bool(answer.body) and answer.body == first[0]

    return Subject("llama", json.dumps({"tokens": 4}).encode(), is_right, first_byte=True)


def fitting_layers(folder: Path) -> tuple[int, str]:
    """How many fit, and what there is too little of for all; empty when there is not."""
    total, used = memory_bytes()
    room = {
        "GPU memory": (total - used - GB) / _GPU_SHARE,
        "host memory": available_bytes() / _HOST_SHARE,
        "disk": shutil.disk_usage(folder).free / _DISK_SHARE,
    }
    layers = LAYERS
    while layers > 1 and size_bytes(layers) > min(room.values()):
        layers //= 2
    return layers, ", ".join(what for what, there in room.items() if size_bytes(LAYERS) > there)


def size_bytes(layers: int) -> int:
    return layers * _LAYER_BYTES + _REST_BYTES


def with_layers(config: Path, layers: int) -> None:
    shape = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**shape, "num_hidden_layers": layers}), encoding="utf-8")
