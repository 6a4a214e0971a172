"""Recorded conversations of faas-cli, and of a stock gateway between it and us, said again: we must still answer as we did.

See `record.py`.
"""

import json
import re
from pathlib import Path

import aiohttp
import pytest

from tests.contract.openfaas.scenario import CREDENTIALS, GATEWAY_STEPS, STEPS, fake_host, settled
from tests.fakes.replicas import basic, run, serving

CONVERSATIONS = sorted((Path(__file__).parent / "conversations").glob("*.json"))
OF_A_GATEWAY = sorted((Path(__file__).parent / "conversations" / "gateway").glob("*.json"))
AUTHORIZATIONS: dict[str, dict[str, str]] = {
    "none": {},
    "right": {"Authorization": basic(*CREDENTIALS)},
    "wrong": {"Authorization": basic(CREDENTIALS[0], "wrong")},
}
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def comparable(answer: dict, body: str) -> tuple:
    """An answer without what differs from run to run: when a function was created."""
    kind = answer["headers"].get("Content-Type", "")
    content: object = _TIME.sub("TIME", body)
    if kind.startswith("application/json"):
        content = json.loads(str(content))
    return (answer["status"], kind, content)


async def say(client: aiohttp.ClientSession, url: str, request: dict) -> tuple:
    target = aiohttp.client.URL(url + request["path"], encoded=True)
    async with client.request(
        request["method"],
        target,
        data=request["body"].encode(),
        headers=request["headers"] | AUTHORIZATIONS[request["credentials"]],
    ) as answer:
        text = await answer.text()
        return comparable({"status": answer.status, "headers": answer.headers}, text)


async def said_again(state_dir, path: Path, conversations: list[Path]) -> None:
    """Everything up to and with `path`; what came before only makes the state that it needs."""
    async with serving(state_dir, fake_host(state_dir), CREDENTIALS) as up, aiohttp.ClientSession() as client:
        for earlier in conversations[: conversations.index(path) + 1]:
            for exchange in json.loads(earlier.read_text())["exchanges"]:
                got = await say(client, up.url, exchange["request"])
                if earlier == path:
                    assert got == comparable(exchange["answer"], exchange["answer"]["body"])
                await settled(up)


@pytest.mark.parametrize("path", CONVERSATIONS, ids=lambda path: path.stem)
def test_conversation(state_dir, path):
    run(said_again(state_dir, path, CONVERSATIONS))


@pytest.mark.parametrize("path", OF_A_GATEWAY, ids=lambda path: path.stem)
def test_conversation_of_a_stock_gateway(state_dir, path):
    run(said_again(state_dir, path, OF_A_GATEWAY))


def test_every_step_of_the_scenario_is_recorded():
    for conversations, steps in ((CONVERSATIONS, STEPS), (OF_A_GATEWAY, GATEWAY_STEPS)):
        assert [path.stem.partition("-")[2] for path in conversations] == [step.name for step in steps]


def test_no_credentials_are_recorded():
    everything = "".join(path.read_text() for path in CONVERSATIONS + OF_A_GATEWAY)
    assert "Authorization" not in everything
    assert CREDENTIALS[1] not in everything
