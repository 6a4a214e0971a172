"""The testbed's ingress hands on what passes through it: pieces as they come, ends as they are, headers as told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from tests.testbed.ingress import Ingress, application, routes

HOST = "echo.ours.functions.test"
TOLD = {"Knative-Serving-Revision": "echo-00001"}


class Tables:
    """What the API server would have said: one function, at these ports."""

    def __init__(self, *ports: int) -> None:
        split = {"serviceName": "echo", "servicePort": 80, "percent": 100, "appendHeaders": TOLD}
        rule = {"hosts": [HOST], "http": {"paths": [{"splits": [split], "rewriteHost": "inside.test"}]}}
        self.routes = routes({"metadata": {"namespace": "ours"}, "spec": {"rules": [rule]}})
        self.services = {("ours", "echo"): {"spec": {"ports": [{"name": "http", "port": 80}]}}}
        subsets = [{"addresses": [{"ip": "127.0.0.1"}], "ports": [{"name": "http", "port": port}]} for port in ports]
        self.endpoints = {("ours", "echo"): {"subsets": subsets}}


@contextlib.asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[int]:
    """Its port on loopback."""
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def function(handler, *more_ports: int) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of an ingress before a function."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    async with (
        served(app) as port,
        Ingress(Tables(port, *more_ports)) as ingress,
        served(application(ingress)) as entry,
        aiohttp.ClientSession(f"http://127.0.0.1:{entry}", headers={"Host": HOST}) as client,
    ):
        yield client


def test_a_function_is_told_what_knative_wants_and_gets_the_request_as_it_was():
    async def handler(request: web.Request) -> web.Response:
        told = request.headers["Knative-Serving-Revision"], request.host, request.method, request.raw_path
        return web.json_response({"told": told, "body": (await request.read()).decode()}, status=201)

    async def scenario() -> None:
        async with function(handler) as client, client.put("/a%2Fb?q=1", data="body") as answer:
            assert answer.status == 201
            assert await answer.json() == {"told": ["echo-00001", "inside.test", "PUT", "/a%2Fb?q=1"], "body": "body"}

    asyncio.run(scenario())


def test_pieces_pass_both_ways_before_the_end():
    async def handler(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        async for piece in request.content.iter_any():
            await answer.write(piece.upper())
        return answer

    async def scenario() -> None:
        heard = asyncio.Event()

        async def pieces() -> AsyncIterator[bytes]:
            yield b"one"
            await heard.wait()  # the second is sent only when the first has come back
            yield b"two"

        async with function(handler) as client, client.post("/", data=pieces()) as answer:
            assert await answer.content.readany() == b"ONE"
            heard.set()
            assert await answer.read() == b"TWO"

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_function_learns_that_its_caller_has_gone():
    async def scenario() -> None:
        began, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(request: web.Request) -> web.Response:
            began.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
            raise AssertionError("unreachable")

        async with function(handler) as client:
            asking = asyncio.create_task(client.get("/").__aenter__())
            await began.wait()
            asking.cancel()
            await cancelled.wait()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_half_an_answer_does_not_look_whole():
    async def handler(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return answer

    async def scenario() -> None:
        async with function(handler) as client, client.get("/") as answer:
            with pytest.raises(aiohttp.ClientError):
                await answer.read()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_an_endpoint_that_is_gone_is_passed_over(free_port):
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=(await request.read()).decode())

    async def scenario() -> None:
        async with function(handler, free_port) as client:
            for _ in range(20):  # endpoints are asked in any order
                async with client.post("/", data=b"body") as answer:
                    assert await answer.text() == "body"

    asyncio.run(asyncio.wait_for(scenario(), 30))
