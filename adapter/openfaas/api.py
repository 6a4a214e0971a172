"""The REST API: OpenFaaS's provider routes, its gateway's routes, and ours under ``/gpufn/v1``.

Errors on ``/system/…`` are plain text, because faas-cli prints them; on functions' routes and ours they
are JSON. Routes and codes: openfaas/faas-provider ``serve.go`` and the gateway's ``main.go``.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import time

from aiohttp import web
from aiohttp.typedefs import Handler

from adapter import __version__
from adapter.errors import AdapterError, ConfigError, NotFound
from adapter.hosts import ReplicaState
from adapter.keys import CALL_ID_HEADER, ERROR_HEADER
from adapter.openfaas import wire
from adapter.openfaas.auth import authentication
from adapter.openfaas.catalog import Entry
from adapter.openfaas.fleet import Fleet
from adapter.openfaas.gateway import Gateway
from adapter.openfaas.invocation import call_id_of, read_invocation
from adapter.openfaas.logs import LogQuery
from adapter.openfaas.proxy import METHODS, error_response, error_status

logger = logging.getLogger(__name__)

_SYSTEM_BODY_BYTES = 4 * 2**20
"""Of what `/system/…` takes: a secret of a megabyte in base64, with room."""

_ALL_STARTS = 1000


def make_app(gateway: Gateway, credentials: tuple[str, str] | None) -> web.Application:
    """The aiohttp application; without `credentials` nobody is asked for any."""
    app = web.Application(middlewares=[_errors, authentication(credentials)], client_max_size=_SYSTEM_BODY_BYTES)
    api = Api(gateway)
    route = app.router.add_route
    route("GET", "/system/functions", api.list_functions)
    route("POST", "/system/functions", api.deploy_function)
    route("PUT", "/system/functions", api.update_function)
    route("DELETE", "/system/functions", api.delete_function)
    route("GET", "/system/function/{name}", api.describe_function)
    route("POST", "/system/scale-function/{name}", api.scale_function)
    route("GET", "/system/info", api.info)
    route("*", "/system/secrets", api.secrets)
    route("GET", "/system/logs", api.logs)
    route("GET", "/system/namespaces", api.namespaces)
    route("*", "/system/namespace/{name}", api.namespace)
    route("*", "/system/namespace/", api.namespace)
    route("*", "/function/{name}", api.invoke)
    route("*", "/function/{name}/{path:.*}", api.invoke)
    route("POST", "/async-function/{name}", api.invoke_later)
    route("POST", "/async-function/{name}/{path:.*}", api.invoke_later)
    app.router.add_get("/healthz", api.healthz)  # and HEAD
    route("GET", "/metrics", api.metrics)
    route("GET", "/gpufn/v1/starts", api.starts)
    route("GET", "/gpufn/v1/replicas", api.replicas)
    route("GET", "/gpufn/v1/snapshots", api.snapshots)
    route("GET", "/gpufn/v1/keep-alives", api.keep_alives)
    route("GET", "/gpufn/v1/nodes", api.nodes)
    route("*", "/system/{rest:.*}", api.unsupported)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Our errors in the form of their route; what nobody foresaw as a 500 that says nothing of the inside."""
    try:
        return await handler(request)
    except AdapterError as error:
        return _error_answer(request, error)
    except (web.HTTPException, ConnectionResetError, asyncio.CancelledError):
        raise
    except Exception:
        logger.exception("a request failed", extra={"fields": {"method": request.method, "path": request.path}})
        return _error_answer(request, AdapterError("Internal error.", hint="See the gateway's log.", code="internal"))


def _error_answer(request: web.Request, error: AdapterError) -> web.Response:
    if not request.path.startswith("/system/"):
        return error_response(error, call_id_of(request))
    text = "\n".join(part for part in (error.message, error.why, error.hint) if part)
    return web.Response(status=error_status(error), text=text, headers={ERROR_HEADER: error.code})


