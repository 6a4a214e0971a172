"""Prometheus metrics of one replica, as of-watchdog serves them on port 8081, with the starts added.

Request counts live in the model process and are asked for at each scrape; those of a start are counted
here. Text exposition format 0.0.4; the standard library only, since the entrypoint imports nothing else.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from adapter.records import StartRecord
from adapter.runtime.buckets import BUCKETS_S
from adapter.runtime.front import answer
from adapter.runtime.loop import Loop

_SILENT_S = 10.0
"""A connection that has asked nothing by then is closed."""


class Metrics:
    """Counters of the entrypoint, and the scrapes that wait for the model process's."""

    def __init__(self, function: str, namespace: str) -> None:
        self._labels = {"function": function, "namespace": namespace}
        self._starts: Counter[tuple[str, str]] = Counter()
        self._phases: Counter[str] = Counter()
        self._skipped: Counter[tuple[str, str]] = Counter()
        self._snapshots: Counter[str] = Counter()
        self._exits: Counter[str] = Counter()
        self._waiting: list[socket.socket] = []

    def count_start(self, record: StartRecord, *, ok: bool) -> None:
        self._starts[record.rung.value, "ok" if ok else "failed"] += 1
        for phase in record.phases:
            self._phases[phase.name.value] += phase.end_ns - phase.start_ns

    def count_skipped(self, rung: str, code: str) -> None:
        self._skipped[rung, code] += 1

    def count_snapshot(self, state: str) -> None:
        self._snapshots[state] += 1

    def count_exit(self, code: str) -> None:
        self._exits[code] += 1

    def scrape(self, listener: socket.socket, loop: Loop, ask_model: Callable[[], bool]) -> None:
        """Accept one scrape; once it has said something, it is answered with the model process's counts.

        Where there is no model process, at once.
        """
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        descriptor = connection.fileno()

        def silent() -> None:
            if connection.fileno() >= 0 and connection not in self._waiting:
                loop.forget(descriptor)
                connection.close()

        def heard() -> None:
            loop.forget(descriptor)
            self._waiting.append(connection)
            if not ask_model():
                self.answer_scrapes([], 0)

        loop.watch(descriptor, heard)
        loop.after(_SILENT_S, silent)

    def answer_scrapes(self, requests: list[dict[str, Any]], in_flight: int, busy_ns: int | None = None) -> None:
        body = "".join(f"{line}\n" for line in self._lines(requests, in_flight, busy_ns)).encode()
        reply = answer(200, body, kind="text/plain; version=0.0.4")
        for connection in self._waiting:
            try:
                connection.setblocking(False)
                connection.recv(65536)
                connection.send(reply)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            connection.close()
        self._waiting.clear()

    def _lines(self, requests: list[dict[str, Any]], in_flight: int, busy_ns: int | None) -> Iterator[str]:
        yield "# TYPE http_requests_total counter"
        for row in requests:
            yield _sample("http_requests_total", {"code": row["code"], "method": row["method"]}, row["count"])
        yield "# TYPE http_request_duration_seconds histogram"
        for row in requests:
            yield from _histogram("http_request_duration_seconds", row)
        yield "# TYPE http_requests_in_flight gauge"
        yield _sample("http_requests_in_flight", {}, in_flight)
        if busy_ns is not None:  # who knows it is asleep, and goes on counting when it wakes
            yield "# TYPE gpufn_busy_seconds_total counter"
            yield _sample("gpufn_busy_seconds_total", {}, busy_ns / 1e9)
        yield "# TYPE gpufn_starts_total counter"
        for (rung, outcome), count in sorted(self._starts.items()):
            yield _sample("gpufn_starts_total", {**self._labels, "rung": rung, "outcome": outcome}, count)
        yield "# TYPE gpufn_start_phase_seconds_total counter"
        for phase, nanoseconds in sorted(self._phases.items()):
            yield _sample("gpufn_start_phase_seconds_total", {**self._labels, "phase": phase}, nanoseconds / 1e9)
        yield "# TYPE gpufn_rung_failures_total counter"
        for (rung, code), count in sorted(self._skipped.items()):
            yield _sample("gpufn_rung_failures_total", {**self._labels, "rung": rung, "reason": code}, count)
        yield "# TYPE gpufn_snapshots_total counter"
        for state, count in sorted(self._snapshots.items()):
            yield _sample("gpufn_snapshots_total", {**self._labels, "state": state}, count)
        yield "# TYPE gpufn_model_exits_total counter"
        for code, count in sorted(self._exits.items()):
            yield _sample("gpufn_model_exits_total", {**self._labels, "reason": code}, count)


def _sample(name: str, labels: dict[str, str], value: float) -> str:
    def escape(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    inside = ",".join(f'{key}="{escape(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"


def _histogram(name: str, row: dict[str, Any]) -> Iterator[str]:
    labels = {"code": row["code"], "method": row["method"]}
    total = 0
    for bound, count in zip([*map(str, BUCKETS_S), "+Inf"], row["buckets"], strict=True):
        total += count
        yield _sample(f"{name}_bucket", {**labels, "le": bound}, total)
    yield _sample(f"{name}_sum", labels, row["sum"])
    yield _sample(f"{name}_count", labels, row["count"])
