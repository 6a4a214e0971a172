import pytest

from adapter.policy.grants import Claim, ClaimState, Device, Evict, Granted, Refused, Wait, Want, decide, is_spare
from adapter.spec import parse_spec

GI = 2**30
H100 = "NVIDIA H100 80GB HBM3"
ONE = Device("GPU-1", H100, 80 * GI)
TWO = Device("GPU-2", H100, 80 * GI)
L4 = Device("GPU-3", "NVIDIA L4", 24 * GI)
SLICE = Device("MIG-1", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 * GI, is_slice=True)


def claim(replica, gigabytes, state=ClaimState.IDLE, *, on=ONE, wake_s=1.0, idle_since_s=0.0, least=0):
    function = replica.partition("-")[0] + ".ns"
    return Claim(replica, function, (on.uuid,), gigabytes * GI, state, idle_since_s, wake_s, least)


def want(gpus=1.0, gigabytes=0, models=(), **more):
    return Want("new.ns", gpus, gigabytes * GI, models, **more)


def victims(decision):
    assert isinstance(decision, Evict)
    return [v.replica for v in decision.victims]


def test_a_memory_need_lets_several_share_a_device():
    claims = [claim("a-1", 40, ClaimState.RUNNING)]
    assert decide([ONE], claims, want(1, 40)) == Granted((ONE,))
    assert isinstance(decide([ONE], claims, want(1, 41)), Wait)


def test_a_share_without_a_memory_need_is_that_share_of_the_memory():
    claims = [claim("a-1", 40, ClaimState.RUNNING)]
    assert decide([ONE], claims, want(0.5)) == Granted((ONE,))
    assert isinstance(decide([ONE], claims, want(0.75)), Wait)
    assert isinstance(decide([ONE], claims, want(1)), Wait)


def test_a_count_takes_whole_devices_of_one_model():
    assert decide([ONE, TWO, L4], [], want(2, 10)) == Granted((ONE, TWO))
    assert isinstance(decide([ONE, TWO], [claim("a-1", 1, ClaimState.RUNNING)], want(2)), Wait)


def test_models_are_tried_in_order_of_preference():
    assert decide([ONE, L4], [], want(1, models=("l4", "h100"))) == Granted((L4,))
    claims = [claim("a-1", 24, ClaimState.RUNNING, on=L4)]
    assert decide([ONE, L4], claims, want(1, models=("l4", "h100"))) == Granted((ONE,))


def test_the_fullest_device_with_room_is_taken():
    assert decide([ONE, TWO], [claim("a-1", 30, on=TWO)], want(0.5)) == Granted((TWO,))


