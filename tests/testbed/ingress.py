"""A small real ingress for Knative: `python -m tests.testbed.ingress KUBECONFIG ADDRESS INTERNAL-HOST CLASS`.

Watches what it needs, says on each KIngress when it is served, and routes HTTP by host, path and header to the splits,
with the headers that Knative wants appended. Bodies stream both ways. It asks the addresses of endpoints themselves, as
Kourier and Istio do, so that a revision that was just woken or put to sleep is not asked where it was before.
No TLS, no WebSocket, no HTTP/2. https://github.com/knative/networking has the type.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import datetime as dt
import json
import random
import ssl
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from aiohttp import web

KINGRESSES = "/apis/networking.internal.knative.dev/v1alpha1/ingresses"
CLASS_ANNOTATION = "networking.knative.dev/ingress.class"
CONDITIONS = ("LoadBalancerReady", "NetworkConfigured", "Ready")
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "host"}
TRIES, AGAIN_AFTER_S = 100, 0.1
"""Of a request whose endpoints are not there yet, or gone already."""

Object = Mapping[str, Any]
Key = tuple[str, str]
"""Namespace and name."""
Take = Callable[[Mapping[Key, Object]], Awaitable[None]]


# What is routed where: pure.


@dataclasses.dataclass(frozen=True)
class Split:
    """A share of the requests: where it goes, and what it is told."""

    service: Key
    port: str
    percent: int
    headers: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Route:
    """One path of a rule."""

    prefix: str
    wanted: Mapping[str, str]
    """Headers that a request must have, by lower-case name."""
    host: str
    """Sent on instead of the one that was asked for; empty: that one."""
    headers: Mapping[str, str]
    splits: Sequence[Split]

    def fits(self, path: str, headers: Mapping[str, str]) -> bool:
        """`headers` find names in any case."""
        return path.startswith(self.prefix) and all(headers.get(name) == value for name, value in self.wanted.items())


def routes(ingress: Object) -> dict[str, list[Route]]:
    """By host; those that ask for more come first."""
    namespace, found = ingress["metadata"]["namespace"], {}
    for rule in ingress["spec"].get("rules", ()):
        made = [_route(path, namespace) for path in rule["http"]["paths"]]
        made.sort(key=lambda route: (-len(route.wanted), -len(route.prefix)))
        found.update(dict.fromkeys(rule["hosts"], made))
    return found


def _route(path: Object, namespace: str) -> Route:
    splits = [
        Split(
            (split.get("serviceNamespace", namespace), split["serviceName"]),
            str(split["servicePort"]),
            split.get("percent", 100),
            split.get("appendHeaders", {}),
        )
        for split in path["splits"]
    ]
    wanted = {name.lower(): match["exact"] for name, match in path.get("headers", {}).items()}
    return Route(path.get("path", ""), wanted, path.get("rewriteHost", ""), path.get("appendHeaders", {}), splits)


def choose(splits: Sequence[Split], dice: Callable[[], float] = random.random) -> Split:
    """By their shares; `dice` is in [0, 1)."""
    drawn = dice() * sum(split.percent for split in splits)
    for split in splits:
        drawn -= split.percent
        if drawn < 0:
            return split
    return splits[-1]


def addresses(service: Object, endpoints: Object, port: str) -> list[str]:
    """HOST:PORT of each ready endpoint behind that port (number or name) of a service."""
    names = {
        each.get("name", "")
        for each in service["spec"].get("ports", ())
        if port in {str(each["port"]), each.get("name")}
    }
    return [
        f"{address['ip']}:{each['port']}"
        for subset in endpoints.get("subsets") or ()
        for each in subset.get("ports") or ()
        if each.get("name", "") in names
        for address in subset.get("addresses") or ()
    ]


def ready_status(ingress: Object, internal_host: str, now: str) -> dict[str, Any]:
    balancer = {"ingress": [{"domainInternal": internal_host}]}
    return {
        "observedGeneration": ingress["metadata"]["generation"],
        "conditions": [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in CONDITIONS],
        "publicLoadBalancer": balancer,
        "privateLoadBalancer": balancer,
    }


def is_told(ingress: Object) -> bool:
    """Its status says already that this generation is served."""
    status = ingress.get("status", {})
    return status.get("observedGeneration") == ingress["metadata"]["generation"] and any(
        condition["type"] == "Ready" and condition["status"] == "True" for condition in status.get("conditions", ())
    )


# The API server.


class Api:
    """Requests to the server of a kubeconfig with a client certificate."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        decoded = base64.b64decode(cluster["certificate-authority-data"]).decode()
        context = ssl.create_default_context(cadata=decoded)
        with tempfile.NamedTemporaryFile() as pem:
            for name in ("client-certificate-data", "client-key-data"):
                pem.write(base64.b64decode(user[name]))
            pem.flush()
            context.load_cert_chain(pem.name)
        self._session = aiohttp.ClientSession(
            cluster["server"],
            connector=aiohttp.TCPConnector(ssl=context),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=330),
        )

    async def watch(self, path: str, take: Take) -> None:
        """Gives `take` all objects there, and again whenever one has changed; never returns."""
        while True:
            try:
                async with self._session.get(path, raise_for_status=True) as answer:
                    listing = await answer.json()
                objects = {_key(item): item for item in listing["items"]}
                await take(objects)
                await self._follow(path, listing["metadata"]["resourceVersion"], objects, take)
            except (aiohttp.ClientError, asyncio.TimeoutError, json.JSONDecodeError) as error:
                print(f"{path}: {error}; again", flush=True)
                await asyncio.sleep(0.5)

    async def _follow(self, path: str, version: str, objects: dict[Key, Object], take: Take) -> None:
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": "300"}
        async with self._session.get(path, params=query, raise_for_status=True, read_bufsize=1 << 22) as answer:
            async for line in answer.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return  # too old: list again
                if event["type"] == "DELETED":
                    objects.pop(_key(event["object"]), None)
                else:
                    objects[_key(event["object"])] = event["object"]
                await take(objects)

    async def patch_status(self, path: str, status: Object) -> None:
        """Raises `aiohttp.ClientError`."""
        headers = {"Content-Type": "application/merge-patch+json"}
        async with self._session.patch(
            f"{path}/status", data=json.dumps({"status": status}), headers=headers
        ) as answer:
            if answer.status != 404:  # it was deleted meanwhile
                answer.raise_for_status()


