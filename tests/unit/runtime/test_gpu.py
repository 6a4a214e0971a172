"""What the entrypoint makes of what was found out about the machine's GPUs."""

import os
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from adapter.gpu.capabilities import Capabilities, Feature, Verdict
from adapter.gpu.wire import Answer, Operation, Request, listen, receive, send
from adapter.runtime import gpu as gpu_of_replica
from adapter.runtime.gpu import Gpu, keeps_addresses, visible_device, why_not_park
from adapter.runtime.loop import Loop


@pytest.fixture
def kept(tmp_path):
    """A file of verdicts: this one for a feature, and good ones for the rest."""

    def kept(verdict, feature=Feature.PLAIN):
        path = tmp_path / "capabilities.json"
        path.write_text(Capabilities({}, {each: Verdict(True) for each in Feature} | {feature: verdict}).to_json())
        return str(path)

    return kept


@pytest.mark.parametrize("plain", [Verdict(True), Verdict(None, "canary-failed", "The GPU was full.")])
def test_a_park_is_tried_where_nothing_is_known_against_it(kept, plain):
    assert why_not_park(kept(plain)) is None


def test_a_driver_that_cannot_park_is_not_asked_and_says_why(kept):
    refusal = why_not_park(kept(Verdict(False, "gpu-checkpoint-unsupported", "Too old.", "Update it.")))
    assert refusal is not None
    assert (refusal.code, refusal.why, refusal.hint) == ("gpu-checkpoint-unsupported", "Too old.", "Update it.")


@pytest.mark.parametrize(("works", "keeps"), [(True, True), (None, True), (False, False)])
def test_weights_keep_their_addresses_unless_such_memory_cannot_be_parked(kept, works, keeps):
    assert keeps_addresses(kept(Verdict(works), Feature.VIRTUAL)) is keeps
    assert keeps_addresses("")


def test_no_file_and_a_damaged_one_say_nothing(tmp_path):
    assert why_not_park("") is None
    assert why_not_park(str(tmp_path / "missing")) is None
    (tmp_path / "damaged").write_text("[]")
    assert why_not_park(str(tmp_path / "damaged")) is None


@pytest.fixture
def open_till_end():
    with ExitStack() as stack:
        yield stack


class Helper:
    """Hears one request a connection, and answers when told."""

    def __init__(self, path, stack):
        self.listener = stack.enter_context(listen(str(path)))
        self._stack = stack

    def hear(self):
        connection = self._stack.enter_context(self.listener.accept()[0])
        connection.setblocking(True)
        data, descriptor = receive(connection)
        os.close(descriptor)
        number = Request.from_message(data).number
        return SimpleNamespace(
            answer=lambda: send(connection, Answer(number).to_message()), close=connection.close, number=number
        )


@pytest.fixture
def loop():
    """Keeps the timers of requests, which the test lets pass."""
    loop = Loop()
    loop.timers = []
    loop.after = lambda seconds, call: loop.timers.append(call) if seconds else Loop.after(loop, seconds, call)
    with loop.selector:
        yield loop


def turn_until(loop, condition):
    while not condition():
        loop.turn()


def test_the_time_of_a_request_to_a_helper_that_is_gone_is_not_that_of_the_next_ones(tmp_path, loop, open_till_end):
    helper = Helper(tmp_path / "h", open_till_end)
    gpu = Gpu(loop, str(tmp_path / "h"), tmp_path, {})
    open_till_end.callback(gpu.close)
    said = []
    gpu.ask(Operation.PARK, os.getpid(), said.append)
    first = helper.hear()
    first.answer()
    turn_until(loop, lambda: len(said) == 1)
    first.close()
    turn_until(loop, lambda: gpu._client is None)
    gpu.ask(Operation.RESUME, os.getpid(), said.append)
    second = helper.hear()
    assert second.number == first.number
    loop.timers[0]()
    second.answer()
    turn_until(loop, lambda: len(said) == 2)
    assert said[1].error is None
    gpu.ask(Operation.STATE, os.getpid(), said.append)
    loop.timers[2]()  # and its own time still counts
    turn_until(loop, lambda: len(said) == 3)
    assert said[2].error.code == "helper-timeout"


def test_a_helper_of_our_own_that_died_before_it_was_asked_is_replaced(tmp_path, loop, monkeypatch, open_till_end):
    helpers = []

    def start(path, **_):
        helpers.append(Helper(path, open_till_end))
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(gpu_of_replica, "start_helper", start)
    gpu = Gpu(loop, "", tmp_path, {})
    open_till_end.callback(gpu.close)
    gpu.prepare()
    helpers[0].listener.close()
    said = []
    gpu.ask(Operation.STATE, os.getpid(), said.append)
    turn_until(loop, lambda: len(helpers) == 2 or said)
    assert not said
    helpers[1].hear().answer()
    turn_until(loop, lambda: said)
    assert said[0].error is None
    assert [error.code for error in gpu.take_overcome()] == ["helper-died"]


@pytest.mark.parametrize(
    ("environ", "device"),
    [
        ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, "GPU-1"),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-2"}, "GPU-2"),  # as a device plugin says it
        ({"CUDA_VISIBLE_DEVICES": "0", "NVIDIA_VISIBLE_DEVICES": "GPU-2"}, "GPU-2"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1", "NVIDIA_VISIBLE_DEVICES": "all"}, "GPU-1"),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-1,GPU-2"}, ""),
        ({"NVIDIA_VISIBLE_DEVICES": "MIG-1"}, ""),
        ({}, ""),
    ],
)
def test_the_one_gpu_of_a_replica_is_known_by_who_gave_it(environ, device):
    assert visible_device(environ) == device
