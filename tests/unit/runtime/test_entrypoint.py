"""What the entrypoint decides, with nothing launched."""

import errno
import os
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest

from adapter.gpu.capabilities import Capabilities, Feature, Verdict
from adapter.hosts.ports import listen
from adapter.records import EventName, Rung
from adapter.replica import ReplicaSettings
from adapter.runtime import channel
from adapter.runtime.entrypoint import Entrypoint, State
from adapter.runtime.ladder import Step
from adapter.runtime.start import Start

FACTS = {
    "criu": "/opt/criu",
    "criu_version": "4.1",
    "pid": 5000,
    "pipes": ["pipe:[1]", "pipe:[2]", "pipe:[3]", "pipe:[4]"],
    "mapped_bytes": 0,
    "copied_bytes": 0,
}


@pytest.fixture
def entrypoint(tmp_path):
    settings = ReplicaSettings(
        device="cuda:0",
        runtime_dir=str(tmp_path),
        start_timeout_s=300.0,
        gpu_capabilities=str(tmp_path / "capabilities.json"),
    )
    with listen("127.0.0.1", 0) as listener:
        entrypoint = Entrypoint(settings, {}, 0, listener)
        entrypoint._channel_path = ""
        entrypoint.said = []
        entrypoint._say = lambda name, **fields: entrypoint.said.append((name, fields))
        entrypoint._model = SimpleNamespace(
            signal=lambda number: None, restore=lambda *_: None, start=lambda *_: None, pid=1
        )
        yield entrypoint


@pytest.mark.parametrize("is_the_models", [True, False])
def test_only_the_process_that_was_launched_last_is_met(entrypoint, tmp_path, is_the_models):
    """A restored process whose restorer was killed may have connected before it was killed, too."""
    met = []
    entrypoint._state = State.STARTING
    pid = os.getpid() if is_the_models else os.getppid()
    entrypoint._model = SimpleNamespace(pid=pid, channel=None, meet=lambda channel, hear: met.append(channel))
    path = str(tmp_path / "channel")
    with channel.listen(path) as listener, closing(channel.Channel.connect(path)) as theirs:
        entrypoint._meet_model(listener)
        assert bool(met) is is_the_models
        assert is_the_models or theirs.receive() == ({}, [])
    for each in met:
        each.close()


@pytest.mark.parametrize(("gpu", "limit_s"), [("", 30.0), ("GPU-1", 300.0)])
def test_a_restore_of_a_gpus_memory_has_as_long_as_a_start(entrypoint, gpu, limit_s):
    limits = []
    entrypoint._loop.after = lambda seconds, call: limits.append(seconds)
    entrypoint._gpu.prepare = lambda: None
    entrypoint._wanted = SimpleNamespace(weights_of=lambda snapshot: "")
    step = Step(Rung.RESTORE, SimpleNamespace(facts={**FACTS, "gpu": gpu}))
    entrypoint._start = Start(entrypoint._settings, time.monotonic_ns(), [step], [])
    entrypoint._try_next()
    assert limits == [limit_s]


@pytest.mark.parametrize(
    ("rung", "weights", "known", "is_parked"),
    [
        (Rung.START, "/weights", False, False),
        (Rung.START, "/weights", True, True),  # so it was born without
        (Rung.LOAD, "", False, True),
        (Rung.RESTORE, "kept", False, False),
        (Rung.RESTORE, "", False, True),
    ],
)
def test_a_process_whose_memory_was_found_not_to_be_parked_after_its_birth_is_not(
    entrypoint, tmp_path, monkeypatch, rung, weights, known, is_parked
):
    verdicts = {each: Verdict(each is not Feature.VIRTUAL, "gpu-memory-lost") for each in Feature}

    def found_out():
        (tmp_path / "capabilities.json").write_text(Capabilities({}, verdicts).to_json())

    if known:
        found_out()
    monkeypatch.setattr("adapter.runtime.entrypoint._read_ahead", lambda weights: None)
    entrypoint._gpu.prepare = lambda: None
    entrypoint._wanted = SimpleNamespace(
        device="cuda:0", python="", shared={}, weights_of=lambda snapshot: "", keeps_compile_caches=False
    )
    facts = {**FACTS, "keeps_addresses": bool(weights)}
    snapshot = SimpleNamespace(facts=facts) if rung is Rung.RESTORE else None
    entrypoint._launch(Step(rung, snapshot, weights))
    found_out()
    entrypoint._begin_park()
    assert entrypoint._can_park is is_parked


@pytest.mark.parametrize(("before", "after"), [(State.SERVING, State.SERVING), (State.PARKING, State.PARKED)])
def test_a_snapshotter_that_cannot_be_started_is_no_end_of_serving(entrypoint, monkeypatch, before, after):
    def no_process_left(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "posix_spawn", no_process_left)
    entrypoint._front = SimpleNamespace(held=[])
    entrypoint._state = before
    entrypoint._start_snapshotter()
    assert entrypoint._state is after
    name, fields = entrypoint.said[0]
    assert (name, fields["state"], fields["code"]) == (EventName.SNAPSHOT, "failed", "os-error")
    assert "temporarily unavailable" in fields["reason"]


@pytest.mark.parametrize(("taker", "said", "waits"), [("host", ["due"], False), ("replica", [], True)])
def test_with_a_gpu_a_snapshot_is_the_hosts_to_take_or_waits_until_it_is_parked(entrypoint, taker, said, waits):
    entrypoint._settings = replace(entrypoint._settings, snapshot_by=taker)
    entrypoint._wanted = SimpleNamespace(lacks_snapshots=lambda rung: True)
    entrypoint._state = State.SERVING
    for _ in range(2):
        entrypoint._consider_snapshots(Rung.LOAD)
    assert [fields["state"] for name, fields in entrypoint.said if name is EventName.SNAPSHOT] == said
    assert entrypoint._snapshots_due is waits
