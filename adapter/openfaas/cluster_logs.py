"""`GET /system/logs` on a cluster: what a function's pods print, merged, without the events that entrypoints say there.

Only of pods that are there: what has gone took its log with it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from datetime import datetime, timezone

from adapter.cluster.api import Api
from adapter.hosts import Deployment
from adapter.hosts.kubernetes_log import follow, past_lines, whole_second
from adapter.hosts.kubernetes_replica import event_in
from adapter.hosts.kubernetes_status import Pod
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

        past, reached = await _past(api, wanted(), query)
        for line in past:
            yield _entry(query, line)
        if query.follow:
            async with aclosing(_Following(api, wanted, reached).lines(stopping)) as lines:
                async for line in lines:
                    yield _entry(query, line)

    return read


async def _past(api: Api, pods: Sequence[Pod], query: LogQuery) -> tuple[list[Line], dict[str, str]]:
    """In order of time, the last `tail` of them all; and of each pod the time up to which that is all that is told."""
    since = query.since.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f000Z") if query.since else ""
    whole = whole_second(since) if since else ""
    logs = await asyncio.gather(*(past_lines(api, p.namespace, p.name, p.function, since=whole) for p in pods))
    named = [(pod.name, log) for pod, log in zip(pods, logs, strict=True)]
    found = sorted((t, name, text) for name, log in named for t, text in log if t >= since and event_in(text) is None)
    reached = {name: max((time for time, _ in log), default=since) for name, log in named}
    return found[-query.tail :] if query.tail else found, reached


class _Following:
    """What comes from now on. `reached`: of each pod, the time up to which nothing is to be told any more."""

    def __init__(self, api: Api, wanted: Callable[[], list[Pod]], reached: dict[str, str]) -> None:
        self._api = api
        self._wanted = wanted
        self._reached = reached
        self._lines: asyncio.Queue[Line] = asyncio.Queue(_BACKLOG)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def lines(self, stopping: asyncio.Event) -> AsyncGenerator[Line, None]:
        """Until `stopping` is set, or nobody listens."""
        try:
            while not stopping.is_set():
                there = {pod.name: pod for pod in self._wanted()}
                for name in there.keys() - self._tasks.keys():
                    self._tasks[name] = asyncio.create_task(self._follow(there[name]))
                for name in [name for name, task in self._tasks.items() if task.done() and name not in there]:
                    del self._tasks[name]
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
