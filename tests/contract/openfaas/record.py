"""Records what faas-cli says and hears, for every step of the scenario, as `conversations/<number>-<step>.json`.

    FAAS_CLI=/path/to/faas-cli python -m tests.contract.openfaas.record

A small proxy between the real faas-cli and a gateway over fake replicas keeps each request and answer.
Credentials are kept only as the fact that there were some.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from tests.contract.openfaas.scenario import CREDENTIALS, STEPS, faas_cli, fake_host, run_step, settled
from tests.fakes.replicas import basic, serving

FOLDER = Path(__file__).parent / "conversations"
KEPT_REQUEST_HEADERS = ("Accept", "Content-Type", "User-Agent", "X-Callback-Url", "X-Own")
KEPT_ANSWER_HEADERS = ("Content-Type", "WWW-Authenticate")


class Recorder:
    """The proxy's memory: the exchanges of the running step."""

    def __init__(self, url: str, client: aiohttp.ClientSession) -> None:
        self.exchanges: list[dict[str, object]] = []
        self._url = url
        self._client = client

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name != "Host"}
        url = aiohttp.client.URL(self._url + request.raw_path, encoded=True)
        async with self._client.request(request.method, url, data=body, headers=headers) as answer:
            content = await answer.read()
        given = headers.get("Authorization")
        self.exchanges.append(
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
            }
        )
        kept = {name: answer.headers[name] for name in KEPT_ANSWER_HEADERS if name in answer.headers}
        return web.Response(status=answer.status, body=content, headers=kept)


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


async def record(binary: str) -> None:
    for old in FOLDER.glob("*.json"):
        old.unlink()
    with tempfile.TemporaryDirectory() as name:
        state, home = Path(name) / "state", Path(name) / "home"
        state.mkdir(mode=0o700)
        home.mkdir()
        async with serving(state, fake_host(state), CREDENTIALS) as up, recording(up.url) as (recorder, url):
            for number, step in enumerate(STEPS, 1):
                code, output = await run_step(binary, step, url, home)
                if code != step.code:
                    sys.exit(f"faas-cli {' '.join(step.arguments)}: exit {code}\n{output}")
                data = {"command": ["faas-cli", *step.arguments], "exchanges": recorder.exchanges}
                path = FOLDER / f"{number:02d}-{step.name}.json"
                path.write_text(json.dumps(data, indent=2) + "\n")
                recorder.exchanges = []
                await settled(up)


if __name__ == "__main__":
    found = faas_cli()
    if found is None:
        sys.exit("no faas-cli on the PATH; name it in FAAS_CLI")
    asyncio.run(record(found))
