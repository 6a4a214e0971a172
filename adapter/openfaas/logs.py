"""`GET /system/logs`: a function's log as OpenFaaS's NDJSON, past lines first, then what comes."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from adapter.hosts import Deployment
from adapter.openfaas.wire import DEFAULT_NAMESPACE

_POLL_S = 0.25
"""A followed file is looked at this often: what reads logs is people."""

_MICROSECONDS = re.compile(r"(\.\d{1,6})\d*")


@dataclass(frozen=True, slots=True)
class LogQuery:
    """`tail` lines at most (0: all), none before `since`, and only those of replica `instance` if given."""

    name: str
    namespace: str = DEFAULT_NAMESPACE
    instance: str = ""
    tail: int = 0
    since: datetime | None = None
    follow: bool = False

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> LogQuery:
        """Raises `ValueError` saying what is wrong."""
        name, _, inside = query.get("name", "").partition(".")
        if not name:
            raise ValueError("name is missing: whose logs?")
        tail = query.get("tail") or "0"
        if not re.fullmatch(r"-?[0-9]{1,9}", tail):
            raise ValueError(f"tail {tail!r} is no number")
        return cls(
            name=name,
            namespace=inside or query.get("namespace") or DEFAULT_NAMESPACE,
            instance=query.get("instance", ""),
            tail=max(0, int(tail)),
            since=parse_time(query["since"]) if query.get("since") else None,
            follow=query.get("follow") in ("1", "true"),
        )


def parse_time(text: str) -> datetime:
    """RFC 3339 with Go's nanoseconds; without an offset it is UTC. Raises `ValueError`."""
    try:
        time = datetime.fromisoformat(_padded(text.replace("Z", "+00:00").replace("z", "+00:00")))
    except ValueError:
        raise ValueError(f"since {text!r} is no RFC 3339 time such as 2026-01-31T12:00:00Z") from None
    return time if time.tzinfo is not None else time.replace(tzinfo=timezone.utc)


def _padded(text: str) -> str:
    """Exactly six digits of a fraction: all that Python 3.10 reads."""
    return _MICROSECONDS.sub(lambda match: f"{match[1]:0<7}", text, count=1)


Logs = Callable[[Deployment, LogQuery, asyncio.Event], AsyncIterator[bytes]]
"""The lines of a function that a query asks for, as `read_log` gives them."""


def file_logs(path_of: Callable[[Deployment], Path]) -> Logs:
    """The logs of a host that keeps a file for each function."""
    return lambda deployment, query, stopping: read_log(path_of(deployment), query, stopping)


async def read_log(path: Path, query: LogQuery, stopping: asyncio.Event) -> AsyncIterator[bytes]:
    """Lines ``{"name", "namespace", "instance", "timestamp", "text"}``; when following, until `stopping` is set."""
    lines, place = await asyncio.to_thread(_read_past, path, query)
    for line in lines:
        yield line
    while query.follow and not stopping.is_set():
        try:
            await asyncio.wait_for(stopping.wait(), _POLL_S)
        except asyncio.TimeoutError:
            pass
        lines, place = await asyncio.to_thread(_read_more, path, query, place)
        for line in lines:
            yield line


@dataclass(frozen=True, slots=True)
class _Place:
    """How far a file has been read; `inode` tells a rotated one from the one that follows it."""

    inode: int
    offset: int


_START = _Place(0, 0)


def _read_past(path: Path, query: LogQuery) -> tuple[list[bytes], _Place]:
    old, _ = _read_from(path.with_name(path.name + ".1"), _START)
    new, place = _read_from(path, _START)
    kept = deque(_matching([*old, *new], query), maxlen=query.tail or None)
    return list(kept), place


def _read_more(path: Path, query: LogQuery, place: _Place) -> tuple[list[bytes], _Place]:
    rest, _ = _read_from(path.with_name(path.name + ".1"), place, only_same=True)
    new, place = _read_from(path, place)
    return list(_matching([*rest, *new], query)), place


def _read_from(path: Path, place: _Place, *, only_same: bool = False) -> tuple[list[bytes], _Place]:
    """The whole lines after `place`; from the start of a file that is another one."""
    try:
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            offset = place.offset if inode == place.inode else 0
            if only_same and inode != place.inode:
                return [], place
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], place
    whole = data[: data.rfind(b"\n") + 1]
    return whole.splitlines(), _Place(inode, offset + len(whole))


def _matching(lines: Iterable[bytes], query: LogQuery) -> Iterator[bytes]:
    for line in lines:
        try:
            data: dict[str, Any] = json.loads(line)
            written = datetime.fromisoformat(data["timestamp"])
        except (ValueError, KeyError, TypeError):  # torn by a kill
            continue
        if query.instance and data.get("instance") != query.instance:
            continue
        if query.since and written < query.since:
            continue
        yield json.dumps({"name": query.name, "namespace": query.namespace, **data}).encode() + b"\n"
