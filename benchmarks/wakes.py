"""From zero to an answer through `gpufn up`, plain and restored, in turns.

Plain is the function as its user wrote it, every snapshot off; restored is the same function from its
process snapshot. Both are scaled to zero before each call, and every answer is checked.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import bare_restore
from benchmarks.bare_restore import Restored
from benchmarks.results_file import Bar, ratio_of_medians
from benchmarks.session import FUNCTIONS, Answer, Session

if TYPE_CHECKING:
    from benchmarks.__main__ import Options

ZERO = {"gpufn.dev/initial": "0", "gpufn.dev/park": "0", "gpufn.dev/idle": "1h"}
PLAIN = {**ZERO, "gpufn.dev/snapshot": "off", "gpufn.dev/weights": "off"}
_SETTLE_S = 1.0
"""Between wakes: the next one is a wake of a quiet machine."""
_SLOW_PLAIN_RUNS = 5
"""Plain starts of `generate` take half a minute each."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A function to wake: what to ask it, and what counts as the right answer."""

    name: str
    body: bytes
    is_right: Callable[[Answer], bool]
    headers: dict[str, str] = field(default_factory=dict)
    first_byte: bool = False
    """Measure until the first byte of the answer's body, not the last."""

    def seconds(self, answer: Answer) -> float:
        return answer.first_s if self.first_byte else answer.seconds


def embed() -> Subject:
    example = json.loads(next((FUNCTIONS / "embed" / "examples").glob("*.json")).read_text())
    expected = example["response"]["json"]["embeddings"][0]

    def is_right(answer: Answer) -> bool:
        vector = answer.json()["embeddings"][0]
        return all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(vector, expected, strict=True))

    return Subject("embed", json.dumps(example["request"]["body"]).encode(), is_right)


def generate() -> Subject:
    def is_right(answer: Answer) -> bool:
        events = [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: {")]
        return "Paris" in "".join(json.loads(event)["text"] for event in events)

    body = json.dumps({"prompt": "What is the capital of France?"}).encode()
    return Subject("generate", body, is_right, {"Accept": "text/event-stream"}, first_byte=True)


def echo() -> Subject:
    return Subject("echo", b"ping", lambda answer: answer.body == b"ping")


def run(options: Options) -> Iterable[Bar]:
    with tempfile.TemporaryDirectory(prefix="gpufn-bench-") as folder, Session(Path(folder) / "state") as session:
        for make in (echo, embed, generate):
            if make.__name__ in options.functions:
                yield from measure(session, make(), options)


def measure(session: Session, subject: Subject, options: Options) -> Iterable[Bar]:
    if subject.name == "echo":
        session.deploy("echo", ZERO)
        runs = [wake(session, "echo", subject) for _ in range(options.runs + 1)][1:]
        yield Bar.of("echo_from_zero_ms", statistics.median(runs) * 1000, "ms", [round(s * 1000, 1) for s in runs])
        return
    plain_name = f"{subject.name}-plain"
    session.deploy(plain_name, PLAIN, image=subject.name)
    session.deploy(subject.name, ZERO)
    wake(session, subject.name, subject, rung="load", before_zero=lambda: session.wait_for_snapshot(subject.name))
    wake(session, subject.name, subject, rung="restore")  # checks the snapshot's files, which no later one does
    plain, restored, bare = [], [], []
    plain_runs = min(options.runs, _SLOW_PLAIN_RUNS) if subject.name == "generate" else options.runs
    for number in range(options.runs):
        if number < plain_runs:
            plain.append(wake(session, plain_name, subject, rung="load"))
        restored.append(wake(session, subject.name, subject, rung="restore"))
        bare.append(restore_bare(session, subject))
        print(f"  {subject.name} {plain[-1]:.3f} s, {restored[-1]:.3f} s", file=sys.stderr, flush=True)
    yield Bar.of(f"{subject.name}_plain_over_restored", ratio_of_medians(plain, restored), "ratio")
    yield Bar.of(f"{subject.name}_plain_s", statistics.median(plain), "s", [round(s, 4) for s in plain])
    yield Bar.of(f"{subject.name}_restored_s", statistics.median(restored), "s", [round(s, 4) for s in restored])
    by_hand = [subject.seconds(one.answer) for one in bare]
    yield Bar.of(f"{subject.name}_restored_over_criu", ratio_of_medians(restored, by_hand), "ratio")
    yield Bar.of(f"{subject.name}_criu_answer_s", statistics.median(by_hand), "s", [round(s, 4) for s in by_hand])
    alone = [one.criu_s for one in bare]
    yield Bar.of(f"{subject.name}_criu_s", statistics.median(alone), "s", [round(s, 4) for s in alone])
    records = session.starts(subject.name)[: options.runs]
    phases = [phases_ms(record) for record in records]
    yield Bar.of(
        f"{subject.name}_restored_inside_ms", statistics.median(r["total_ns"] for r in records) / 1e6, "ms", phases
    )
    options.starts[f"{subject.name} plain"] = session.starts(plain_name)[0]
    options.starts[f"{subject.name} restored"] = records[0]


def restore_bare(session: Session, subject: Subject) -> Restored:
    """CRIU by hand on the same snapshot, after the same quiet. Raises `RuntimeError` where the answer was wrong."""
    time.sleep(_SETTLE_S)
    snapshot = next((session.state / "snapshots").glob(f"*/{subject.name}.*/process-*"))
    bare = bare_restore.restore(snapshot, subject.body, subject.headers)
    if not subject.is_right(bare.answer):
        raise RuntimeError(f"{subject.name} restored by hand answered {bare.answer.body[:300]!r}")
    return bare


def wake(
    session: Session,
    name: str,
    subject: Subject,
    *,
    rung: str = "",
    before_zero: Callable[[], object] = lambda: None,
) -> float:
    """Seconds of one call at zero replicas. Raises `RuntimeError` where the answer or the way to it was wrong."""
    time.sleep(_SETTLE_S)
    answer = session.call(name, subject.body, headers=subject.headers)
    if answer.status != 200 or not subject.is_right(answer):
        raise RuntimeError(f"{name} answered {answer.status} {answer.body[:300]!r}")
    took = session.replicas(name)[0]["rung"]
    if rung and took != rung:
        raise RuntimeError(f"{name} came up by {took}, not by {rung}: {session.starts(name, 1)}")
    before_zero()
    session.to_zero(name)
    return subject.seconds(answer)


def phases_ms(record: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each phase of a start record."""
    result: dict[str, float] = {}
    for phase in record["phases"]:
        result[phase["name"]] = round(result.get(phase["name"], 0) + (phase["end_ns"] - phase["start_ns"]) / 1e6, 2)
    return result