def _key(item: Object) -> Key:
    return item["metadata"]["namespace"], item["metadata"]["name"]


# The proxy.


class Tables(Protocol):
    """What is served now: routes by host, and who answers behind a service."""

    routes: Mapping[str, Sequence[Route]]
    services: Mapping[Key, Object]
    endpoints: Mapping[Key, Object]


class WatchedTables:
    """`Tables` as the API server has them, for the KIngresses of one class, each of which is told when it is served."""

    def __init__(self, api: Api, internal_host: str, ingress_class: str) -> None:
        self._api, self._internal_host, self._class = api, internal_host, ingress_class
        self._kingresses: Mapping[Key, Object] = {}
        self.routes: Mapping[str, Sequence[Route]] = {}
        self.services: Mapping[Key, Object] = {}
        self.endpoints: Mapping[Key, Object] = {}

    async def watch(self) -> None:
        """Never returns."""
        await asyncio.gather(
            self._api.watch("/api/v1/services", self._take_services),
            self._api.watch("/api/v1/endpoints", self._take_endpoints),
            self._api.watch(KINGRESSES, self._take_kingresses),
        )

    async def _take_services(self, found: Mapping[Key, Object]) -> None:
        self.services = found

    async def _take_endpoints(self, found: Mapping[Key, Object]) -> None:
        self.endpoints = found

    async def _take_kingresses(self, found: Mapping[Key, Object]) -> None:
        ours = [item for item in found.values() if self._is_ours(item)]
        self.routes = {host: made for item in ours for host, made in routes(item).items()}
        for item in ours:
            if not is_told(item):
                now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
                namespace, name = _key(item)
                path = KINGRESSES.replace("/ingresses", f"/namespaces/{namespace}/ingresses/{name}")
                await self._api.patch_status(path, ready_status(item, self._internal_host, now))

    def _is_ours(self, item: Object) -> bool:
        metadata = item["metadata"]
        ingress_class = metadata.get("annotations", {}).get(CLASS_ANNOTATION)
        return ingress_class == self._class and "deletionTimestamp" not in metadata


