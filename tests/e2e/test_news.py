"""What `gpufn up` says while it runs: told by a real gateway over fake replicas."""

import logging
from pathlib import Path

import pytest

from adapter.cli import news
from adapter.cli.news import narrate, snapshot_news
from adapter.errors import ConfigError
from tests.fakes.replicas import FakeHost, run, serving, until

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.e2e


def test_a_functions_life_in_lines(state_dir, capsys):
    async def scenario():
        narrate()
        async with serving(state_dir) as up:
            await up.deploy(idle="50ms")
            await up.call()
            (replica,) = up.host.replicas
            replica.snapshot("published")
            await until(lambda: not up.host.replicas)
            async with up.client.delete(f"{up.url}/system/functions", json={"functionName": "echo"}) as response:
                assert response.status == 202

    run(scenario())
    said = capsys.readouterr().err.splitlines()
    for start, end in (
        ("  echo is deployed", "revision 1"),
        ("✓ echo is ready: ", "ms"),
        ("✓ echo is up: ", "ms load"),
        ("  echo: snapshot of 1B, taken in ", "100ms"),
        ("  echo-1 stops: ", "idle"),
        ("  echo is removed", ""),
    ):
        assert said, start
        line = said.pop(0)
        assert line.startswith(start), line
        assert line.endswith(end), line
    assert said == []


def test_what_goes_wrong_is_said(state_dir, capsys):
    async def scenario():
        narrate()
        async with serving(state_dir, FakeHost(state_dir, serves=False)) as up:
            await up.deploy(min="1")
            (await up.host.new_replica()).fail("ValueError: no weights")
            up.host.problem = ConfigError("The requirements cannot be installed.")
            await up.deploy("other")

    run(scenario())
    said = capsys.readouterr().err
    assert "✗ echo did not start: ValueError: no weights" in said
    assert "✗ other cannot be prepared: The requirements cannot be installed." in said


def test_limits_that_nobody_enforces_are_pointed_out(state_dir, capsys):
    async def scenario():
        narrate()
        async with serving(state_dir) as up:
            body = {"service": "echo", "image": "echo", "namespace": "openfaas-fn", "limits": {"memory": "1Mi"}}
            async with up.client.post(f"{up.url}/system/functions", json=body) as response:
                assert response.status == 202

    run(scenario())
    assert "! echo: limits of memory are not enforced here" in capsys.readouterr().err


def test_warnings_of_others_are_lines_too_and_their_chatter_is_not(capsys):
    narrate()
    logger = logging.getLogger("somebody")
    logger.warning("it rains", extra={"fields": {"since": "noon"}})
    logger.info("all is well")
    try:
        raise ValueError("wet")
    except ValueError:
        logger.exception("it broke")
    first, second, *traceback = capsys.readouterr().err.splitlines()
    assert (first, second) == ("! it rains  since=noon", "! it broke")
    assert traceback[-1] == "ValueError: wet"


def test_every_phrase_is_one_that_is_logged():
    """So that none is forgotten here when it changes there."""
    sources = "".join(path.read_text() for path in REPOSITORY.glob("adapter/*/*.py") if path.name != "news.py")
    assert [phrase for phrase in news._PHRASES if f'"{phrase}"' not in sources] == []


def test_packages_that_are_installed_are_waited_for_knowingly(capsys):
    narrate()
    fields = {"folder": "/functions/embed", "into": "/state/envs/1"}
    logging.getLogger("adapter.hosts.environment").info("building an environment", extra={"fields": fields})
    assert capsys.readouterr().err == "… preparing embed: installing its packages\n"


def test_a_reader_that_left_harms_nobody(monkeypatch):
    def gone(_):
        raise BrokenPipeError

    monkeypatch.setattr(news, "note", gone)
    narrate()
    logging.getLogger("somebody").warning("it rains")


def test_a_snapshot_that_was_not_taken_says_why_with_its_code():
    assert snapshot_news({"state": "skipped", "code": "criu-missing", "reason": "No CRIU."}) == (
        "no snapshot: No CRIU.  [criu-missing]"
    )