@pytest.mark.parametrize(
    ("devices", "wanted", "code"),
    [
        ([], want(), "no-gpu"),
        ([L4], want(models=("h100", "a100")), "gpu-model-missing"),
        ([L4], want(1, 40), "gpu-too-small"),
        ([ONE, L4], want(2), "gpu-too-few"),
        ([SLICE, SLICE], want(2), "gpu-too-few"),
        ([TWO], want(was_on=("GPU-1",)), "gpu-gone"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_reason(devices, wanted, code):
    decision = decide(devices, [], wanted)
    assert isinstance(decision, Refused)
    assert decision.code == code
    assert decision.reason


def test_a_refusal_names_what_is_here():
    assert decide([L4], [], want(models=("h100",))) == Refused("None is a h100; here: NVIDIA L4.", "gpu-model-missing")


def test_a_slice_is_a_device():
    assert decide([SLICE], [], want(1)) == Granted((SLICE,))


def test_the_cheapest_to_wake_goes():
    claims = [claim("a-1", 40, wake_s=3), claim("b-1", 40, wake_s=2)]
    assert victims(decide([ONE], claims, want(0.5))) == ["b-1"]


def test_two_cheap_ones_go_before_a_dear_one():
    claims = [claim("a-1", 40, wake_s=9), claim("b-1", 20, wake_s=2), claim("c-1", 20, wake_s=3)]
    assert victims(decide([ONE], claims, want(0.5))) == ["b-1", "c-1"]


def test_of_one_price_the_longest_idle_goes():
    claims = [claim("a-1", 80, idle_since_s=5), claim("b-1", 80, on=TWO, idle_since_s=3)]
    assert victims(decide([ONE, TWO], claims, want())) == ["b-1"]


@pytest.mark.parametrize("state", [ClaimState.STARTING, ClaimState.RUNNING])
def test_who_starts_or_works_is_left_alone(state):
    decision = decide([ONE], [claim("a-1", 80, state)], want(1))
    assert isinstance(decision, Wait)
    assert "a-1 " + state.value in decision.reason


def test_a_minimum_is_left_alone():
    claims = [claim("a-1", 40, least=1), claim("a-2", 40, least=1)]
    assert len(victims(decide([ONE], claims, want(0.5)))) == 1
    assert isinstance(decide([ONE], claims, want(1)), Wait)


def test_the_functions_own_replicas_go_only_for_their_successor():
    claims = [claim("new-1", 80, least=1)]
    assert isinstance(decide([ONE], claims, want(1)), Wait)
    assert victims(decide([ONE], claims, want(1, replaces=True))) == ["new-1"]


def test_who_leaves_costs_nothing():
    claims = [claim("a-1", 40, wake_s=0.1), claim("b-1", 40, ClaimState.LEAVING, wake_s=0, least=1)]
    assert victims(decide([ONE], claims, want(0.5))) == ["b-1"]


def test_a_parked_replica_holds_nothing_and_goes_home_where_it_can():
    parked = claim("a-1", 80, ClaimState.PARKED)
    assert decide([ONE], [parked], want()) == Granted((ONE,))
    assert decide([ONE, TWO], [], want(was_on=("GPU-2",))) == Granted((TWO,))


def test_a_parked_replica_may_wake_on_another_of_the_same_model_only():
    busy = [claim("a-1", 80, ClaimState.RUNNING)]
    assert decide([ONE, TWO, L4], busy, want(was_on=("GPU-1",))) == Granted((TWO,))
    decision = decide([ONE, L4], busy, want(was_on=("GPU-1",)))
    assert isinstance(decision, Wait)
    assert decision.devices == (ONE,)


def test_devices_that_are_kept_for_others_are_not_given():
    assert decide([ONE, TWO], [], want(), {"GPU-1"}) == Granted((TWO,))
    decision = decide([ONE], [], want(), {"GPU-1"})
    assert isinstance(decision, Wait)
    assert decision.devices == ()
    assert decision.reason.startswith("Others wait for it already.")


def test_who_waits_has_the_device_kept_where_the_least_is_in_the_way():
    claims = [claim("a-1", 50, ClaimState.RUNNING), claim("b-1", 45, ClaimState.RUNNING, on=TWO)]
    decision = decide([ONE, TWO], claims, want())
    assert isinstance(decision, Wait)
    assert decision.devices == (TWO,)


def test_a_spec_becomes_a_want():
    spec = parse_spec({"gpu": {"count": 0.5, "memory": "10Gi", "models": ["h100"]}}, {})
    assert Want.of("f.ns", spec) == Want("f.ns", 0.5, 10 * GI, ("h100",))


@pytest.mark.parametrize(
    ("devices", "wanted", "spare"),
    [
        ([ONE], want(), False),  # it is the last one
        ([ONE, TWO], want(), True),
        ([ONE, L4], want(models=("h100",)), False),
        ([ONE], want(0.5), True),
        ([ONE], want(0.6), False),
        ([ONE], want(1, 40), True),
        ([ONE, TWO], want(2), False),
        ([], want(), False),
    ],
)
def test_a_guess_leaves_another_one_for_who_asks(devices, wanted, spare):
    assert is_spare(devices, [], wanted) is spare


def test_nobody_makes_room_for_a_guess():
    idle = [claim("a-1", 80), claim("b-1", 80, on=TWO)]
    assert isinstance(decide([ONE, TWO], idle, want()), Evict)
    assert not is_spare([ONE, TWO], idle, want())
    assert not is_spare([ONE, TWO], idle[:1], want())
