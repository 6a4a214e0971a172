"""A cluster in this process: the fake API server, a node whose containers are real entrypoints, and a garbage collector.

An image is a function folder of the same name. Containers run as processes of this machine, each on a port of its own;
what they print is their log. `tests/cluster` plays the host's contract to a real cluster.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from aiohttp import ClientError, ClientSession, ClientTimeout, web

import adapter
from adapter.hosts.container import CONFIG_LABEL, CONTRACT_LABEL
from adapter.keys import CONTRACT_VERSION
from adapter.registry.client import MANIFEST_TYPE
from tests.fakes.api_server import FakeApiServer, status
from tests.fakes.host import write_function
from tests.fakes.registry import FakeRegistry

PROBE_S = 0.05


@dataclass
class Cluster:
    """What contract tests of clusters use: see `tests.contract.hosts.kubernetes`. `image` makes one more."""

    fake: FakeCluster
    registry: FakeRegistry
    images: dict[str, str] = field(default_factory=dict)
    namespace: str = "openfaas-fn"

    @asynccontextmanager
    async def running(self):
        async with self.fake.serving():
            try:
                yield
            finally:
                await self.fake.close()

    def client(self):
        return self.fake.client()

    def image(self, name: str, handler: str, **labels: str) -> None:
        """A function folder, and what a registry says of an image of it."""
        write_function(self.fake.functions, name, handler)
        labels = {CONTRACT_LABEL: str(CONTRACT_VERSION), CONFIG_LABEL: "{}", **labels}
        config = json.dumps({"config": {"Labels": labels, "User": "1000"}}).encode()
        digest = "sha256:" + hashlib.sha256(config).hexdigest()
        self.registry.blobs[digest] = config
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": {"digest": digest, "size": len(config)}}
        raw = json.dumps({**manifest, "layers": [], "annotations": {"name": name}}).encode()
        repository = f"{self.registry.host}/team/fn"
        self.images[name] = f"{repository}:{name}"
        pinned = f"{repository}@{self.registry.put_manifest(name, MANIFEST_TYPE, raw)}"
        for reference in (self.images[name], pinned):
            self.fake.folders[reference] = self.fake.functions / name


@contextmanager
def in_this_process(folder: Path, handlers: dict[str, str]):
    with FakeRegistry().running() as registry:
        cluster = Cluster(FakeCluster(folder / "functions"), registry)
        for name, handler in handlers.items():
            cluster.image(name, handler)
        cluster.images["missing"] = f"{registry.host}/team/fn:missing"
        yield cluster


@dataclass(eq=False)
class Container:
    """One pod's, while it runs."""

    path: str
    process: asyncio.subprocess.Process
    log: list[bytes] = field(default_factory=list)
    printed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    async def kill(self) -> None:
        """With all its processes, as the end of a container's first one does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        self.process._transport.close()  # its output too, which is read no more

    def print(self, text: bytes) -> None:
        """As if its function had printed it."""
        stamp = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S}.{time.time_ns() % 10**9:09d}Z"
        self.log.append(f"{stamp} ".encode() + text + b"\n")
        self.printed.set()


class FakeCluster(FakeApiServer):
    """`schedules`: whether pods find a node; `runs`: whether containers are started there, else `waiting` is why not."""

    def __init__(self, functions: Path) -> None:
        super().__init__()
        self.functions = functions
        self.folders: dict[str, Path] = {}
        """Of functions, by images."""
        self.default: Path | None = None
        """What all other images are; None: nobody has them."""
        self.containers: dict[str, Container] = {}
        self.schedules = True
        self.runs = True
        self.waiting: dict[str, str] = {"reason": "ContainerCreating"}
        self.refuses = ""
        """Why no pod may be made."""
        self.forbidden = ""
        """A namespace in which nothing is allowed."""
        self._tasks: set[asyncio.Task] = set()

    def run(self, work) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for container in self.containers.values():
            await container.kill()

    def pods(self) -> list[dict]:
        return [value for path, value in self.objects.items() if "/pods/" in path]

    async def change(self, path: str, **status_fields) -> None:
        """As a kubelet or a controller writes a pod's status."""
        pod = self.objects.get(path)
        if pod is not None:
            pod["status"] = {**pod.get("status", {}), **status_fields}
            await self._store(path, pod, "MODIFIED")

    # --------------------------------------------------------------- what the API server does with pods

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if self.forbidden and f"/namespaces/{self.forbidden}/" in request.path:
            return status(403, "Forbidden", f"forbidden in {self.forbidden}")
        if request.path.endswith("/log") and not self._next:
            return await self._log(request)
        return await super()._serve(request)

    async def _write(self, request: web.Request, body) -> web.StreamResponse:
        is_pod = "/pods" in request.path
        if is_pod and request.method == "POST" and self.refuses:
            return status(403, "Forbidden", self.refuses)
        if is_pod and request.method == "POST" and not _is_valid(body):
            return status(422, "Invalid", "spec.containers[0].resources: quantities must match the regular expression")
        if request.query.get("dryRun"):
            return web.json_response(body, status=201)
        if is_pod and request.method == "DELETE":
            return await self._delete(request.path, body)
        if is_pod and request.method == "POST":
            _on_a_free_port(body)
        if request.method == "PUT" and request.path in self.objects:
            old = self.objects[request.path]["metadata"]
            body["metadata"] |= {name: old[name] for name in ("uid", "creationTimestamp")}
        if request.method == "POST":
            body["metadata"]["creationTimestamp"] = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
        answer = await super()._write(request, body)
        if is_pod and request.method == "POST" and answer.status == 201:
            self.run(self._place(f"{request.path}/{body['metadata']['name']}"))
        if request.method == "DELETE" and answer.status == 200:
            self.run(self._collect())
        return answer

    async def _delete(self, path: str, body: dict) -> web.StreamResponse:
        pod = self.objects.get(path)
        if pod is None:
            return status(404, "NotFound")
        wanted = (body.get("preconditions") or {}).get("uid")
        if wanted and wanted != pod["metadata"]["uid"]:
            return status(409, "Conflict")
        grace_s = body.get("gracePeriodSeconds", pod["spec"].get("terminationGracePeriodSeconds", 30))
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        await self._store(path, pod, "MODIFIED")
        self.run(self._end(path, grace_s))
        return web.json_response(pod)

    async def _collect(self) -> None:
        """Delete what is owned by nobody that is there."""
        uids = {value["metadata"]["uid"] for value in self.objects.values()}
        for path, value in list(self.objects.items()):
            owners = value["metadata"].get("ownerReferences") or []
            if owners and not any(owner["uid"] in uids for owner in owners):
                if "/pods/" in path:
                    await self._delete(path, {})
                else:
                    await self.remove(path)

    # --------------------------------------------------------------- a scheduler and a kubelet

    async def _place(self, path: str) -> None:
        if not self.schedules:
            message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            await self.change(path, phase="Pending", conditions=[condition])
            return
        self.objects[path]["spec"]["nodeName"] = "node1"
        if not self.runs:
            await self.change(path, phase="Pending", containerStatuses=[self._container(path, waiting=self.waiting)])
            return
        image = self.objects[path]["spec"]["containers"][0]["image"]
        if image not in self.folders and self.default is None:
            for reason in ("ErrImagePull", "ImagePullBackOff"):
                waiting = {"reason": reason, "message": f"failed to pull image {image}: not found"}
                await self.change(path, phase="Pending", containerStatuses=[self._container(path, waiting=waiting)])
            return
        await self.start_container(path)

    async def start_container(self, path: str, restarts: int = 0) -> None:
        pod = self.objects[path]
        spec = pod["spec"]["containers"][0]
        own = {item["name"]: item["value"] for item in spec["env"]}
        secrets = self.functions / ".secrets" / pod["metadata"]["name"]
        self._project(pod, secrets)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "adapter.runtime",
            env={
                "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(adapter.__file__).parent.parent), **own,
                "HOSTNAME": pod["metadata"]["name"], "GPUFN_FOLDER": str(self.folders.get(spec["image"]) or self.default),
                "GPUFN_METRICS_PORT": "0", "GPUFN_SECRETS_DIR": str(secrets), "GPUFN_SNAPSHOT_DIR": "",
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=2**20,
            start_new_session=True,
        )  # fmt: skip
        container = self.containers[path] = Container(path, process)
        self.run(self._keep(container))
        running = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        statuses = [self._container(path, restarts, **running)]
        await self.change(path, phase="Running", podIP="127.0.0.1", containerStatuses=statuses, conditions=[])
        self.run(self._probe(container))

    def _project(self, pod: dict, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for volume in pod["spec"]["volumes"]:
            for source in volume.get("projected", {}).get("sources", ()):
                name = source["secret"]["name"]
                secret = self.objects[f"/api/v1/namespaces/{pod['metadata']['namespace']}/secrets/{name}"]
                for key, value in secret["data"].items():
                    (folder / key).write_bytes(base64.b64decode(value))

    def _container(self, path: str, restarts: int = 0, **state) -> dict:
        name = self.objects[path]["spec"]["containers"][0]["name"]
        return {"name": name, "restartCount": restarts, "state": state, "lastState": {}}

    async def _keep(self, container: Container) -> None:
        assert container.process.stdout is not None
        async for line in container.process.stdout:
            container.print(line.rstrip(b"\n"))
        code = await container.process.wait()
        with suppress(ProcessLookupError):
            os.killpg(container.process.pid, signal.SIGKILL)
        container.ended = True
        container.printed.set()
        await self.container_ended(container, code)

    async def container_ended(self, container: Container, code: int, reason: str = "") -> None:
        terminated = {
            "exitCode": code if code >= 0 else 128 - code,
            "reason": reason or ("Error" if code else "Completed"),
        }
        if container.path in self.objects and self.containers.get(container.path) is container:
            await self.change(
                container.path, containerStatuses=[self._container(container.path, terminated=terminated)]
            )

    async def _probe(self, container: Container) -> None:
        pod = self.objects[container.path]
        spec = pod["spec"]["containers"][0]
        url = f"http://127.0.0.1:{spec['ports'][0]['containerPort']}{spec['readinessProbe']['httpGet']['path']}"
        was = False
        async with ClientSession(timeout=ClientTimeout(total=1)) as client:
            while not container.ended:
                try:
                    async with client.get(url) as answer:
                        ready = answer.status == 200
                except (ClientError, asyncio.TimeoutError):
                    ready = False
                if ready != was and container.path in self.objects:
                    was = ready
                    await self.change(container.path, conditions=[{"type": "Ready", "status": str(ready)}])
                await asyncio.sleep(PROBE_S)

    async def _end(self, path: str, grace_s: float) -> None:
        container = self.containers.get(path)
        if container is not None and not container.ended:
            with suppress(ProcessLookupError):
                container.process.send_signal(signal.SIGTERM)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(container.process.wait(), grace_s)
            if container.process.returncode is None:
                container.process.kill()
            await container.process.wait()
        if path in self.objects:
            await self.remove(path)

    async def _log(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removesuffix("/log")
        container = self.containers.get(path)
        if path not in self.objects:
            return status(404, "NotFound")
        if container is None:
            return status(400, "BadRequest", "container is waiting to start: ContainerCreating")
        since = request.query.get("sinceTime", "").rstrip("Z").encode()
        response = web.StreamResponse()
        await response.prepare(request)
        at = 0
        while True:
            container.printed.clear()
            for line in container.log[at:]:
                if line >= since:
                    await response.write(line)
            at = len(container.log)
            if not request.query.get("follow") or container.ended:
                return response
            await container.printed.wait()


def _on_a_free_port(pod: dict) -> None:
    """All containers share one machine here."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    container = pod["spec"]["containers"][0]
    container["ports"][0]["containerPort"] = port
    for item in container["env"]:
        if item["name"] == "PORT":
            item["value"] = str(port)


def _is_valid(pod: dict) -> bool:
    """All of a schema that is known here."""
    limits = pod["spec"]["containers"][0]["resources"].get("limits", {})
    return all(re.fullmatch(r"[0-9.]+[A-Za-z]{0,2}", text) for text in limits.values())
