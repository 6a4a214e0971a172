"""500 requests at once at zero replicas: `held_500_lost`, `held_500_starts`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.load import request_bytes, send_at_once
from benchmarks.results_file import Bar
from benchmarks.session import Session
from benchmarks.wakes import PLAIN, ZERO

if TYPE_CHECKING:
    from benchmarks.__main__ import Options

COUNT = 500
LIMIT_S = 120.0


def run(options: Options) -> Iterable[Bar]:
    """`echo`, whose answers can be told apart; and `embed` plain, which keeps all waiting for seconds."""
    del options
    runs = []
    with tempfile.TemporaryDirectory(prefix="gpufn-bench-") as folder, Session(Path(folder) / "state") as session:
        session.deploy("echo", ZERO)
        bodies = [f"call {number}".encode() for number in range(COUNT)]
        runs.append(burst(session, "echo", bodies, bodies))
        session.deploy("embed", {**PLAIN, "gpufn.dev/exec-timeout": "2m"})
        texts = [json.dumps({"texts": ["one short text"]}).encode()] * COUNT
        runs.append(burst(session, "embed", texts, None))
    yield Bar.of("held_500_lost", sum(run["lost"] for run in runs), "requests", runs)
    yield Bar.of("held_500_starts", max(run["starts"] for run in runs), "starts")


def burst(session: Session, name: str, bodies: list[bytes], expected: list[bytes] | None) -> dict[str, int]:
    """Send all at once; how many were not answered rightly, and how many starts it took."""
    answers = send_at_once(
        session.port, [request_bytes(f"/function/{name}", body, close=True) for body in bodies], LIMIT_S
    )
    right = 0
    for number, answer in enumerate(answers):
        if not isinstance(answer, str) and answer[0] == 200:
            right += expected is None or answer[1] == expected[number]
    time.sleep(0.5)  # the ledger is written behind
    return {"sent": len(bodies), "lost": len(bodies) - right, "starts": len(session.starts(name))}