class Ingress:
    """Answers requests from those whom the tables name. Made and used in one event loop."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        # A connection for each request: one that was kept may lead to a pod that is going.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=2),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def __aenter__(self) -> Ingress:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """The answer of the function that the request's host names."""
        host = request.host.partition(":")[0]
        fitting = (route for route in self._tables.routes.get(host, ()) if route.fits(request.path, request.headers))
        route = next(fitting, None)
        if route is None:
            return web.Response(status=404, text=f"no function here is called {host}\n")
        split = choose(route.splits)
        headers = request.headers.copy()
        for name in [name for name in headers if name.lower() in HOP_BY_HOP]:
            headers.popall(name, None)
        headers.update({**route.headers, **split.headers})
        headers["Host"] = route.host or request.host
        headers["X-Forwarded-For"] = request.remote or ""
        headers["X-Forwarded-Proto"] = "http"
        for _ in range(TRIES):
            for address in self._addresses(split):
                try:
                    return await self._forward(request, f"http://{address}", headers)
                except aiohttp.ClientConnectorError:
                    continue  # nothing was sent yet
                except asyncio.TimeoutError:
                    continue  # in connecting; there is no other limit
            await asyncio.sleep(AGAIN_AFTER_S)
        return web.Response(status=503, text=f"no endpoint of {'/'.join(split.service)} answers\n")

    def _addresses(self, split: Split) -> list[str]:
        service = self._tables.services.get(split.service)
        endpoints = self._tables.endpoints.get(split.service)
        found = addresses(service, endpoints, split.port) if service and endpoints else []
        random.shuffle(found)
        return found

    async def _forward(self, request: web.Request, base: str, headers: Any) -> web.StreamResponse:
        body = request.content if request.body_exists else None
        sent = self._session.request(
            request.method, base + request.raw_path, headers=headers, data=body, allow_redirects=False
        )
        try:
            async with sent as answer:
                return await _relay(request, answer)
        except aiohttp.ClientConnectorError:
            raise
        except aiohttp.ServerDisconnectedError:
            return web.Response(status=502, text="the function's pod ended before it answered\n")


async def _relay(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    relayed = web.StreamResponse(status=answer.status, reason=answer.reason)
    for name, value in answer.headers.items():
        if name.lower() not in HOP_BY_HOP:
            relayed.headers.add(name, value)
    await relayed.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await relayed.write(piece)
    except aiohttp.ClientPayloadError:
        if request.transport is not None:
            request.transport.abort()  # half an answer must not look whole
        raise
    await relayed.write_eof()
    return relayed


def application(ingress: Ingress) -> web.Application:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", ingress.serve)
    return app


async def main(kubeconfig: Path, address: str, internal_host: str, ingress_class: str) -> None:
    """Serves on port 80 of `address`; never returns."""
    tables = WatchedTables(Api(kubeconfig), internal_host, ingress_class)
    # A caller who has gone must be seen by the function too.
    runner = web.AppRunner(
        application(Ingress(tables)), handler_cancellation=True, access_log=None, auto_decompress=False
    )
    await runner.setup()
    await web.TCPSite(runner, address, 80, backlog=1024).start()
    print("serving", flush=True)
    await tables.watch()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:5]))
