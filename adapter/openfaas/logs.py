"""`GET /system/logs`: a function's log as OpenFaaS's NDJSON, past lines first, then what comes."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

_POLL_S = 0.25
"""A followed file is looked at this often: what reads logs is people."""


@dataclass(frozen=True, slots=True)
class LogQuery:
    """`tail` lines at most (0: all), none before `since`, and only those of replica `instance` if given."""

    name: str
    namespace: str
    instance: str = ""
    tail: int = 0
    since: datetime | None = None
    follow: bool = False


async def read_log(path: Path, query: LogQuery) -> AsyncIterator[bytes]:
    """Lines ``{"name", "namespace", "instance", "timestamp", "text"}``; endless when following."""
    old = path.with_name(path.name + ".1")
    lines = [line for file in (old, path) for line in _matching(_lines(file), query)]
    for line in deque(lines, maxlen=query.tail or None):
        yield _line(line, query)
    if not query.follow:
        return
    offset = path.stat().st_size if path.exists() else 0
    while True:
        await asyncio.sleep(_POLL_S)
        size = path.stat().st_size if path.exists() else 0
        if size == offset:
            continue
        offset = 0 if size < offset else offset  # rotated
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        offset += len(whole)
        for line in _matching(whole.splitlines(), query):
            yield _line(line, query)


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []


def _matching(lines: list[bytes], query: LogQuery) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            data: dict[str, Any] = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if query.instance and data["instance"] != query.instance:
            continue
        if query.since and datetime.fromisoformat(data["timestamp"]) < query.since:
            continue
        yield data


def _line(data: dict[str, Any], query: LogQuery) -> bytes:
    return json.dumps({"name": query.name, "namespace": query.namespace, **data}).encode() + b"\n"
