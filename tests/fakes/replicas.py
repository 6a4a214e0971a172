"""A host whose replicas are HTTP servers of this process, which come up, fail and die as a test says."""

from __future__ import annotations

import asyncio
import base64
import itertools
import socket
import time
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from adapter.errors import NotFound
from adapter.hosts import Deployment, Inventory, LocalHost, ReplicaState
from adapter.hosts.folders import config_in
from adapter.ledger.store import Ledger, ledger_url
from adapter.openfaas.file_catalog import FileCatalog
from adapter.openfaas.gateway import Gateway
from adapter.openfaas.logs import file_logs
from adapter.openfaas.recorder import LedgerRecorder
from adapter.openfaas.server import run_gateway
from adapter.policy.grants import Device
from adapter.records import Event, EventName, Phase, PhaseName, Rung, StartRecord

LIMIT_S = 30.0


async def until(condition, limit_s: float = LIMIT_S):
    """Give the loop turns until it is so: for what arrives through sockets, which no event tells."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never was so"
        await asyncio.sleep(0.001)


async def echo(request: web.Request) -> web.StreamResponse:
    return web.Response(body=await request.read(), headers={"X-Path": request.raw_path})


class FakeReplica:
    """Holds requests until `serve` is called, as an entrypoint does; on a GPU a parked one waits for `resume`."""

    def __init__(self, host: FakeHost, identity: str, deployment: Deployment, sink, devices=()) -> None:
        self.id = identity
        self.devices = devices
        self.deployment = deployment
        self.host = "127.0.0.1"
        self.state = ReplicaState.STARTING
        self.building_snapshot = False
        self.parks = 0
        self.requests = 0
        self.stop_asked = asyncio.Event()
        self.stop_allowed = asyncio.Event()
        self.stop_allowed.set()
        self._fake_host = host
        self._sink = sink
        self._awake = asyncio.Event()
        self._failed = ""
        self._socket = socket.create_server((self.host, 0), backlog=1024)
        self.port = self._socket.getsockname()[1]
        self._began_at_ns = time.time_ns()

    async def open(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=LIMIT_S)
        await self._runner.setup()
        self._site = web.SockSite(self._runner, self._socket)
        await self._site.start()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        if self.state is ReplicaState.PARKED and not self.devices:
            self._began_at_ns = time.time_ns()
            self.serve("resume")
        await self._awake.wait()
        if self._failed:
            return web.Response(status=503, text=self._failed, headers={"Retry-After": "1"})
        return await self._fake_host.handler(request)

    def say(self, name: EventName, **fields) -> None:
        self._sink(self, Event(name, time.time_ns(), fields))

    def serve(self, rung: str = "load") -> None:
        self.state = ReplicaState.SERVING
        self._awake.set()
        self.say(EventName.SERVING, rung=rung)
        self.say(EventName.STARTED, record=self.record(rung).to_json())

    def fail(self, reason: str = "ValueError: no weights", code: str = "load-raised") -> None:
        """As an entrypoint does: those who are held are told."""
        self._failed = reason
        self._awake.set()
        self.say(EventName.FAILED, code=code, reason=reason, record=self.record("load", error=reason).to_json())

    def snapshot(self, state: str) -> None:
        self.building_snapshot = state == "building"
        self.say(EventName.SNAPSHOT, state=state, key="k", reason="", bytes=1, seconds=0.1)

    def record(self, rung: str, error: str = "") -> StartRecord:
        total = time.time_ns() - self._began_at_ns + 1
        return StartRecord(
            self.deployment.name,
            self.deployment.namespace,
            self.deployment.revision,
            self.id,
            Rung(rung),
            self._began_at_ns,
            total,
            (Phase(PhaseName.LOAD, 0, total),),
            error=error,
        )

    def park(self) -> None:
        self.parks += 1
        if self._fake_host.parks and self.state is ReplicaState.SERVING:
            self.now_parked()

    def now_parked(self) -> None:
        self.state = ReplicaState.PARKED
        self._awake.clear()
        self.say(EventName.PARKED)

    def resume(self, devices) -> None:
        assert self.state is ReplicaState.PARKED
        self.devices = tuple(devices)
        self._began_at_ns = time.time_ns()
        if self._fake_host.serves:
            asyncio.get_running_loop().call_soon(self.serve, "resume")

    async def die(self, reason: str = "killed by SIGKILL", **fields: str) -> None:
        """As by kill -9: every connection is reset, and nothing is said but that it is over."""
        await self._stop_accepting()
        self._site._server.close()
        self._socket.close()
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        self._end(reason, **fields)
        await self._runner.cleanup()

    async def stop(self, grace_s: float) -> None:
        self.stop_asked.set()
        await self.stop_allowed.wait()
        if self.state is not ReplicaState.GONE:
            self.state = ReplicaState.STOPPING
            await self._stop_accepting()
            await self._runner.cleanup()
            self._end("drained")

    async def _stop_accepting(self) -> None:
        """Let what was accepted have its handler first: CPython leaves a connection open for ever whose server is
        closed in between, and aiohttp waits for one whose handler has not begun."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
        for _ in range(5):
            await asyncio.sleep(0)

    def _end(self, reason: str, **fields: str) -> None:
        self.state = ReplicaState.GONE
        self._fake_host.replicas.remove(self)
        self.say(EventName.STOPPED, reason=reason, **fields)


