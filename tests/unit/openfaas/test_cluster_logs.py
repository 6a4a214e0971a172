"""A function's log on a cluster, of pods whose log is a list of lines."""

import asyncio
import json
from datetime import datetime, timezone

import pytest

from adapter.hosts import Deployment
from adapter.hosts.kubernetes_status import Pod
from adapter.openfaas.cluster_logs import pod_logs
from adapter.openfaas.logs import LogQuery
from adapter.spec import parse_spec

FN = Deployment("fn", "ns", "1", "fn", parse_spec({}, {}))
LIMIT_S = 20.0


def line(second, text):
    return f"2026-01-01T00:00:{second:02}.5Z {text}".encode()


class FakeApi:
    """Who follows a log is told "new" at the end of it, and then no more."""

    def __init__(self, **logs):
        self.logs = {f"/api/v1/namespaces/ns/pods/{name}/log": lines for name, lines in logs.items()}
        self.streams = 0

    async def lines(self, path, *, params, silence_s):
        self.streams += 1
        for each in self.logs[path]:
            if each[:19] >= params.get("sinceTime", "").encode()[:19]:
                yield each
        if "follow" in params:
            yield line(50, f"new of {path.split('/')[-2]}")
            await asyncio.Event().wait()


def told(api, count, **query):
    """The texts of the first `count` lines that come."""
    pods = [Pod(path.split("/")[-2], "ns", "u", "fn", "1", "o") for path in api.logs]
    read = pod_logs(api, lambda _: pods)

    async def scenario():
        found = []
        lines = read(FN, LogQuery("fn", "ns", **query), asyncio.Event())
        async for entry in lines:
            found.append(json.loads(entry)["text"])
            if len(found) == count:
                break
        await lines.aclose()
        return found

    return asyncio.run(asyncio.wait_for(scenario(), LIMIT_S))


@pytest.fixture
def api():
    return FakeApi(early=[line(1, "a"), line(2, "b")], late=[line(3, "c"), line(4, "d")], silent=[])


def test_what_was_printed_is_told_in_order_of_time(api):
    assert told(api, 9) == ["a", "b", "c", "d"]
    assert told(api, 9, tail=3) == ["b", "c", "d"]
    assert told(api, 9, instance="early") == ["a", "b"]


def test_who_follows_is_told_what_comes_and_nothing_of_what_was_left_out(api):
    first, *rest = told(api, 4, tail=1, follow=True)
    assert first == "d"
    assert sorted(rest) == ["new of early", "new of late", "new of silent"]


def test_who_follows_since_a_time_is_told_nothing_older(api):
    first, *rest = told(api, 4, since=datetime(2026, 1, 1, 0, 0, 4, tzinfo=timezone.utc), follow=True)
    assert first == "d"
    assert sorted(rest) == ["new of early", "new of late", "new of silent"]
