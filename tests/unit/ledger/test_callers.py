"""Whose a token is, by what the API server says of it."""

import asyncio

import pytest

from adapter.ledger import callers as callers_module
from adapter.ledger.callers import Caller, ReviewedCallers, caller_of


def reviewed(**changes):
    user = {
        "username": "system:serviceaccount:gpufn-agents:gpufn-agent",
        "extra": {"authentication.kubernetes.io/node-name": ["node-1"]},
    }
    status = {"authenticated": True, "audiences": ["gpufn-ledger"], "user": user}
    return {"status": {**status, **changes}}


def test_an_agent_is_known_by_its_account_and_its_node():
    caller = caller_of(reviewed())
    assert caller == Caller("gpufn-agents", "gpufn-agent", "node-1")
    assert caller.writes
    assert not caller.reads


@pytest.mark.parametrize(
    "review",
    [
        {},
        {"status": {"authenticated": False, "error": "expired"}},
        reviewed(authenticated=None),
        reviewed(audiences=["https://kubernetes.default.svc"]),
        reviewed(audiences=None),
        reviewed(user={"username": "alice"}),
        reviewed(user={"username": "system:serviceaccount:gpufn-agents"}),
        reviewed(user={"username": "x system:serviceaccount:gpufn-agents:gpufn-agent"}),
    ],
)
def test_what_is_no_service_accounts_token_for_the_ledger_is_nobodys(review):
    assert caller_of(review) is None


def test_an_agents_token_that_is_bound_to_no_node_writes_nothing():
    caller = caller_of(reviewed(user={"username": "system:serviceaccount:gpufn-agents:gpufn-agent"}))
    assert caller is not None
    assert not caller.writes


class _Api:
    def __init__(self):
        self.asked = 0

    async def create(self, path, body, **_):
        self.asked += 1
        assert body["spec"]["audiences"] == ["gpufn-ledger"]
        return reviewed(authenticated=body["spec"]["token"] == "good")


def test_a_token_is_asked_about_once_a_minute_good_or_not():
    async def run():
        api, now = _Api(), [0.0]
        callers = ReviewedCallers(api, lambda: now[0])
        for _ in range(3):
            assert await callers.of("good") is not None
            assert await callers.of("bad") is None
        assert api.asked == 2
        now[0] = 61.0
        assert await callers.of("good") is not None
        assert api.asked == 3

    asyncio.run(run())


def test_whoever_makes_many_tokens_up_drives_no_caller_out(monkeypatch):
    monkeypatch.setattr(callers_module, "_REMEMBERED", 3)

    async def run():
        api = _Api()
        callers = ReviewedCallers(api, lambda: 0.0)
        await callers.of("good")
        for number in range(10):
            await callers.of(f"made-up-{number}")
        asked = api.asked
        assert await callers.of("good") is not None
        assert (api.asked, len(callers._unknown)) == (asked, 3)

    asyncio.run(run())
