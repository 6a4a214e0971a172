"""The REST API: OpenFaaS's provider routes, its gateway's routes, and ours under ``/gpufn/v1``.

Errors on ``/system/…`` are plain text, because faas-cli prints them; on functions' routes they are JSON.
Routes and codes: openfaas/faas-provider ``serve.go`` and the gateway's ``main.go``.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import platform
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime

from aiohttp import web

from adapter import __version__
from adapter.errors import AdapterError, ConfigError
from adapter.keys import CALL_ID_HEADER
from adapter.openfaas import wire
from adapter.openfaas.auth import BasicAuth
from adapter.openfaas.catalog import Entry
from adapter.openfaas.gateway import Gateway
from adapter.openfaas.logs import LogQuery, read_log
from adapter.openfaas.proxy import METHODS, error_response, read_invocation

logger = logging.getLogger(__name__)

_OPEN_PATHS = ("/function/", "/async-function/", "/healthz", "/metrics", "/system/namespace")
"""Without credentials, as OpenFaaS has it (`/system/namespaces` is open in its provider; changing one is not here)."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(gateway: Gateway, auth: BasicAuth) -> web.Application:
    """The aiohttp application."""
    app = web.Application(middlewares=[_errors, _authentication(auth)], client_max_size=2**40)
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
    route("*", "/function/{name}", api.invoke)
    route("*", "/function/{name}/{path:.*}", api.invoke)
    route("POST", "/async-function/{name}", api.invoke_later)
    route("POST", "/async-function/{name}/{path:.*}", api.invoke_later)
    route("GET", "/healthz", api.healthz)
    route("GET", "/metrics", api.metrics)
    route("GET", "/gpufn/v1/starts", api.starts)
    route("GET", "/gpufn/v1/replicas", api.replicas)
    route("GET", "/gpufn/v1/snapshots", api.snapshots)
    route("*", "/system/{rest:.*}", api.unsupported)
    return app


