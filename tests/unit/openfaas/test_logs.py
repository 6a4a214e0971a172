import asyncio
import json
import os
from datetime import datetime, timezone

import pytest

from adapter.openfaas.logs import LogQuery, parse_time, read_log
from tests.fakes.replicas import run, until

TIMES = [f"2026-01-02T03:04:0{n}+00:00" for n in range(5)]


def line(n: int, instance: str = "fn-1") -> str:
    return json.dumps({"timestamp": TIMES[n], "instance": instance, "text": f"line {n}"}) + "\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "fn.jsonl"
    path.with_name("fn.jsonl.1").write_text(line(0) + line(1, "fn-2"))
    path.write_text(line(2) + '{"torn\n' + line(3, "fn-2") + '{"timestamp": "2026')
    return path


def texts(path, **query):
    async def read():
        lines = read_log(path, LogQuery.parse({"name": "fn", **query}), asyncio.Event())
        return [json.loads(found)["text"] async for found in lines]

    return asyncio.run(read())


def test_past_lines(path):
    assert texts(path) == ["line 0", "line 1", "line 2", "line 3"]
    assert texts(path, tail="2") == ["line 2", "line 3"]
    assert texts(path, tail="-1") == texts(path)
    assert texts(path, instance="fn-2") == ["line 1", "line 3"]
    assert texts(path, since="2026-01-02T03:04:02Z") == ["line 2", "line 3"]
    assert texts(path.with_name("absent")) == []


def test_lines_have_openfaas_s_keys(path):
    async def first():
        return json.loads(await anext(read_log(path, LogQuery("fn", tail=1), asyncio.Event())))

    assert asyncio.run(first()) == {
        "name": "fn", "namespace": "openfaas-fn", "instance": "fn-2", "timestamp": TIMES[3], "text": "line 3"
    }  # fmt: skip


def test_following_goes_on_through_a_rotation_until_the_gateway_stops(tmp_path):
    async def scenario():
        path, stopping, got = tmp_path / "fn.jsonl", asyncio.Event(), []
        path.write_text(line(0))

        async def follow():
            async for found in read_log(path, LogQuery("fn", follow=True), stopping):
                got.append(json.loads(found)["text"])  # noqa: PERF401  # each when it is here

        task = asyncio.create_task(follow())
        await until(lambda: len(got) == 1)
        with path.open("a") as file:
            file.write(line(1) + line(2)[:10])
        await until(lambda: len(got) == 2)
        with path.open("a") as file:
            file.write(line(2)[10:])
        os.replace(path, path.with_name("fn.jsonl.1"))  # before it was read
        path.write_text(line(3))
        await until(lambda: len(got) == 4)
        stopping.set()
        await task
        assert got == [f"line {n}" for n in range(4)]

    run(scenario())


@pytest.mark.parametrize(
    ("text", "microsecond"),
    [
        ("2026-01-02T03:04:05Z", 0),
        ("2026-01-02T03:04:05", 0),
        ("2026-01-02T04:04:05+01:00", 0),
        ("2026-01-02T03:04:05.5Z", 500_000),
        ("2026-01-02T03:04:05.123456789Z", 123_456),
    ],
)
def test_times(text, microsecond):
    assert parse_time(text) == datetime(2026, 1, 2, 3, 4, 5, microsecond, timezone.utc)


@pytest.mark.parametrize("query", [{}, {"name": ""}, {"name": "f", "tail": "x"}, {"name": "f", "since": "yesterday"}])
def test_wrong_questions(query):
    with pytest.raises(ValueError):
        LogQuery.parse(query)


def test_a_name_may_have_its_namespace():
    assert LogQuery.parse({"name": "fn.other"}).namespace == "other"
