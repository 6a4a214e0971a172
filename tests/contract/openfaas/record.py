"""Records what faas-cli says and hears, for every step of the scenario, as `conversations/<number>-<step>.json`.

    FAAS_CLI=/path/to/faas-cli python -m tests.contract.openfaas.record
    FAAS_CLI=/path/to/faas-cli GATEWAY=/path/to/gateway python -m tests.contract.openfaas.record

A small proxy between the real faas-cli and a gateway over fake replicas keeps each request and answer. With GATEWAY, a
stock OpenFaaS gateway (it listens on 8080 and 8082) stands between the two, and what it says and hears of its provider is
kept, in `conversations/gateway`. Credentials are kept only as the fact that there were some.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from tests.contract.openfaas.scenario import (
    CREDENTIALS,
    GATEWAY_STEPS,
    STEPS,
    Step,
    faas_cli,
    fake_host,
    run_step,
    settled,
)
from tests.fakes.replicas import basic, serving

FOLDER = Path(__file__).parent / "conversations"
GATEWAY_FOLDER = FOLDER / "gateway"
GATEWAY_URL = "http://127.0.0.1:8080"
ASKED_FOR_METRICS = ("/system/namespaces", "/system/functions")
"""By a gateway itself, every few seconds."""
OF_THE_CONNECTION = ("Host", "Content-Length", "Transfer-Encoding")
KEPT_REQUEST_HEADERS = ("Accept", "Content-Type", "User-Agent", "X-Callback-Url", "X-Own")
KEPT_ANSWER_HEADERS = ("Content-Type", "WWW-Authenticate")


class Recorder:
    """The proxy's memory: the exchanges of the running step."""

    def __init__(self, url: str, client: aiohttp.ClientSession) -> None:
        self.exchanges: list[dict[str, object]] = []
        self.of_a_gateway = False
        self._url = url
        self._client = client

    async def handle(self, request: web.Request) -> web.Response:
        if request.path == "/api/v1/query":  # a gateway takes us for its Prometheus, too
            return web.json_response({"status": "success", "data": {"resultType": "vector", "result": []}})
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name not in OF_THE_CONNECTION}
        url = aiohttp.client.URL(self._url + request.raw_path, encoded=True)
        async with self._client.request(request.method, url, data=body, headers=headers) as answer:
            content = await answer.read()
        given = headers.get("Authorization")
        self._keep(
            request,
            {
                "request": {
                    "method": request.method,
                    "path": request.raw_path,
                    "headers": {
                        name: request.headers[name] for name in KEPT_REQUEST_HEADERS if name in request.headers
                    },
                    "credentials": "none" if given is None else "right" if given == basic(*CREDENTIALS) else "wrong",
                    "body": body.decode(),
                },
                "answer": {
                    "status": answer.status,
                    "headers": {name: answer.headers[name] for name in KEPT_ANSWER_HEADERS if name in answer.headers},
                    "body": content.decode(),
                },
            },
        )
        kept = {name: answer.headers[name] for name in KEPT_ANSWER_HEADERS if name in answer.headers}
        return web.Response(status=answer.status, body=content, headers=kept)

    def _keep(self, request: web.Request, exchange: dict[str, object]) -> None:
        if self.of_a_gateway:
            if "X-Forwarded-Host" not in request.headers and request.path in ASKED_FOR_METRICS:
                return
            if self.exchanges and self.exchanges[-1]["request"] == exchange["request"]:
                self.exchanges.pop()  # asked until the answer is the wanted one
        self.exchanges.append(exchange)


@asynccontextmanager
async def recording(url: str):
    async with aiohttp.ClientSession(auto_decompress=False) as client:
        recorder = Recorder(url, client)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", recorder.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        try:
            yield recorder, f"http://{host}:{port}"
        finally:
            await runner.cleanup()


@asynccontextmanager
async def gateway(binary: str, provider: str, folder: Path):
    """A stock one before a provider; its address."""
    for name, value in zip(("user", "password"), CREDENTIALS, strict=True):
        (folder / f"basic-auth-{name}").write_text(value)
    prometheus = aiohttp.client.URL(provider)
    settings = {
        "functions_provider_url": f"{provider}/",
        "faas_prometheus_host": str(prometheus.host),
        "faas_prometheus_port": str(prometheus.port),
        "basic_auth": "true",
        "secret_mount_path": str(folder),
        "function_namespace": "openfaas-fn",
        "scale_from_zero": "true",
    }
    process = await asyncio.create_subprocess_exec(binary, cwd=folder, env=settings, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with aiohttp.ClientSession() as client:
            while not await _answers(client):
                if process.returncode is not None:
                    sys.exit("the gateway does not start: do its ports, 8080 and 8082, belong to another?")
                await asyncio.sleep(0.1)
        yield GATEWAY_URL
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _answers(client: aiohttp.ClientSession) -> bool:
    try:
        async with client.get(f"{GATEWAY_URL}/healthz") as answer:
            return answer.ok
    except aiohttp.ClientError:
        return False


async def record(binary: str, steps: tuple[Step, ...], folder: Path, through: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    with tempfile.TemporaryDirectory() as name:
        state, home = Path(name) / "state", Path(name) / "home"
        state.mkdir(mode=0o700)
        home.mkdir()
        async with AsyncExitStack() as stack:
            up = await stack.enter_async_context(serving(state, fake_host(state), CREDENTIALS))
            recorder, url = await stack.enter_async_context(recording(up.url))
            if through:
                url = await stack.enter_async_context(gateway(through, url, home))
                recorder.exchanges, recorder.of_a_gateway = [], True
            for number, step in enumerate(steps, 1):
                code, output = await run_step(binary, step, url, home)
                missing = [words for words in step.says if words not in output]
                if code != step.code or missing:
                    sys.exit(f"faas-cli {' '.join(step.arguments)}: exit {code}, does not say {missing}\n{output}")
                data = {"command": ["faas-cli", *step.arguments], "exchanges": recorder.exchanges}
                path = folder / f"{number:02d}-{step.name}.json"
                path.write_text(json.dumps(data, indent=2) + "\n")
                recorder.exchanges = []
                await settled(up)


if __name__ == "__main__":
    found = faas_cli()
    if found is None:
        sys.exit("no faas-cli on the PATH; name it in FAAS_CLI")
    if stock := os.environ.get("GATEWAY"):
        asyncio.run(record(found, GATEWAY_STEPS, GATEWAY_FOLDER, stock))
    else:
        asyncio.run(record(found, STEPS, FOLDER))