def _authentication(auth: BasicAuth) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_open = request.path.startswith(_OPEN_PATHS) and (
            not request.path.startswith("/system/") or request.method == "GET"
        )
        if is_open or auth.allows(request.headers.get("Authorization")):
            return await handler(request)
        return web.Response(
            status=401, text="invalid credentials", headers={"WWW-Authenticate": 'Basic realm="Restricted"'}
        )

    return check


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Our errors as text; what nobody foresaw as a 500 that says nothing of the inside."""
    try:
        return await handler(request)
    except AdapterError as error:
        if request.path.startswith(("/function/", "/async-function/")):
            return error_response(error, request.headers.get(CALL_ID_HEADER, ""))
        text = "\n".join(part for part in (error.message, error.why, error.hint) if part)
        return web.Response(status=error.http_status, text=text)
    except web.HTTPException:
        raise
    except (ConnectionResetError, asyncio.CancelledError):
        raise
    except Exception:
        logger.exception("a request failed", extra={"fields": {"method": request.method, "path": request.path}})
        return web.Response(status=500, text="internal error: see the gateway's log")


class Api:
    """Handlers, one a route."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    # Functions ----------------------------------------------------------------------------------

    async def list_functions(self, request: web.Request) -> web.Response:
        namespace = request.query.get("namespace") or wire.DEFAULT_NAMESPACE
        return web.json_response([self._status(entry) for entry in self._gateway.catalog.functions(namespace)])

    async def deploy_function(self, request: web.Request) -> web.Response:
        deployment = wire.FunctionDeployment.parse(await request.read())
        self._gateway.deploy(deployment)
        return web.Response(status=202)

    async def update_function(self, request: web.Request) -> web.Response:
        deployment = wire.FunctionDeployment.parse(await request.read())
        self._gateway.catalog.get(deployment.key)  # 404: faas-cli deploys anew
        self._gateway.deploy(deployment)
        return web.Response(status=202)

    async def delete_function(self, request: web.Request) -> web.Response:
        data = wire.parse_object(await request.read())
        namespace = wire.namespace_in({"namespace": data.get("namespace") or request.query.get("namespace")})
        self._gateway.remove(f"{wire.name_in(data, 'functionName')}.{namespace}")
        return web.Response(status=202)

    async def describe_function(self, request: web.Request) -> web.Response:
        return web.json_response(self._status(self._gateway.catalog.get(_key(request))))

    async def scale_function(self, request: web.Request) -> web.Response:
        data = wire.parse_object(await request.read())
        replicas = data.get("replicas", 0)
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 0:
            raise ConfigError("replicas is no whole number of zero or more.")
        self._gateway.fleet(_key(request, data.get("namespace"))).scale(replicas)
        return web.Response(status=202)

    def _status(self, entry: Entry) -> dict[str, object]:
        key = entry.deployment.key
        fleet = self._gateway.fleets.get(key)
        notes = {}
        if fleet is not None and fleet.preparing:
            notes["gpufn.dev/status"] = f"preparing: {fleet.preparing}"
        elif fleet is not None and fleet.problem is not None:
            notes["gpufn.dev/status"] = f"failed: {fleet.problem.message} {fleet.problem.why}".strip()
        return entry.deployment.status(
            replicas=fleet.desired if fleet else 0,
            available=fleet.available if fleet else 0,
            invocations=self._gateway.invocations(key),
            created_at=entry.created_at,
            notes=notes,
        )

    # Secrets and namespaces ---------------------------------------------------------------------

    async def secrets(self, request: web.Request) -> web.Response:
        catalog = self._gateway.catalog
        if request.method == "GET":
            namespace = request.query.get("namespace") or wire.DEFAULT_NAMESPACE
            return web.json_response([{"name": name, "namespace": namespace} for name in catalog.secrets(namespace)])
        data = wire.parse_object(await request.read())
        namespace, name = wire.namespace_in(data), wire.secret_name_in(data)
        if request.method == "DELETE":
            catalog.remove_secret(namespace, name)
        elif request.method in ("POST", "PUT"):
            catalog.namespace(namespace)
            catalog.put_secret(namespace, name, _secret_value(data), new=request.method == "POST")
        else:
            raise web.HTTPMethodNotAllowed(request.method, ["GET", "POST", "PUT", "DELETE"])
        return web.Response(status=202)

    async def namespaces(self, _request: web.Request) -> web.Response:
        return web.json_response(self._gateway.catalog.namespaces())

    async def namespace(self, request: web.Request) -> web.Response:
        catalog, name = self._gateway.catalog, wire.name_in(request.match_info, "name")
        if request.method == "GET":
            return web.json_response(catalog.namespace(name))
        if request.method == "DELETE":
            catalog.remove_namespace(name)
        elif request.method in ("POST", "PUT"):
            data = wire.parse_object(await request.read())
            facts = {key: data.get(key) or {} for key in ("annotations", "labels")}
            catalog.put_namespace(name, facts, new=request.method == "POST")
        else:
            raise web.HTTPMethodNotAllowed(request.method, ["GET", "POST", "PUT", "DELETE"])
        return web.Response(status=202)

    # Invocations --------------------------------------------------------------------------------

    async def invoke(self, request: web.Request) -> web.StreamResponse:
        if request.method not in METHODS:
            raise web.HTTPMethodNotAllowed(request.method, sorted(METHODS))
        return await self._gateway.proxy.serve(self._gateway.fleet(_key(request)), request, _function_path(request))

    async def invoke_later(self, request: web.Request) -> web.Response:
        fleet = self._gateway.fleet(_key(request))
        call_id = request.headers.get(CALL_ID_HEADER) or str(uuid.uuid4())
        limit = fleet.deployment.spec.body_limit_bytes
        invocation = await read_invocation(request, _function_path(request), call_id, limit)
        await self._gateway.queue.put(fleet.deployment.key, invocation)
        return web.Response(status=202, headers={CALL_ID_HEADER: call_id})

    # The gateway itself -------------------------------------------------------------------------

    async def info(self, _request: web.Request) -> web.Response:
        version = {"release": __version__, "sha": "", "commit_message": ""}
        provider = {"provider": "gpufn", "version": version, "orchestration": "process"}
        return web.json_response({"provider": provider, "version": version, "arch": platform.machine()})

    async def logs(self, request: web.Request) -> web.StreamResponse:
        query = _log_query(request)
        fleet = self._gateway.fleet(f"{query.name}.{query.namespace}")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        async for line in read_log(self._gateway.host.log_path(fleet.deployment), query):
            await response.write(line)
        await response.write_eof()
        return response

    async def healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="OK")

    async def metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._gateway.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def unsupported(self, request: web.Request) -> web.Response:
        return web.Response(status=501, text=f"{request.path} is not supported by gpufn.")

    # Ours ---------------------------------------------------------------------------------------

    async def starts(self, request: web.Request) -> web.Response:
        try:
            limit = min(1000, int(request.query.get("limit", "20")))
        except ValueError as exc:
            raise ConfigError("limit is no whole number.") from exc
        function = request.query.get("function")
        records = await asyncio.to_thread(lambda: self._gateway.ledger.starts(function=function, limit=limit))
        return web.json_response([record.to_json() for record in records])

    async def replicas(self, _request: web.Request) -> web.Response:
        rows = [
            {
                "function": fleet.deployment.name,
                "namespace": fleet.deployment.namespace,
                "replica": member.replica.id,
                "revision": member.replica.deployment.revision,
                "state": member.state.value,
                "in_flight": member.in_flight,
                "rung": member.rung,
                "building_snapshot": member.replica.building_snapshot,
            }
            for fleet in self._gateway.fleets.values()
            for member in fleet.members.values()
        ]
        return web.json_response(rows)

    async def snapshots(self, _request: web.Request) -> web.Response:
        return web.json_response(
            [{"function": key, **fleet.snapshot} for key, fleet in self._gateway.fleets.items() if fleet.snapshot]
        )


def _key(request: web.Request, namespace: object = None) -> str:
    """``name.namespace`` of a route's ``{name}``, which may have the namespace in it or in the query."""
    name, _, inside = request.match_info["name"].partition(".")
    return f"{name}.{inside or namespace or request.query.get('namespace') or wire.DEFAULT_NAMESPACE}"


def _function_path(request: web.Request) -> str:
    """What the function sees: everything after its name, as it was sent (not decoded)."""
    raw = request.raw_path.split("?", 1)[0]
    parts = raw.split("/", 3)
    return "/" + (parts[3] if len(parts) > 3 else "")


def _secret_value(data: dict[str, object]) -> bytes:
    raw = data.get("rawValue")
    if raw:
        try:
            return base64.b64decode(str(raw), validate=True)
        except binascii.Error as exc:
            raise ConfigError("rawValue is no base64.") from exc
    return str(data.get("value") or "").encode()


def _log_query(request: web.Request) -> LogQuery:
    query = request.query
    try:
        since = datetime.fromisoformat(query["since"].replace("Z", "+00:00")) if query.get("since") else None
        return LogQuery(
            name=query["name"],
            namespace=query.get("namespace") or wire.DEFAULT_NAMESPACE,
            instance=query.get("instance", ""),
            tail=max(0, int(query.get("tail") or 0)),
            since=since,
            follow=query.get("follow") in ("1", "true"),
        )
    except (KeyError, ValueError) as exc:
        raise web.HTTPUnprocessableEntity(text="name is required; tail is a number, since an RFC 3339 time") from exc
