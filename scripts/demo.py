"""The demo: a real model function sleeps at zero and is woken twice, plain and from its process snapshot.

Everything goes the way a user's would: `gpufn up`, the OpenFaaS REST API as faas-cli speaks it, plain HTTP
calls, and the `gpufn` command for the tables. Progress goes to standard error, results to standard output.
It ends with 0 only when both answers were right, the second start was a restore, and nothing is left running.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter.units import format_duration, format_size
from benchmarks.session import FUNCTIONS, Answer, Session, wait_until_gone

FUNCTION = "embed"
TOLERANCE = 1e-3
"""Of each of the 384 numbers, which are at most 1: CPUs differ in the last digits."""

ANNOTATIONS = {
    "gpufn.dev/initial": "0",  # a deploy alone starts nothing: the first call is a cold one
    "gpufn.dev/park": "0",  # straight to zero
    "gpufn.dev/idle": "3s",
}


class DemoFailed(Exception):
    """Something that the demo claims was not so."""


@contextmanager
def step(what: str) -> Iterator[None]:
    """One line of progress, with how long it took."""
    print(f"… {what}", file=sys.stderr, flush=True)
    began = time.monotonic()
    yield
    print(f"✓ {what}: {format_duration(time.monotonic() - began)}", file=sys.stderr, flush=True)


def check(condition: bool, claim: str) -> None:
    if not condition:
        raise DemoFailed(f"not true: {claim}")


def example() -> tuple[bytes, list[float]]:
    """The function's own example: what to ask, and the vector to expect."""
    path = next((FUNCTIONS / FUNCTION / "examples").glob("*.json"))
    data = json.loads(path.read_text())
    return json.dumps(data["request"]["body"]).encode(), data["response"]["json"]["embeddings"][0]


def check_answer(answer: Answer, expected: list[float]) -> list[float]:
    check(answer.status == 200, f"the answer is 200, not {answer.status}: {answer.body[:300]!r}")
    vector: list[float] = answer.json()["embeddings"][0]
    check(len(vector) == len(expected), f"the vector has {len(expected)} numbers, not {len(vector)}")
    worst = max(abs(a - b) for a, b in zip(vector, expected, strict=True))
    check(worst <= TOLERANCE, f"the vector is the expected one (off by {worst:.2g})")
    return vector


def wake_twice(session: Session) -> None:
    request, expected = example()
    with step(f"deploying functions/{FUNCTION} (a first time builds its environment: minutes, 5 GB with torch)"):
        session.deploy(FUNCTION, ANNOTATIONS)
    check(not session.replicas(FUNCTION), "nothing runs before the first call")

    with step("first call, from zero: the model is imported and loaded"):
        plain = session.call(FUNCTION, request)
    vector = check_answer(plain, expected)
    with step("its process snapshot is taken in the background"):
        news = session.wait_for_snapshot(FUNCTION)
    with step(f"idle for {ANNOTATIONS['gpufn.dev/idle']}: back to zero"):
        session.wait_for_zero(FUNCTION)

    with step("second call, from zero: the process is restored"):
        restored = session.call(FUNCTION, request)
    check(check_answer(restored, expected) == vector, "both answers are the same, bit for bit")
    with step("back to zero"):
        session.wait_for_zero(FUNCTION)

    rungs = [record["rung"] for record in reversed(session.starts(FUNCTION))]
    check(rungs[-1:] == ["restore"] and "restore" not in rungs[:-1], f"the second start is a restore: {rungs}")
    show(session, vector, plain, restored, news)


def show(session: Session, vector: list[float], plain: Answer, restored: Answer, news: dict[str, object]) -> None:
    print("\nANSWER")
    print(f"  {FUNCTION}: {len(vector)} numbers, {', '.join(f'{x:.4f}' for x in vector[:4])}, …  (as expected, twice)")
    print("\nCOLD STARTS, as `gpufn starts` prints them")
    print(indented(session.cli("starts", FUNCTION)))
    print("\nWHAT THE CALLER SAW, from connecting to the last byte")
    print(f"  plain      {format_duration(plain.seconds)}")
    print(f"  restored   {format_duration(restored.seconds)}")
    print(f"  ratio      {plain.seconds / restored.seconds:.1f} times faster")
    size = news.get("bytes")
    if isinstance(size, int):
        print(f"  snapshot   {format_size(size)}")
    print("\nREPLICA-SECONDS, as `gpufn usage report` prints them")
    print(indented(session.cli("usage", "report")))
    print(flush=True)


def indented(text: str) -> str:
    return "\n".join("  " + line for line in text.rstrip().splitlines())


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="gpufn-demo-"))
    state = folder / "state"
    session = Session(state)
    try:
        with step("starting gpufn up"):
            session.start()
        port = session.port
        wake_twice(session)
        with step("stopping gpufn up"):
            session.stop()
        left = wait_until_gone(folder, port)
        check(not left, "nothing is left running: " + "; ".join(left))
    except (DemoFailed, RuntimeError) as error:
        print(f"✗ {error}", file=sys.stderr)
        return 1
    finally:
        session.end()
        shutil.rmtree(folder)
    print("✓ nothing left running, no file left; functions' environments stay in ~/.cache/gpufn", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
