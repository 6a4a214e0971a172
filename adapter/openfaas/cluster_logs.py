"""`GET /system/logs` on a cluster: what a function's pods print, merged, without the events that entrypoints say there.

Only of pods that are there: what has gone took its log with it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from datetime import datetime, timezone

from adapter.cluster.api import Api
from adapter.hosts import Deployment
from adapter.hosts.kubernetes_log import follow, past_lines, whole_second
from adapter.hosts.kubernetes_pods import Pod
from adapter.hosts.kubernetes_replica import event_in
from adapter.openfaas.logs import LogQuery, Logs

_POLL_S = 0.5
"""New pods are looked for this often while a log is followed: what reads logs is people."""
_BACKLOG = 1000
"""Lines that may wait for a reader who is slower than the pods."""

Line = tuple[str, str, bytes]
"""Timestamp, instance, text."""


def pod_logs(api: Api, pods: Callable[[str], Iterable[Pod]]) -> Logs:
    """`pods` gives those of the function ``name.namespace``."""

    async def read(deployment: Deployment, query: LogQuery, stopping: asyncio.Event) -> AsyncIterator[bytes]:
        def wanted() -> list[Pod]:
            return [pod for pod in pods(deployment.key) if query.instance in ("", pod.name)]

        reached: dict[str, str] = {}
        for line in await _past(api, wanted(), query):
            reached[line[1]] = line[0]
            yield _entry(query, line)
        if query.follow:
            async for line in _Following(api, wanted, reached).lines(stopping):
                yield _entry(query, line)

    return read


async def _past(api: Api, pods: Iterable[Pod], query: LogQuery) -> list[Line]:
    """In order of time, the last `tail` of them all."""
    since = query.since.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f000Z") if query.since else ""

    async def of(pod: Pod) -> list[Line]:
        past = past_lines(api, pod.namespace, pod.name, pod.function, since=whole_second(since) if since else "")
        return [(time, pod.name, text) for time, text in await past if time >= since and event_in(text) is None]

    found = sorted(line for lines in await asyncio.gather(*map(of, pods)) for line in lines)
    return found[-query.tail :] if query.tail else found


class _Following:
    """What comes from now on. `reached`: the time of the last line of each pod that was told already."""

    def __init__(self, api: Api, wanted: Callable[[], list[Pod]], reached: dict[str, str]) -> None:
        self._api = api
        self._wanted = wanted
        self._reached = reached
        self._lines: asyncio.Queue[Line] = asyncio.Queue(_BACKLOG)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def lines(self, stopping: asyncio.Event) -> AsyncIterator[Line]:
        """Until `stopping` is set, or nobody listens."""
        try:
            while not stopping.is_set():
                for pod in self._wanted():
                    if pod.name not in self._tasks:
                        self._tasks[pod.name] = asyncio.create_task(self._follow(pod))
                with suppress(asyncio.TimeoutError):
                    yield await asyncio.wait_for(self._lines.get(), _POLL_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _follow(self, pod: Pod) -> None:
        after = self._reached.get(pod.name, "")
        async for time, text in follow(self._api, pod.namespace, pod.name, pod.function, after=after):
            if event_in(text) is None:
                await self._lines.put((time, pod.name, text))


def _entry(query: LogQuery, line: Line) -> bytes:
    """OpenFaaS's form; timestamps in microseconds, as Python and so our other hosts have them."""
    time, instance, text = line
    stamp = datetime.fromisoformat(time[:26] + "+00:00").isoformat()
    fields = {"timestamp": stamp, "instance": instance, "text": text.decode(errors="replace")}
    return json.dumps({"name": query.name, "namespace": query.namespace, **fields}).encode() + b"\n"
