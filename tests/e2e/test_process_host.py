"""The process host over real processes: with the real entrypoint, and with one that behaves badly."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapter.errors import Conflict, HandlerError, NotFound, Unavailable
from adapter.hosts import ReplicaState, followed, process, shell
from adapter.hosts.shell import Isolation
from adapter.keys import SECRETS_PATH
from adapter.records import EventName
from tests.fakes.host import Listener, Watched, ask, deployment, fake_shim, running, session_of, write_function
from tests.fakes.replicas import until

pytestmark = pytest.mark.e2e

ECHO = "def handle(event, context):\n    return event.body\n"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def functions(tmp_path):
    write_function(tmp_path / "functions", "fn", ECHO)
    return tmp_path / "functions"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Hosts start the fake entrypoint; see `tests/fakes/entrypoint.py`."""
    shim = fake_shim(tmp_path / "shim")
    monkeypatch.setattr(process, "_link_shim", lambda _: shim)


@pytest.fixture(params=["real", "fake"])
def entrypoint(request):
    """Both keep the contract."""
    if request.param == "fake":
        request.getfixturevalue("fake")
    return request.param


@pytest.fixture(params=["namespaces", "none"])
def isolation(request, monkeypatch):
    if request.param == "none":
        monkeypatch.setattr(Isolation, "find", lambda: Isolation(why_not="a test"))
    elif not Isolation.find().wrapper:
        pytest.skip("no process-id namespaces here")
    return request.param


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 100))


async def started(host, listener, **options):
    wanted = deployment(**options)
    await host.prepare(wanted)
    return await host.start(wanted, listener)


async def parked(replica, listener):
    """Ask until it is: a replica with a request in flight does nothing, and that is its right."""

    async def ask_again():
        while True:
            replica.park()
            await asyncio.sleep(0.1)

    asking = asyncio.ensure_future(ask_again())
    await listener.heard(EventName.PARKED)
    asking.cancel()


def open_descriptors():
    return sorted(os.listdir("/proc/self/fd"))


# The contract -------------------------------------------------------------------------------------


def test_a_replica_serves_parks_wakes_and_stops(tmp_path, functions, entrypoint, isolation):
    async def scenario():
        listener = Listener()
        async with running(tmp_path / "s", functions) as host:
            replica = await started(host, listener)
            assert replica.state is ReplicaState.STARTING
            assert await ask(replica, b"held until it serves")
            await listener.heard(EventName.SERVING)
            assert replica.state is ReplicaState.SERVING
            await parked(replica, listener)
            assert replica.state is ReplicaState.PARKED
            assert await ask(replica, b"wakes it")
            processes = Watched(session_of(replica.pid))
            await replica.stop(20)
            assert replica.state is ReplicaState.GONE
            assert processes.all_end(5)
            stopped = await listener.heard(EventName.STOPPED)
            assert stopped.fields == {"exit_code": 0, "reason": "drained"}
            assert listener.names[-1] is EventName.STOPPED
            assert listener.names.count(EventName.STOPPED) == 1

    run(scenario())
    assert list((tmp_path / "s" / "replicas").iterdir()) == []


