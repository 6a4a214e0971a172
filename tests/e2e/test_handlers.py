"""Handlers that behave badly, deployed to a real `gpufn up`: each is answered for, by name, and harms nobody else."""

import http.client
import json
import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.session import REPOSITORY, Session, wait_until_gone
from benchmarks.wakes import ZERO
from tests.fakes.host import session_of

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """One gateway for all tests here: what one function does must not reach the next."""
    folder = tmp_path_factory.mktemp("gateway")
    state = folder / "state"
    with Session(state, functions=REPOSITORY / "tests" / "functions", envs=folder / "envs") as session:
        yield session
    assert not wait_until_gone(state)


def start_record(session, name, number=1):
    """The record of a function's start by number: it is told a moment after the answer."""
    session.wait(lambda: len(session.starts(name)) >= number, f"start {number} of {name} is told", 30)
    return session.starts(name)[-number]


def restored(session, name, **options):
    """The answers of a first life, which takes the snapshot, and of a second one, restored from it."""
    session.deploy(name, ZERO)
    first = session.call(name, **options)
    session.wait_for_snapshot(name)
    session.to_zero(name)
    second = session.call(name, **options)
    assert [replica["rung"] for replica in session.replicas(name)] == ["restore"]
    return first, second


@pytest.mark.parametrize(
    ("name", "code", "why"),
    [
        ("load-raises", "handler-raised", "ValueError: the weights are not here at handler.py:5"),
        ("load-raises-systemexit", "handler-raised", "SystemExit: no model for you"),
        ("load-exits", "handler-exited", "ended with code 7"),
        ("load-hangs", "start-timeout", ""),
        ("import-raises", "handler-raised", "No module named 'a_package_that_is_not_installed'"),
    ],
)
def test_a_function_that_cannot_start_says_why_and_is_left_alone_for_a_while(session, name, code, why):
    session.deploy(name, ZERO)
    answer = session.call(name)
    assert answer.status == 503
    error = answer.json()["error"]
    assert error["code"] == code
    assert why in error["why"]
    assert int(answer.headers["Retry-After"]) >= 1
    record = start_record(session, name)
    assert record["error"]
    assert sum(phase["end_ns"] - phase["start_ns"] for phase in record["phases"]) <= record["total_ns"]


@pytest.mark.parametrize("name", ["config-unknown-key", "config-wrong-type"])
def test_a_configuration_that_cannot_be_used_is_named_with_its_key(session, name):
    with pytest.raises(RuntimeError) as refused:
        session.deploy(name, ZERO)
    assert {"config-unknown-key": "maximum", "config-wrong-type": "max"}[name] in str(refused.value)


def test_an_exception_in_a_request_is_a_500_and_the_next_is_answered_by_the_same_process(session):
    session.deploy("handle-raises", ZERO)
    assert session.call("handle-raises").body == b"fine"
    broken = session.request("POST", "/function/handle-raises?fail=1")
    assert broken.status == 500
    assert b"Traceback" not in broken.body
    assert session.call("handle-raises").body == b"fine"
    assert len(session.starts("handle-raises")) == 1


def test_a_process_that_exits_in_a_request_is_started_again(session):
    session.deploy("handle-exits", ZERO)
    first = session.call("handle-exits").body
    assert session.request("POST", "/function/handle-exits?fail=1").status in (502, 503)
    second = session.call("handle-exits")
    assert second.status == 200
    assert second.body != first


def test_an_answer_that_is_none_is_a_500(session):
    session.deploy("returns-nonsense", ZERO)
    assert session.call("returns-nonsense").status == 500


def test_a_stream_that_breaks_is_not_passed_off_as_whole(session):
    session.deploy("stream-breaks", ZERO)
    with pytest.raises(http.client.IncompleteRead):
        session.call("stream-breaks")


def test_what_a_function_prints_is_its_log_and_nothing_else(session):
    session.deploy("prints", ZERO)
    assert session.call("prints").body == b"model"
    log = session.cli("logs", "prints")
    for line in (
        "at import, on standard output",
        '{"event": "serving", "at_ns": 1}',
        "in load, on standard error",
        "in load, past Python's buffers",
        "in handle",
    ):
        assert line in log


def test_a_status_that_ends_no_answer_is_a_500(session):
    session.deploy("informational", ZERO)
    assert session.call("informational").status == 500