@dataclass
class FakeHost(LocalHost):
    """`serves`: replicas come up by themselves; `errors` are raised by the next starts, one each."""

    state: object
    handler: object = echo
    serves: bool = True
    rung: str = "load"
    functions: tuple[str, ...] = ("echo", "other")
    errors: deque = field(default_factory=deque)
    problem: Exception | None = None
    """Raised by `prepare`."""
    gpus: tuple[Device, ...] = ()
    parks: bool = True
    """Replicas park when they are asked to."""

    def __post_init__(self):
        self.replicas = []
        self.started = 0
        self.prepared = []
        self.removed = []
        self.may_prepare = asyncio.Event()
        self.may_prepare.set()
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.changed = asyncio.Event()
        self._numbers = itertools.count(1)

    def folder_of(self, image: str):
        name = image.rsplit("/", 1)[-1].partition(":")[0]
        if name not in self.functions:
            raise NotFound(f"No function folder for the image {image!r}.", why=f"Known: {', '.join(self.functions)}.")
        folder = self.state / "folders" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "handler.py").write_text("def handle(event, context): ...\n")
        return folder

    async def prepare(self, deployment):
        await self.may_prepare.wait()
        self.prepared.append(deployment)
        if self.problem is not None:
            raise self.problem

    async def inventory(self):
        return Inventory(self.gpus, "580.1") if self.gpus else Inventory(why_not="No driver.")

    async def start(self, deployment, sink, devices=()):
        self.started += 1
        await self.may_start.wait()
        if self.errors:
            raise self.errors.popleft()
        replica = FakeReplica(self, f"{deployment.name}-{next(self._numbers)}", deployment, sink, devices)
        self.replicas.append(replica)
        await replica.open()
        if self.serves:
            asyncio.get_running_loop().call_soon(replica.serve, self.rung)
        self.changed.set()
        return replica

    async def new_replica(self, count: int = 1):
        """The latest replica, once so many were started."""
        await until(lambda: self.started >= count and len(self.replicas) > 0)
        return self.replicas[-1]

    async def remove(self, deployment):
        self.removed.append(deployment)

    def log_path(self, deployment):
        return self.state / "logs" / f"{deployment.key}.jsonl"

    async def close(self):
        for replica in list(self.replicas):
            await replica.stop(0)


@dataclass
class Running:
    """A gateway that serves, its host, and a client."""

    gateway: Gateway
    host: FakeHost
    url: str
    client: aiohttp.ClientSession
    stop: asyncio.Event
    ledger: Ledger

    async def deploy(self, name: str = "echo", *, method: str = "POST", **annotations: str):
        """Deploy and wait until it is prepared; nothing is started."""
        wanted = {f"gpufn.dev/{key.replace('_', '-')}": value for key, value in {"initial": "0", **annotations}.items()}
        body = {"service": name, "image": f"{name}:1", "annotations": wanted}
        async with self.client.request(method, f"{self.url}/system/functions", json=body) as response:
            assert response.status == 202, await response.text()
        fleet = self.gateway.fleet(f"{name}.openfaas-fn")
        await until(lambda: not fleet.rollout.preparing)
        return fleet

    async def call(self, name: str = "echo", body: bytes = b"hi", path: str = "", **options):
        """Status, headers and body of one invocation."""
        async with self.client.post(f"{self.url}/function/{name}{path}", data=body, **options) as response:
            return response.status, response.headers, await response.read()

    async def json(self, path: str):
        async with self.client.get(self.url + path) as response:
            assert response.status == 200, await response.text()
            return await response.json()


def basic(user: str, password: str) -> str:
    """An Authorization header."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@asynccontextmanager
async def serving(state, host: FakeHost | None = None, credentials: tuple[str, str] | None = None):
    """A gateway over `host` that listens on a free port."""
    host = host or FakeHost(state)
    ledger = Ledger.open(ledger_url(state))
    gateway = Gateway(
        state,
        host,
        FileCatalog(state),
        LedgerRecorder(ledger),
        file_logs(host.log_path),
        lambda image: config_in(host.folder_of(image)),
        await host.inventory(),
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run_gateway(gateway, credentials, listener, stop, ready.set_result))
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": basic(*credentials)} if credentials else {}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as client:
        try:
            yield Running(gateway, host, await asyncio.wait_for(ready, LIMIT_S), client, stop, ledger)
        finally:
            stop.set()
            await asyncio.wait_for(task, LIMIT_S)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))
