"""A Kubernetes API server in this process: objects, versions, watches; and what can go wrong, when a test says so.

It knows no schema and no rights. `tests/cluster/test_contract.py` plays the same scenes to it and to the real one.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from adapter.cluster.api import Api, Pace
from adapter.cluster.credentials import Access

MERGE, JSON_PATCH = "application/merge-patch+json", "application/json-patch+json"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeCredentials:
    def __init__(self, *accesses: Access) -> None:
        self._accesses = list(accesses)

    async def access(self, *, refused: Access | None = None) -> Access:
        if refused is not None and refused is self._accesses[0] and len(self._accesses) > 1:
            self._accesses.pop(0)
        return self._accesses[0]


def status(code: int, reason: str, message: str = "", **headers: str) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "reason": reason, "message": message or reason, "code": code}
    return web.json_response(body, status=code, headers=headers)


class FakeApiServer:
    """`objects` by their paths. `next` queues answers, for the calls that come next, in place of the real ones."""

    def __init__(self) -> None:
        self.objects: dict[str, dict] = {}
        self.requests: list[tuple[str, str]] = []
        """Method and path with query, of each request."""
        self.url = ""
        self.bodies: list[dict] = []
        self.silent = asyncio.Event()
        """While it is set, watches say nothing."""
        self._events: list[tuple[int, str, str, dict]] = []
        self._version = itertools.count(100)
        self._now = 99
        self._oldest = 0
        self._moved = asyncio.Condition()
        self._next: list[tuple[Callable[[web.Request], bool], Answer]] = []
        self._watches: set[asyncio.Task] = set()

    # --------------------------------------------------------------- what tests do to it

    @asynccontextmanager
    async def serving(self):
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])
        try:
            yield self
        finally:
            for watch in self._watches:
                watch.cancel()
            await runner.cleanup()

    def client(self, **options) -> Api:
        options.setdefault("pace", Pace(per_s=1e6, burst=1000))
        return Api(FakeCredentials(Access(self.url, "default")), **options)

    def next(self, answer: Answer | web.StreamResponse, when: Callable[[web.Request], bool] = lambda _: True) -> None:
        async def fixed(_):
            return answer

        self._next.append((when, answer if callable(answer) and not isinstance(answer, web.StreamResponse) else fixed))

    async def put(self, path: str, value: dict) -> dict:
        """As somebody else would."""
        kind = "MODIFIED" if path in self.objects else "ADDED"
        return await self._store(path, value, kind)

    async def remove(self, path: str) -> None:
        self._now = next(self._version)
        gone = self.objects.pop(path)
        gone["metadata"]["resourceVersion"] = str(self._now)
        await self._tell("DELETED", path, gone)

    def compact(self) -> None:
        """Versions before this are too old."""
        self._oldest = self._now

    async def bookmark(self) -> None:
        await self._tell("BOOKMARK", "", {"metadata": {"resourceVersion": str(self._now)}})

    def cut_watches(self) -> None:
        for watch in self._watches:
            watch.cancel()

    @property
    def watching(self) -> int:
        return len(self._watches)

    # --------------------------------------------------------------- serving

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        for index, (when, answer) in enumerate(self._next):
            if when(request):
                del self._next[index]
                return await answer(request)
        if request.method == "GET":
            if request.query.get("watch"):
                return await self._watch(request)
            return self._read(request)
        body = await request.json() if request.can_read_body else {}
        self.bodies.append(body)
        return await self._write(request, body)

    def _read(self, request: web.Request) -> web.Response:
        if request.path in self.objects:
            return web.json_response(self.objects[request.path])
        if not _is_collection(request.path):
            return status(404, "NotFound")
        items = [value for path, value in sorted(self.objects.items()) if _within(request.path, path)]
        start = int(request.query.get("continue") or 0)
        limit = int(request.query.get("limit") or 0) or len(items) or 1
        more = str(start + limit) if start + limit < len(items) else ""
        metadata = {"resourceVersion": str(self._now), **({"continue": more} if more else {})}
        return web.json_response({"kind": "List", "metadata": metadata, "items": items[start : start + limit]})

    async def _write(self, request: web.Request, body) -> web.StreamResponse:
        path, method = request.path, request.method
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.objects:
                return status(409, "AlreadyExists")
            return web.json_response(await self._store(path, body, "ADDED"), status=201)
        old = self.objects.get(path)
        is_apply = request.content_type == "application/apply-patch+yaml"
        if old is None and not is_apply:
            return status(404, "NotFound")
        if method == "DELETE":
            wanted = body.get("preconditions") or {}
            if any(old["metadata"].get(name) != value for name, value in wanted.items()):
                return status(409, "Conflict")
            await self.remove(path)
            return web.json_response({"kind": "Status", "status": "Success"})
        if method == "PUT":
            new = body
        elif request.content_type == JSON_PATCH:
            new = copy.deepcopy(old)
            try:
                tried = [_operate(new, operation) for operation in body]
            except (KeyError, IndexError):
                tried = [False]
            if not all(tried):
                return status(422, "Invalid", "the server rejected our request")
        else:
            new = _merged(copy.deepcopy(old or {}), body)
        version = body.get("metadata", {}).get("resourceVersion") if isinstance(body, dict) else None
        if old is not None and version and version != old["metadata"]["resourceVersion"]:
            return status(409, "Conflict", "the object has been modified")
        return web.json_response(await self._store(path, new, "MODIFIED" if old else "ADDED"))

    async def _store(self, path: str, value: dict, kind: str) -> dict:
        value = copy.deepcopy(value)
        self._now = next(self._version)
        metadata = value.setdefault("metadata", {})
        metadata.setdefault("name", path.rsplit("/", 1)[1])
        if "/namespaces/" in path and path.count("/") > 5:
            metadata.setdefault("namespace", path.split("/namespaces/")[1].split("/", maxsplit=1)[0])
        metadata.setdefault("uid", f"uid-{self._now}")
        metadata["resourceVersion"] = str(self._now)
        self.objects[path] = value
        await self._tell(kind, path, value)
        return value

    async def _tell(self, kind: str, path: str, value: dict) -> None:
        async with self._moved:
            self._events.append((self._now, kind, path, copy.deepcopy(value)))
            self._moved.notify_all()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        after = int(request.query["resourceVersion"])
        if after < self._oldest:
            gone = {"kind": "Status", "reason": "Expired", "message": "too old resource version", "code": 410}
            await response.write(_line("ERROR", gone))
            return response
        task = asyncio.create_task(self._send(request.path, after, response))
        self._watches.add(task)
        try:
            await asyncio.wait([task], timeout=float(request.query["timeoutSeconds"]))
        finally:
            self._watches.discard(task)
            task.cancel()
        return response

    async def _send(self, below: str, after: int, response: web.StreamResponse) -> None:
        at = next((i for i, event in enumerate(self._events) if event[0] > after), len(self._events))

        def more() -> bool:
            return len(self._events) > at and not self.silent.is_set()

        while True:
            async with self._moved:
                await self._moved.wait_for(more)
            _, kind, path, value = self._events[at]
            at += 1
            if kind == "BOOKMARK" or _within(below, path):
                await response.write(_line(kind, value))


def _line(kind: str, value: dict) -> bytes:
    return json.dumps({"type": kind, "object": value}).encode() + b"\n"


def _collection(path: str) -> str:
    return path.rsplit("/", 1)[0]


def _is_collection(path: str) -> bool:
    parts = path.split("/")[1:]
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    return len(parts[2:] if parts[0] == "namespaces" and len(parts) > 2 else parts) == 1


def _within(collection: str, path: str) -> bool:
    """Also what is in a namespace, for a collection of all."""
    if _collection(path) == collection:
        return True
    head, _, plural = collection.rpartition("/")
    return path.startswith(f"{head}/namespaces/") and _collection(path).endswith(f"/{plural}")


def _merged(old: dict, patch: dict) -> dict:
    for name, value in patch.items():
        if value is None:
            old.pop(name, None)
        elif isinstance(value, dict):
            old[name] = _merged(old.get(name) or {}, value)
        else:
            old[name] = value
    return old


def _operate(value: dict, operation: dict) -> bool:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in parents:
        value = value[int(part)] if isinstance(value, list) else value[part]
    at = int(last) if isinstance(value, list) and last != "-" else last
    if operation["op"] == "test":
        return value[at] == operation["value"]
    if operation["op"] == "remove":
        del value[at]
    elif isinstance(value, list) and operation["op"] == "add":
        value.insert(len(value) if at == "-" else at, operation["value"])
    else:
        value[at] = operation["value"]
    return True


async def hang(request: web.Request) -> web.StreamResponse:
    """Takes the request and never answers."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def cut(request: web.Request) -> web.StreamResponse:
    """Closes the connection in the middle of an answer."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"kind"')
    assert request.transport is not None
    request.transport.abort()
    return response


def watches(request: web.Request) -> bool:
    return bool(request.query.get("watch"))


def lists(request: web.Request) -> bool:
    return request.method == "GET" and not watches(request)