def test_a_replica_gets_its_gpus_and_wakes_on_those_it_is_told(tmp_path, functions, fake):
    async def scenario():
        listener = Listener()
        async with running(tmp_path / "s", functions) as host:
            wanted = deployment(annotations={"gpufn.dev/gpu": "2"})
            await host.prepare(wanted)
            replica = await host.start(wanted, listener, ("GPU-1", "GPU-2"))
            shown = json.loads(await ask(replica))
            assert shown["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"
            assert (shown["GPUFN_DEVICE"], shown["GPUFN_RESUME"]) == ("cuda:0", "asked")
            await parked(replica, listener)
            replica.resume(("GPU-3", "GPU-2"))
            woken = await listener.heard(EventName.SERVING, 2)
            assert woken.fields == {"rung": "resume", "devices": ["GPU-3", "GPU-2"]}
            assert replica.state is ReplicaState.SERVING

    run(scenario())


@pytest.mark.parametrize("victim", ["wrapper", "entrypoint"])
def test_a_killed_replica_ends_whole_and_says_so_once(tmp_path, functions, entrypoint, isolation, victim):
    async def scenario():
        listener = Listener()
        async with running(tmp_path / "s", functions) as host:
            replica = await started(host, listener)
            await listener.heard(EventName.SERVING)
            processes = session_of(replica.pid)
            watched = Watched(processes)
            inner = processes[1] if isolation == "namespaces" else processes[0]
            os.kill(replica.pid if victim == "wrapper" else inner, signal.SIGKILL)
            stopped = await listener.heard(EventName.STOPPED)
            # `unshare` cannot die of its child's SIGKILL: it ends with code 1 then.
            assert stopped.fields["reason"] in ("killed by SIGKILL", "ended with code 1")
            assert stopped.at_ns > listener.events[0].at_ns
            assert watched.all_end(5)
            await replica.stop(1)
            assert listener.names.count(EventName.STOPPED) == 1

    run(scenario())
    assert list((tmp_path / "s" / "replicas").iterdir()) == []


def test_no_descriptor_is_left_or_leaks_into_another_replica(tmp_path, functions, entrypoint):
    async def scenario():
        before = open_descriptors()
        async with running(tmp_path / "s", functions) as host:
            listeners = [Listener() for _ in range(3)]
            replicas = [await started(host, listener) for listener in listeners]
            for listener in listeners:
                await listener.heard(EventName.SERVING)
            seen = []
            for replica in replicas:
                mine = set()
                for pid in session_of(replica.pid):
                    mine |= shell._open_files(pid)
                seen.append({target for target in mine if target.startswith(("socket:", "pipe:"))})
            assert not seen[0] & seen[1]
            assert not seen[1] & seen[2]
            assert not seen[0] & seen[2]
            replicas[0].kill()
            await replicas[1].stop(20)
            await listeners[0].heard(EventName.STOPPED)
        assert open_descriptors() == before

    async def whole():
        await asyncio.to_thread(int)  # the loop's own threads and descriptors are there
        await scenario()

    run(whole())


def test_secrets_and_variables_reach_a_function_and_nothing_of_them_stays(tmp_path, functions, isolation):
    write_function(
        functions,
        "reader",
        "import os\n"
        "def handle(event, context):\n"
        "    try:\n"
        f"        shown = open('{SECRETS_PATH}/key').read()\n"
        "    except OSError:\n"
        "        shown = None\n"
        "    return {'shown': shown, 'told': context.secret('key'), 'who': os.environ.get('WHO'),\n"
        "            'home': sorted(name for name in os.environ if name.startswith('GPUFN_'))}\n",
    )
    secret = tmp_path / "s" / "secrets" / "openfaas-fn" / "key"
    secret.parent.mkdir(parents=True)
    secret.write_text("hunter2")

    async def scenario():
        async with running(tmp_path / "s", functions) as host:
            shows = host._isolation.shows_secrets
            replica = await started(host, Listener(), name="reader", secrets=("key",), WHO="me")
            said = json.loads(await ask(replica))
            assert said == {
                "shown": "hunter2" if shows else None,
                "told": "hunter2",
                "who": "me",
                "home": ["GPUFN_ENGINE_CACHE"],
            }
            assert b"hunter2" not in Path(f"/proc/{replica.pid}/cmdline").read_bytes()

    run(scenario())
    assert not os.path.exists(f"{SECRETS_PATH}/key")
    assert list((tmp_path / "s" / "replicas").iterdir()) == []


# What cannot be started ---------------------------------------------------------------------------


def test_a_missing_secret_is_named_and_costs_nothing(tmp_path, functions, fake):
    async def scenario():
        before = open_descriptors()
        async with running(tmp_path / "s", functions) as host:
            with pytest.raises(NotFound, match="'missing'"):
                await started(host, Listener(), secrets=("missing",))
            replica = await started(host, Listener())
            assert await ask(replica)
        assert open_descriptors() == before

    async def whole():
        await asyncio.to_thread(int)
        await scenario()

    run(whole())
    assert list((tmp_path / "s" / "replicas").iterdir()) == []


def test_handlers_that_cannot_be_are_refused_when_prepared(tmp_path, functions, fake):
    write_function(functions, "broken", "def handle(:\n")
    write_function(functions, "empty", "x = 1\n")

    async def scenario():
        async with running(tmp_path / "s", functions) as host:
            for name in ("broken", "empty"):
                with pytest.raises(HandlerError):
                    await host.prepare(deployment(name))
            with pytest.raises(NotFound):
                await host.prepare(deployment("nobody"))
            with pytest.raises(NotFound, match="not prepared"):
                await host.start(deployment(), Listener())

    run(scenario())


def test_a_closed_host_starts_nothing(tmp_path, functions, fake):
    async def scenario():
        async with running(tmp_path / "s", functions) as host:
            await host.prepare(deployment())
        with pytest.raises(Unavailable):
            await host.start(deployment(), Listener())

    run(scenario())


def test_a_standby_that_died_is_replaced(tmp_path, functions, fake):
    async def scenario():
        async with running(tmp_path / "s", functions) as host:
            standby = Watched([host._standby.pid])
            host._standby.kill()
            assert standby.all_end(5)
            assert await ask(await started(host, Listener()))

    run(scenario())


# Entrypoints that behave badly --------------------------------------------------------------------


def test_what_is_no_event_is_passed_over(tmp_path, functions, fake):
    async def scenario():
        listener = Listener()
        async with running(tmp_path / "s", functions) as host:
            replica = await started(host, listener, FAKE="garbage")
            await listener.heard(EventName.SERVING)
            await replica.stop(20)
        assert listener.names == [EventName.LISTENING, EventName.SERVING, EventName.STOPPED]

    run(scenario())


def test_stopped_is_said_once_even_where_an_entrypoint_repeats_it(tmp_path, functions, fake):
    async def scenario():
        listener = Listener()
        async with running(tmp_path / "s", functions) as host:
            await (await started(host, listener, FAKE="twice")).stop(20)
        assert listener.names.count(EventName.STOPPED) == 1

    run(scenario())


def test_an_entrypoint_that_dies_at_once_is_reported_with_its_code(tmp_path, functions, fake, isolation):
    async def scenario():
        listener = Listener()
        async with running(tmp_path / "s", functions) as host:
            replica = await started(host, listener, FAKE="dies")
            stopped = await listener.heard(EventName.STOPPED)
            assert stopped.fields["exit_code"] == 7
            assert replica.state is ReplicaState.GONE
            with pytest.raises(OSError):
                await ask(replica)

    run(scenario())


def test_a_replica_that_never_comes_up_is_killed_and_says_why(tmp_path, functions, fake, isolation, monkeypatch):
    monkeypatch.setattr(followed, "_START_SLACK_S", -0.9)

    async def scenario():
        listener, fine = Listener(), Listener()
        async with running(tmp_path / "s", functions) as host:
            wanted = deployment(FAKE="hangs", annotations={"gpufn.dev/start-timeout": "1s"})
            await host.prepare(wanted)
            replica = await host.start(wanted, listener)
            processes = Watched(session_of(replica.pid))  # before its time is over
            other = await host.start(deployment(annotations={"gpufn.dev/start-timeout": "60s"}), fine)
            await fine.heard(EventName.SERVING)
            stopped = await listener.heard(EventName.STOPPED)
            assert stopped.fields["code"] == "start-timeout"
            assert stopped.fields["reason"] == "did not come up within 0.1 s and was killed"
            assert processes.all_end(5)
            assert other._patience.cancelled()

    run(scenario())


def test_an_entrypoint_that_does_not_listen_is_killed_after_its_grace(tmp_path, functions, fake, isolation):
    async def scenario():
        listener = Listener()
        async with running(tmp_path / "s", functions) as host:
            replica = await started(host, listener, FAKE="deaf")
            await listener.heard(EventName.SERVING)
            processes = Watched(session_of(replica.pid))
            await replica.stop(0.05)
            assert processes.all_end(5)
            assert (await listener.heard(EventName.STOPPED)).fields["reason"] == "killed by SIGKILL"

    run(scenario())


def test_strays_of_other_sessions_end_with_their_replica(tmp_path, functions, fake, isolation):
    async def scenario():
        listener = Listener()
        async with running(tmp_path / "s", functions) as host:
            replica = await started(host, listener, FAKE="stray")
            await listener.heard(EventName.SERVING)
            processes = session_of(replica.pid)
            assert any(Path(f"/proc/{pid}/comm").read_text().strip() == "sleep" for pid in processes)
            watched = Watched(processes)
            await replica.stop(20)
            assert watched.all_end(5)

    run(scenario())


def test_what_a_replica_prints_is_logged_to_its_last_byte(tmp_path, functions, fake):
    async def scenario():
        async with running(tmp_path / "s", functions) as host:
            wanted = deployment(FAKE="chatty")
            await host.prepare(wanted)
            replica = await host.start(wanted, Listener())
            await ask(replica)
            await replica.stop(20)
            path = host.log_path(wanted)
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert [line["text"] for line in lines] == ["one", "two", "three, without an end"]
            assert {line["instance"] for line in lines} == {replica.id}
            await host.remove(wanted)
            assert not path.exists()

    run(scenario())


def test_a_replica_that_prints_without_end_fills_neither_the_log_nor_the_loop(tmp_path, functions, fake):
    async def scenario():
        async with running(tmp_path / "s", functions) as host:
            wanted = deployment(FAKE="floods")
            await host.prepare(wanted)
            replica = await host.start(wanted, Listener())
            path = host.log_path(wanted)
            await until(lambda: path.exists() and b"the rest is dropped" in path.read_bytes())
            assert await ask(replica)
            await replica.stop(20)
            texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
            assert re.fullmatch(r"gpufn: \d+ lines were dropped", texts[-1])

    run(scenario())


def test_a_listener_that_raises_does_not_stop_the_events(tmp_path, functions, fake, caplog):
    async def scenario():
        listener = Listener()

        def sink(replica, event):
            listener(replica, event)
            raise RuntimeError("a bug elsewhere")

        async with running(tmp_path / "s", functions) as host:
            wanted = deployment()
            await host.prepare(wanted)
            replica = await host.start(wanted, sink)
            await listener.heard(EventName.SERVING)
            await replica.stop(20)
        assert listener.names[-1] is EventName.STOPPED

    run(scenario())
    assert "a bug elsewhere" in caplog.text


# Hosts that die, and two at once ------------------------------------------------------------------

_HOST = """
import asyncio, json, sys
from pathlib import Path
from adapter.hosts import process
from tests.fakes.host import Listener, deployment, running, session_of
from adapter.records import EventName

async def main(state, functions, shim, fake):
    if shim:
        process._link_shim = lambda _: Path(shim)
    async with running(Path(state), Path(functions)) as host:
        wanted = deployment(FAKE=fake)
        await host.prepare(wanted)
        pids = []
        for _ in range(2):
            listener = Listener()
            replica = await host.start(wanted, listener)
            await listener.heard(EventName.SERVING)
            pids += session_of(replica.pid)
        host._prepare_standby()
        print(json.dumps(pids + session_of(host._standby.pid)), flush=True)
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


def other_host(state, functions, shim="", fake=""):
    """A host in a process of its own with two replicas and a standby; returns it and their process ids."""
    host = subprocess.Popen(
        [sys.executable, "-c", _HOST, str(state), str(functions), str(shim), fake],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
    )
    assert host.stdout is not None
    with host.stdout:
        return host, json.loads(host.stdout.readline())


def test_replicas_end_by_themselves_when_their_host_is_killed(tmp_path, functions):
    host, pids = other_host(tmp_path / "s", functions)
    processes = Watched(pids)
    host.kill()
    host.wait(10)
    assert processes.all_end()


def test_a_host_ends_what_a_killed_one_left(tmp_path, functions):
    shim = fake_shim(tmp_path / "shim")
    host, pids = other_host(tmp_path / "s", functions, shim, "deaf")
    processes = Watched(pids)
    host.kill()
    host.wait(10)

    async def scenario():
        async with running(tmp_path / "s", functions) as host:
            assert processes.all_end(10)
            kept = {home.name for home in (tmp_path / "s" / "replicas").iterdir()}
            assert kept == {host._standby.home.name}

    run(scenario())


def test_a_reused_process_id_is_not_killed(tmp_path, functions, fake):
    home = tmp_path / "s" / "replicas" / "left"
    home.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as innocent:
        (home / "pid").write_text(json.dumps([innocent.pid, "1"]))
        for name, text in (("a", "0"), ("b", "[0, 0]"), ("c", "not json"), ("d", "[-1, 0]")):
            (tmp_path / "s" / "replicas" / name).mkdir()
            (tmp_path / "s" / "replicas" / name / "pid").write_text(text)

        async def scenario():
            async with running(tmp_path / "s", functions):
                assert not home.exists()

        run(scenario())
        assert innocent.poll() is None
        innocent.kill()


def test_a_second_host_on_the_same_folder_is_refused(tmp_path, functions, fake):
    async def scenario():
        async with running(tmp_path / "s", functions) as host:
            replica = await started(host, Listener())
            with pytest.raises(Conflict) as caught:
                async with running(tmp_path / "s", functions):
                    pass
            assert str(os.getpid()) in caught.value.why
            assert await ask(replica)  # undisturbed
        async with running(tmp_path / "s", functions):
            pass  # free again

    run(scenario())