def test_a_stream_can_read_its_request(session):
    session.deploy("streams-query", ZERO)
    assert session.request("POST", "/function/streams-query?word=ab").body == b"ababab"


def test_descriptors_that_are_not_its_own_are_no_way_to_harm_the_entrypoint(session):
    session.deploy("writes-status", {**ZERO, "gpufn.dev/snapshot": "off"})
    assert session.call("writes-status").body == b"loaded"
    assert start_record(session, "writes-status")["rung"] == "load"


def test_a_process_without_a_descriptor_left_is_replaced(session):
    session.deploy("leaks-descriptors", ZERO)
    first = session.request("POST", "/function/leaks-descriptors?leak=1").body
    slow = threading.Thread(target=session.request, args=("POST", "/function/leaks-descriptors?seconds=3"))
    slow.start()  # it has the kept connection: the next request needs one of its own
    session.wait(lambda: session.call("leaks-descriptors").body not in (b"", first), "another process answers", 60)
    slow.join()


def test_a_pipe_in_its_folder_does_not_hold_a_function_up(tmp_path):
    folder = tmp_path / "functions" / "piped"
    folder.mkdir(parents=True)
    (folder / "handler.py").write_text("def load(device):\n    return 'm'\ndef handle(e, c):\n    return c.model\n")
    os.mkfifo(folder / "pipe")
    with Session(tmp_path / "state", functions=folder.parent, envs=tmp_path / "envs") as other:
        other.deploy("piped", ZERO)
        assert other.call("piped").body == b"m"


# The snapshot point -----------------------------------------------------------------------------


@pytest.mark.criu
@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("load-leaks-descriptors", {"file": "kept", "offset": 3, "open": 100}),
        ("starts-threads", {"running": True}),
    ],
)
def test_what_load_leaves_open_or_running_is_there_after_a_restore(session, name, answer):
    assert [one.json() for one in restored(session, name)] == [answer, answer]


@pytest.mark.criu
def test_a_child_of_load_is_restored_with_it_and_ends_with_the_replica(session):
    first, second = restored(session, "load-forks")
    assert first.status == second.status == 200
    session.to_zero("load-forks")
    assert session.replicas("load-forks") == []  # the module's end checks that no process is left


@pytest.mark.criu
def test_hooks_run_around_the_snapshot_and_not_in_a_plain_start(session):
    first, second = restored(session, "hooks")
    assert first.json() == ["load"]
    assert second.json() == ["load", "before_snapshot", "after_restore"]


@pytest.mark.criu
def test_a_hook_that_raises_costs_the_rung_not_the_request(session):
    session.deploy("hook-raises", ZERO)
    assert session.call("hook-raises").body == b"loaded"
    session.wait_for_snapshot("hook-raises")
    session.to_zero("hook-raises")
    assert session.call("hook-raises").body == b"loaded"
    record = start_record(session, "hook-raises", 2)
    assert record["rung"] == "load"
    (skipped,) = [one for one in record["skipped"] if one["rung"] == "restore"]
    assert "the database is gone" in skipped["reason"]


@pytest.mark.criu
@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("load-opens-socket", b"", "could not dump"),
        ("example-wrong", b"", "another answer than expected"),
        ("example-raises", b"other", "example"),
    ],
)
def test_what_cannot_be_kept_is_served_without_a_snapshot_and_says_why(session, name, body, reason):
    session.deploy(name, ZERO)
    assert session.call(name, body).status == 200
    with pytest.raises(RuntimeError, match=reason):
        session.wait_for_snapshot(name)
    session.to_zero(name)
    assert session.call(name, body).status == 200
    assert [replica["rung"] for replica in session.replicas(name)] == ["load"]
    assert not list((session.state / "snapshots").glob(f"*/{name}.*/[.p]*-process-*"))


@pytest.mark.criu
def test_no_generator_repeats_itself_in_replicas_of_one_snapshot(session):
    session.deploy("random-numbers", ZERO)
    session.call("random-numbers")
    session.wait_for_snapshot("random-numbers")
    drawn = []
    for _ in range(3):
        session.to_zero("random-numbers")
        drawn.append(session.call("random-numbers").json())
        assert [replica["rung"] for replica in session.replicas("random-numbers")] == ["restore"]
    for name in drawn[0]:
        assert len({repr(one[name]) for one in drawn}) == 3, name


# Clients ----------------------------------------------------------------------------------------