class Api:
    """Handlers, one a route."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    # Functions ----------------------------------------------------------------------------------

    async def list_functions(self, request: web.Request) -> web.Response:
        namespace = request.query.get("namespace") or wire.DEFAULT_NAMESPACE
        self._gateway.catalog.namespace(namespace)
        return web.json_response([self._status(entry) for entry in self._gateway.catalog.functions(namespace)])

    async def deploy_function(self, request: web.Request) -> web.Response:
        wanted = wire.FunctionDeployment.parse(await request.read())
        await self._gateway.deploy(wanted)
        return web.Response(status=202)

    async def update_function(self, request: web.Request) -> web.Response:
        wanted = wire.FunctionDeployment.parse(await request.read())
        self._gateway.catalog.get(wanted.key)  # 404: faas-cli deploys anew
        await self._gateway.deploy(wanted)
        return web.Response(status=202)

    async def delete_function(self, request: web.Request) -> web.Response:
        data = wire.parse_object(await request.read())
        namespace = wire.namespace_in({"namespace": data.get("namespace") or request.query.get("namespace")})
        await self._gateway.remove(f"{wire.name_in(data, 'functionName')}.{namespace}")
        return web.Response(status=202)

    async def describe_function(self, request: web.Request) -> web.Response:
        return web.json_response(self._status(self._gateway.catalog.get(_key(request))))

    async def scale_function(self, request: web.Request) -> web.Response:
        data = wire.parse_object(await request.read())
        replicas = data.get("replicas", 0)
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 0:
            raise ConfigError("replicas is no whole number of zero or more.", code="bad-value")
        self._gateway.fleet(_key(request, data.get("namespace"))).scale(replicas)
        return web.Response(status=202)

    def _status(self, entry: Entry) -> dict[str, object]:
        key = entry.deployment.key
        fleet = self._gateway.fleet(key)
        return entry.deployment.status(
            replicas=fleet.desired,
            available=fleet.available,
            invocations=self._gateway.metrics.answered(key),
            created_at=entry.created_at,
            note=self._note(entry, fleet),
        )

    def _note(self, entry: Entry, fleet: Fleet) -> str:
        """What people should know of it, the most pressing alone."""
        hindrance = self._gateway.host.hindrance(entry.deployment.key)
        if fleet.status or hindrance:
            return fleet.status or f"waiting: {hindrance}"
        image_note = entry.image.note if entry.image is not None else ""
        notes = (fleet.budget.text(time.time_ns()), self._gateway.unkept(entry.deployment), image_note)
        return "; ".join(f"note: {note}" for note in notes if note)

    # Secrets and namespaces ---------------------------------------------------------------------

    async def secrets(self, request: web.Request) -> web.Response:
        catalog = self._gateway.catalog
        if request.method == "GET":
            namespace = request.query.get("namespace") or wire.DEFAULT_NAMESPACE
            catalog.namespace(namespace)  # it names a folder: only one that is known is looked into
            return web.json_response(
                [{"name": name, "namespace": namespace} for name in await catalog.secrets(namespace)]
            )
        _allow(request, "GET", "POST", "PUT", "DELETE")
        data = wire.parse_object(await request.read())
        namespace, name = wire.namespace_in(data), wire.secret_name_in(data)
        catalog.namespace(namespace)
        if request.method == "DELETE":
            await catalog.remove_secret(namespace, name)
        else:
            await catalog.put_secret(namespace, name, wire.secret_value_in(data), new=request.method == "POST")
        return web.Response(status=202)

    async def namespaces(self, _request: web.Request) -> web.Response:
        return web.json_response(self._gateway.catalog.namespaces())

    async def namespace(self, request: web.Request) -> web.Response:
        catalog = self._gateway.catalog
        _allow(request, "GET", "POST", "PUT", "DELETE")
        data = wire.parse_object(await request.read()) if request.method in ("POST", "PUT") else {}
        name = wire.name_in({"name": request.match_info.get("name") or data.get("name")}, "name")
        if request.method == "GET":
            return web.json_response(catalog.namespace(name))
        if request.method == "DELETE":
            await catalog.remove_namespace(name)
        else:
            facts = {key: wire.texts_in(data, key) for key in ("annotations", "labels")}
            await catalog.put_namespace(name, facts, new=request.method == "POST")
        return web.Response(status=202)

    # Invocations --------------------------------------------------------------------------------

    async def invoke(self, request: web.Request) -> web.StreamResponse:
        _allow(request, *METHODS)
        return await self._gateway.proxy.serve(self._gateway.fleet(_key(request)), request, _function_path(request))

    async def invoke_later(self, request: web.Request) -> web.Response:
        fleet = self._gateway.fleet(_key(request))
        call_id = call_id_of(request)
        limit = fleet.deployment.spec.body_limit_bytes
        invocation = await (await read_invocation(request, _function_path(request), call_id, limit)).whole()
        self._gateway.check_open()
        await self._gateway.queue.put(fleet.deployment.key, invocation)
        return web.Response(status=202, headers={CALL_ID_HEADER: call_id})

    # The gateway itself -------------------------------------------------------------------------

    async def info(self, _request: web.Request) -> web.Response:
        orchestration = self._gateway.host.traits.orchestration
        version = {"release": __version__, "sha": "", "commit_message": ""}
        provider = {"provider": "gpufn", "version": version, "orchestration": orchestration}
        info = {"provider": provider, "version": version, "arch": platform.machine()}
        # A stock gateway in front of us expects a provider's form, which has this in another place. The name it cannot
        # find: where a provider has a text, faas-cli, which asks us directly too, must find an object.
        return web.json_response({**info, "orchestration": orchestration})

    async def logs(self, request: web.Request) -> web.StreamResponse:
        try:
            query = LogQuery.parse(request.query)
        except ValueError as exc:
            return web.Response(status=422, text=str(exc))
        fleet = self._gateway.fleet(f"{query.name}.{query.namespace}")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        async for line in self._gateway.logs(fleet.deployment, query, self._gateway.stopping):
            await response.write(line)
        await response.write_eof()
        return response

    async def healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="OK")

    async def metrics(self, _request: web.Request) -> web.Response:
        body = self._gateway.metrics.text(self._gateway.fleets.values(), self._gateway.gpus)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def unsupported(self, request: web.Request) -> web.Response:
        return web.Response(status=501, text=f"{request.method} {request.path} is not supported by gpufn.")

    # Ours ---------------------------------------------------------------------------------------

    async def starts(self, request: web.Request) -> web.Response:
        limit = request.query.get("limit", "20")
        if not limit.isdecimal():
            raise ConfigError(f"limit {limit!r} is no whole number.", code="bad-value")
        function, namespace = request.query.get("function"), request.query.get("namespace")
        records = await self._gateway.starts(function, namespace, min(_ALL_STARTS, int(limit)))
        return web.json_response([record.to_json() for record in records])

    async def replicas(self, _request: web.Request) -> web.Response:
        rows = [
            {
                "function": fleet.deployment.name,
                "namespace": fleet.deployment.namespace,
                "replica": member.replica.id,
                "revision": member.replica.deployment.revision,
                "state": (ReplicaState.STOPPING if member.outdated else member.state).value,
                "in_flight": member.in_flight,
                "rung": member.rung,
                "devices": list(member.grant.uuids) if member.grant else [],
                "building_snapshot": member.replica.building_snapshot,
            }
            for fleet in self._gateway.fleets.values()
            for member in fleet.members.values()
        ]
        return web.json_response(rows)

    async def snapshots(self, _request: web.Request) -> web.Response:
        fleets = self._gateway.fleets.items()
        return web.json_response([{"function": key, **fleet.snapshot} for key, fleet in fleets if fleet.snapshot])

    async def keep_alives(self, _request: web.Request) -> web.Response:
        """How long each function is kept, and why."""
        fleets = self._gateway.fleets.items()
        return web.json_response([{"function": key, **fleet.keep_alive.to_json()} for key, fleet in fleets])

    async def nodes(self, _request: web.Request) -> web.Response:
        """One node: the machine of this gateway."""
        if not self._gateway.host.traits.grants_gpus:
            raise NotFound(
                "This gateway has no nodes of its own.",
                why="Its replicas are pods, and a scheduler gives them their GPUs.",
                hint="Ask the cluster: gpufn nodes, or kubectl get gpunodes",
                code="nodes-elsewhere",
            )
        gpus = self._gateway.gpus
        node = {
            "node": platform.node(),
            "driver": gpus.inventory.driver,
            "why_not": gpus.inventory.why_not,
            "devices": gpus.rows(),
            "waiting": gpus.waiting(),
        }
        return web.json_response([node])


def _allow(request: web.Request, *methods: str) -> None:
    if request.method not in methods:
        raise web.HTTPMethodNotAllowed(request.method, sorted(methods))


def _key(request: web.Request, namespace: object = None) -> str:
    """``name.namespace`` of a route's ``{name}``, which may have the namespace in it or in the query."""
    name, _, inside = request.match_info["name"].partition(".")
    return f"{name}.{inside or namespace or request.query.get('namespace') or wire.DEFAULT_NAMESPACE}"


def _function_path(request: web.Request) -> str:
    """What the function sees: everything after its name, as it was sent (not decoded)."""
    path = request.raw_path.split("?", 1)[0]
    if not path.startswith("/"):  # sent as to a proxy: with scheme and host
        path = "/" + path.split("/", 3)[3]
    parts = path.split("/", 3)
    return "/" + (parts[3] if len(parts) > 3 else "")
