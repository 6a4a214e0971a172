"""What a pod prints, followed for as long as it may print: its container's log as the API server gives it.

A stream that breaks is opened again where it broke. Timestamps are the kubelet's, in nanoseconds, one for each line.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import aclosing

from adapter.cluster.api import Api
from adapter.cluster.backoff import pause_s
from adapter.cluster.resources import PODS
from adapter.errors import AdapterError, NotFound

logger = logging.getLogger(__name__)

_SILENCE_S = 240.0
"""A stream without a word for so long may be dead: it is opened again, which costs two messages."""
_FIRST_PAUSE_S, _PAUSE_LIMIT_S = 0.1, 5.0
_TIMESTAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d) ?")


async def past_lines(
    api: Api, namespace: str, pod: str, container: str, *, tail: int = 0, since: str = ""
) -> list[tuple[str, bytes]]:
    """``(timestamp, line)`` of what it has printed so far: the last `tail` ones (0: all), none before `since` (RFC 3339,
    whole seconds). None where its container has not begun, or is gone."""
    params = {"container": container, "timestamps": "true"}
    if tail:
        params["tailLines"] = str(tail)
    if since:
        params["sinceTime"] = since
    try:
        async with aclosing(api.lines(PODS.path(namespace, pod, "log"), params=params, silence_s=_SILENCE_S)) as lines:
            return [split async for line in lines if (split := split_line(line)) is not None]
    except AdapterError as error:
        if not _is_not_there(error):
            logger.warning("a pod's log cannot be read", extra={"fields": {"pod": pod, "why": error.why}})
        return []


async def follow(
    api: Api, namespace: str, pod: str, container: str, *, after: str = ""
) -> AsyncIterator[tuple[str, bytes]]:
    """``(timestamp, line)`` of what it prints after the time `after` (RFC 3339), from its beginning where that is empty.

    Ends where there is no such pod any more; else it is for the caller to know when there will be no more lines.
    """
    attempt = 0
    while True:
        params = {"container": container, "timestamps": "true", "follow": "true"}
        if after:
            params["sinceTime"] = whole_second(after)
        try:
            path = PODS.path(namespace, pod, "log")
            async with aclosing(api.lines(path, params=params, silence_s=_SILENCE_S)) as lines:
                async for line in lines:
                    split = split_line(line)
                    if split is not None and split[0] > after:
                        after, attempt = split[0], 0
                        yield split
        except NotFound:
            return
        except AdapterError as error:
            if not _is_not_there(error) and error.code not in ("api-timed-out", "api-cut"):
                logger.info("a pod's log is interrupted", extra={"fields": {"pod": pod, "why": error.why}})
        attempt += 1
        await asyncio.sleep(pause_s(attempt, first_s=_FIRST_PAUSE_S, limit_s=_PAUSE_LIMIT_S))


def split_line(line: bytes) -> tuple[str, bytes] | None:
    """The timestamp, with nine digits of a second so that texts compare as times do, and the line; None without one."""
    match = _TIMESTAMP.match(line)
    if match is None:
        return None
    fraction = (match[2] or b".").ljust(10, b"0")
    return (match[1] + fraction + match[3]).decode(), line[match.end() :]


def whole_second(timestamp: str) -> str:
    """The API server's clock for `sinceTime` has whole seconds."""
    return timestamp[:19] + "Z"


def _is_not_there(error: AdapterError) -> bool:
    """Its container has not begun (400), or the pod is gone."""
    return isinstance(error, NotFound) or error.code == "refused-object"