def test_a_body_above_the_limit_is_a_413_with_the_limit_in_it(session):
    session.deploy("counts", {**ZERO, "gpufn.dev/body": "1KiB"})
    answer = session.call("counts", b"x" * 1025)
    assert answer.status == 413
    assert session.call("counts", b"x" * 1024).json()["calls"] == 1


def test_slow_and_vanishing_clients_hold_no_thread(session):
    session.deploy("echo-slowly", {**ZERO, "gpufn.dev/in-flight": "1", "gpufn.dev/max": "1"}, image="returns-bytes")
    assert session.call("echo-slowly", b"whole").body == b"whole"
    half_sent = [socket.create_connection((session.host, session.port)) for _ in range(20)]
    for connection in half_sent:
        connection.sendall(b"POST /function/echo-slowly HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n")
    assert session.call("echo-slowly", b"others").body == b"others"
    for connection in half_sent[:10]:
        connection.close()
    for connection in half_sent[10:]:
        connection.sendall(b"\r\n0123456789")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.read() == b"0123456789"
        connection.close()


def test_a_client_that_goes_away_in_the_middle_leaves_a_function_that_answers(session):
    session.deploy("slow", {**ZERO, "gpufn.dev/in-flight": "1", "gpufn.dev/max": "1"})
    session.call("slow")
    for _ in range(5):
        with socket.create_connection((session.host, session.port)) as connection:
            connection.sendall(b"POST /function/slow?seconds=0.2 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # a reset, as a crash sends it
    assert session.call("slow").body == b"slept 0"
    assert len(session.starts("slow")) == 1


@pytest.mark.criu
def test_the_environment_arrives_after_the_snapshot_point_unless_it_is_named(session):
    body = {
        "service": "reads-environment",
        "image": "reads-environment:latest",
        "envVars": {"SEEN_BY_LOAD": "early", "TOKEN": "late"},
        "annotations": ZERO,
    }
    session.api("POST", "/system/functions", body)

    def seen(name):
        answer = session.request("POST", f"/function/reads-environment?name={name}").json()
        return answer["import"], answer["load"], answer["handle"]

    assert seen("TOKEN") == (None, None, "late")
    session.wait_for_snapshot("reads-environment")
    session.to_zero("reads-environment")
    assert seen("TOKEN") == (None, None, "late")
    assert seen("SEEN_BY_LOAD") == ("early", "early", "early")
    assert [replica["rung"] for replica in session.replicas("reads-environment")] == ["restore"]


# Phases -----------------------------------------------------------------------------------------


@pytest.mark.criu
def test_the_phases_of_every_start_add_up_to_its_wall_time(session):
    """Within 5 %: of a plain start, a restored one, and one thawed."""
    session.deploy("load-slow", {**ZERO, "gpufn.dev/park": "100ms"})
    session.call("load-slow")
    session.wait_for_snapshot("load-slow")
    session.to_zero("load-slow")
    session.call("load-slow")
    session.wait(lambda: session.replicas("load-slow")[0]["state"] == "parked", "parked", 30)
    session.call("load-slow")
    session.wait(lambda: len(session.starts("load-slow")) >= 3, "three starts are told", 30)
    records = session.starts("load-slow")[:3]
    assert [record["rung"] for record in records] == ["resume", "restore", "load"]
    for record in records:
        covered = sum(phase["end_ns"] - phase["start_ns"] for phase in record["phases"])
        assert 0.95 * record["total_ns"] <= covered <= 1.05 * record["total_ns"], json.dumps(record, indent=1)


def test_a_killed_model_process_is_replaced_by_its_entrypoint(session):
    before = model_processes(session)
    session.deploy("killed", {**ZERO, "gpufn.dev/snapshot": "off"}, image="counts")
    for _ in range(3):
        assert session.call("killed").json()["calls"] >= 1
    (victim,) = model_processes(session) - before
    (replica,) = session.replicas("killed")
    os.kill(victim, signal.SIGKILL)
    session.wait(lambda: model_processes(session) - before - {victim}, "another one is there", 30)
    assert session.call("killed").json()["calls"] == 1
    assert session.replicas("killed")[0]["replica"] == replica["replica"]


def model_processes(session):
    return {pid for pid in session_of(session.pid) if b"adapter.runtime.model" in command_of(pid)}


def command_of(pid):
    with suppress(OSError):  # ended meanwhile
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
