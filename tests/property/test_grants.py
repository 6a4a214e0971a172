"""The grant policy over everything it may be shown."""

import math
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

from hypothesis import example, given, settings, strategies as st

from adapter.policy import grants
from adapter.policy.gpu_models import matches
from adapter.policy.grants import (
    Claim,
    ClaimState,
    Device,
    Evict,
    Granted,
    Refused,
    Wait,
    Want,
    decide,
    free_bytes,
)

MODELS = ("NVIDIA H100 80GB HBM3", "NVIDIA L4")
FUNCTIONS = ("a.ns", "b.ns", "c.ns")
STATES = st.sampled_from((ClaimState.IDLE, ClaimState.IDLE, ClaimState.IDLE, *ClaimState))
GPUS = st.sampled_from((0.25, 0.5, 1.0, 1.0, 2.0, 3.0))


@st.composite
def machines(draw):
    """Few sizes, so that things fit exactly and fail to by one byte."""
    return [
        Device(f"GPU-{n}", draw(st.sampled_from(MODELS)), draw(st.sampled_from((8, 16))), draw(st.integers(0, 4)) == 0)
        for n in range(draw(st.sampled_from((0, 1, 1, 2, 2, 3, 4))))
    ]


@st.composite
def wants(draw, devices=()):
    homes = [d.uuid for d in devices]
    return Want(
        draw(st.sampled_from(FUNCTIONS)),
        draw(GPUS),
        draw(st.sampled_from((0, 0, 0, 3, 8, 9, 17))),
        draw(st.sampled_from(((), (), ("h100",), ("l4", "h100"), ("a100",)))),
        tuple(draw(st.lists(st.sampled_from(homes), max_size=1)) if homes else ()),
        draw(st.booleans()),
    )


