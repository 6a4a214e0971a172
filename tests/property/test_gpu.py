"""What is pure about GPUs: mappings, messages, time limits."""

import json

import pytest
from hypothesis import given, strategies as st

from adapter.errors import ConfigError, GpuError
from adapter.gpu.checkpoint import full_mapping
from adapter.gpu.client import time_limit_s
from adapter.gpu.wire import Answer, Operation, Request, State, Step

GPUS = [f"GPU-{letter}" for letter in "abcdef"]


@given(st.permutations(GPUS), st.sets(st.sampled_from(GPUS)), st.integers(1, len(GPUS)))
def test_a_full_mapping_names_each_gpu_once_on_either_side_and_keeps_what_was_asked(order, named, count):
    gpus = GPUS[:count]
    targets = [gpu for gpu in order if gpu in gpus]
    asked = {gpu: targets[index] for index, gpu in enumerate(gpus) if gpu in named}
    full = full_mapping(asked, gpus)
    assert sorted(full) == sorted(full.values()) == gpus
    assert full | asked == full


@given(st.permutations(GPUS), st.sets(st.sampled_from(GPUS)))
def test_gpus_that_nothing_moves_onto_stay(order, named):
    asked = {gpu: order[index] for index, gpu in enumerate(GPUS) if gpu in named}
    full = full_mapping(asked, GPUS)
    for gpu in set(GPUS) - set(asked) - set(asked.values()):
        assert full[gpu] == gpu


def test_a_mapping_of_another_machines_gpus_is_left_as_it_is():
    assert full_mapping({"GPU-x": "GPU-a"}, GPUS) == {"GPU-x": "GPU-a"}


def test_two_gpus_cannot_become_one():
    with pytest.raises(GpuError) as refused:
        full_mapping({"GPU-a": "GPU-c", "GPU-b": "GPU-c"}, GPUS)
    assert refused.value.code == "gpu-bad-mapping"


requests = st.builds(
    Request,
    st.integers(0, 2**40),
    st.sampled_from(Operation),
    st.floats(0.001, 3599.0),
    st.dictionaries(st.text(), st.text(), max_size=4),
)
states = st.none() | st.sampled_from(State)
answers = st.builds(
    Answer,
    number=st.integers(0, 2**40),
    found=states,
    reached=states,
    steps=st.lists(st.builds(Step, st.text(), st.integers(0), st.integers(0)), max_size=3).map(tuple),
    committed=st.booleans(),
)


@given(requests)
def test_requests_arrive_as_they_were_sent(request):
    assert Request.from_message(request.to_message()) == request


@given(answers)
def test_answers_arrive_as_they_were_sent(answer):
    assert Answer.from_message(answer.to_message()) == answer


def test_errors_arrive_with_all_their_words():
    sent = GpuError("What.", why="Why.", hint="Do.", code="gpu-failed")
    error = Answer.from_message(Answer(1, error=sent).to_message()).error
    assert error is not None
    assert (error.message, error.why, error.hint, error.code) == ("What.", "Why.", "Do.", "gpu-failed")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(
    st.binary()
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {"number": json_values, "operation": st.just("park"), "lock_timeout_s": json_values, "mapping": json_values}
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_is_sent_is_a_request_or_refused_as_bad(data):
    try:
        request = Request.from_message(data)
    except ConfigError as refused:
        assert refused.code == "bad-request"
    else:
        assert Request.from_message(request.to_message()) == request


def test_copies_have_time_by_their_size_and_never_less_than_the_fixed_costs_take():
    assert time_limit_s(Operation.RESUME, None) == time_limit_s(Operation.RESUME, 1) >= 30
    assert time_limit_s(Operation.RESUME, 80 * 10**9) == time_limit_s(Operation.RESUME, 1) + 10
    assert time_limit_s(Operation.PARK, 80 * 10**9) == time_limit_s(Operation.RESUME, 80 * 10**9) + 10
    assert time_limit_s(Operation.STATE) < time_limit_s(Operation.PARK)