@st.composite
def situations(draw, most=6):
    """Devices, claims that can all be true at once, and a want."""
    devices = draw(machines())
    minimum = {function: draw(st.sampled_from((0, 0, 0, 1, 2))) for function in FUNCTIONS}
    claims: list[Claim] = []
    for n in range(draw(st.integers(most // 3, most)) if devices else 0):
        on = draw(st.lists(st.sampled_from(devices), min_size=1, max_size=2, unique=True))
        function = draw(st.sampled_from(FUNCTIONS))
        claim = Claim(
            f"r{n}",
            function,
            tuple(d.uuid for d in on),
            draw(st.integers(1, 8)),
            draw(STATES),
            float(draw(st.integers(0, 3))),
            float(draw(st.integers(0, 3))),
            minimum[function],
        )
        if all(claim.bytes_on(d.uuid) <= free_bytes(d, claims) for d in on):
            claims.append(claim)
    return devices, claims, draw(wants(devices))


def carried_out(claims, decision, want):
    """The claims once the decision is done."""
    gone = {v.replica for v in decision.victims} if isinstance(decision, Evict) else set()
    rest = [c for c in claims if c.replica not in gone]
    sizes = {want.bytes_of(d) for d in decision.devices}
    assert len(sizes) == 1
    uuids = tuple(d.uuid for d in decision.devices)
    return [*rest, Claim("new", want.function, uuids, sizes.pop(), ClaimState.STARTING)]


def over_committed(devices, claims):
    return [d for d in devices if free_bytes(d, claims) < 0]


KEPT = st.sets(st.sampled_from([f"GPU-{n}" for n in range(4)]), max_size=3)


@given(situations(), KEPT)
def test_no_device_is_ever_over_committed(situation, kept):
    devices, claims, want = situation
    decision = decide(devices, claims, want, kept)
    if not isinstance(decision, Granted | Evict):
        return
    assert not over_committed(devices, carried_out(claims, decision, want))


@given(situations(), KEPT)
def test_what_is_given_is_what_was_wanted(situation, kept):
    devices, claims, want = situation
    decision = decide(devices, claims, want, kept)
    if not isinstance(decision, Granted | Evict):
        return
    assert len(decision.devices) == len(set(decision.devices)) == want.count
    assert not {d.uuid for d in decision.devices} & kept
    assert all(max(want.memory_bytes, want.bytes_of(d)) <= d.memory_bytes for d in decision.devices)
    if want.count > 1:
        assert len({(d.model, d.memory_bytes) for d in decision.devices}) == 1
        assert not any(d.is_slice for d in decision.devices)
    if want.was_on:
        home = next(d for d in devices if d.uuid == want.was_on[0])
        assert all((d.model, d.memory_bytes) == (home.model, home.memory_bytes) for d in decision.devices)
    elif want.models:
        assert all(any(matches(m, d.model) for m in want.models) for d in decision.devices)


@given(situations())
def test_only_idle_replicas_are_asked_and_minimums_hold(situation):
    devices, claims, want = situation
    decision = decide(devices, claims, want)
    if not isinstance(decision, Evict):
        return
    assert all(v.state in (ClaimState.IDLE, ClaimState.LEAVING) for v in decision.victims)
    for function in FUNCTIONS:
        awake = [c for c in claims if c.function == function and c.state.value in ("starting", "running", "idle")]
        asked = [v for v in decision.victims if v.function == function and v.state is ClaimState.IDLE]
        if function != want.function:
            assert not asked or len(awake) - len(asked) >= awake[0].min_replicas
        elif not want.replaces:
            assert not asked


def crowd(sizes, prices, need):
    """One device full of idle neighbours."""
    claims = [
        Claim(f"r{n}", "a.ns", ("GPU-0",), size, ClaimState.IDLE, 0.0, float(price))
        for n, (size, price) in enumerate(zip(sizes, prices, strict=True))
    ]
    return [Device("GPU-0", MODELS[0], sum(sizes))], claims, Want("b.ns", 1, need)


@st.composite
def crowds(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=14))
    return crowd(sizes, [draw(st.integers(0, 3)) for _ in sizes], draw(st.integers(1, sum(sizes))))


@settings(max_examples=300)
@given(situations(most=14) | crowds(), st.sampled_from((0, 2, 8)), st.sampled_from((1, 512)))
def test_no_victim_can_be_left_out(situation, exact_claims, exact_sets):
    devices, claims, want = situation
    with _bounds(exact_claims, exact_sets):
        decision = decide(devices, claims, want)
    if not isinstance(decision, Evict):
        return
    for spared in decision.victims:
        fewer = Evict(decision.devices, tuple(v for v in decision.victims if v is not spared))
        assert over_committed(devices, carried_out(claims, fewer, want))


@given(crowds())
@example(crowd([4, 9, 5], [1, 3, 2], 5))
def test_the_quick_search_takes_one_alone_where_that_is_cheapest(situation):
    devices, claims, want = situation
    with _bounds(0, 1):
        decision = decide(devices, claims, want)
    alone = [c.wake_s for c in claims if c.bytes_each >= want.memory_bytes]
    assert isinstance(decision, Evict)
    assert not alone or math.fsum(v.wake_s for v in decision.victims) <= min(alone)


@given(situations())
def test_nothing_cheaper_would_do(situation):
    devices, claims, want = situation
    decision = decide(devices, claims, want)
    if not (isinstance(decision, Evict) and want.count == 1):
        return
    (device,) = decision.devices
    price = math.fsum(v.wake_s for v in decision.victims)
    able = [c for c in claims if c.bytes_on(device.uuid) and c.state is ClaimState.LEAVING]
    able += [
        c
        for c in claims
        if c.bytes_on(device.uuid) and c.state is ClaimState.IDLE and not c.min_replicas and c.function != want.function
    ]
    for size in range(len(able) + 1):
        for others in combinations(able, size):
            if not over_committed(devices, carried_out(claims, Evict((device,), others), want)):
                assert price <= math.fsum(v.wake_s for v in others)


@given(situations(), KEPT, st.randoms())
def test_no_order_matters(situation, kept, random):
    devices, claims, want = situation
    decision = decide(devices, claims, want, kept)
    random.shuffle(devices)
    random.shuffle(claims)
    assert decide(devices, claims, want, kept) == decision


@given(situations(), st.data())
def test_more_free_memory_takes_no_grant_away(situation, data):
    devices, claims, want = situation
    if not (claims and isinstance(decide(devices, claims, want), Granted)):
        return
    n = data.draw(st.integers(0, len(claims) - 1))
    less = data.draw(st.sampled_from((None, replace(claims[n], state=ClaimState.PARKED))))
    left = [*claims[:n], *([less] if less else []), *claims[n + 1 :]]
    assert isinstance(decide(devices, left, want), Granted)


@given(situations())
def test_what_fits_an_empty_machine_is_never_refused(situation):
    devices, claims, want = situation
    empty = decide(devices, [], want)
    assert isinstance(empty, Granted | Refused)
    assert isinstance(decide(devices, claims, want), Refused) is isinstance(empty, Refused)


@given(situations(), KEPT)
def test_who_waits_has_devices_kept_where_any_can_be(situation, kept):
    devices, claims, want = situation
    decision = decide(devices, claims, want, kept)
    if not isinstance(decision, Wait):
        return
    assert len(decision.devices) in (0, want.count)
    assert decision.reason
    if not kept:
        assert decision.devices


@given(situations())
def test_a_free_home_is_where_a_parked_replica_goes(situation):
    devices, claims, want = situation
    if not (want.was_on and want.count == 1):
        return
    decision = decide(devices, claims, want)
    if not isinstance(decision, Granted):
        return
    home = next(d for d in devices if d.uuid == want.was_on[0])
    if want.bytes_of(home) <= free_bytes(home, claims):
        assert decision.devices == (home,)


@given(situations(most=14))
def test_the_quick_search_finds_something_wherever_the_exact_one_does(situation):
    devices, claims, want = situation
    claims = [replace(c, min_replicas=0) for c in claims]  # with minimums it may give up too early: it waits then
    exact = decide(devices, claims, want)
    with _bounds(0, 1):
        quick = decide(devices, claims, want)
    assert type(quick) is type(exact)


@given(GPUS, st.integers(1, 2**40), st.integers(1, 2**40))
def test_shares_of_one_device_never_exceed_it(gpus, memory, need):
    device = Device("GPU-0", "X", memory)
    want = Want("f", gpus, need if need <= memory else 0)
    if gpus > 1:
        assert (want.bytes_of(device), want.share_of(device)) == (memory, gpus)
    else:
        fit = memory // want.bytes_of(device)
        assert fit >= 1
        assert min(fit, round(1 / gpus)) * want.share_of(device) <= 1 or want.memory_bytes
        assert not want.memory_bytes or fit * want.share_of(device) <= 1


@contextmanager
def _bounds(claims, sets):
    """Smaller bounds of the exact search."""
    was = (grants._EXACT_CLAIMS, grants._EXACT_SETS)
    grants._EXACT_CLAIMS, grants._EXACT_SETS = claims, sets
    try:
        yield
    finally:
        grants._EXACT_CLAIMS, grants._EXACT_SETS = was
