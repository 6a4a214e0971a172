from datetime import datetime, timezone

import pytest
from hypothesis import given, strategies as st

from adapter.policy.budget import NEAR_RATIO, Budget, BudgetState, held_gpu_s, utc_day
from adapter.records import LeaseInterval, LeasePhase

SECOND = 10**9
HOUR = 3600 * SECOND
DAY = 24 * HOUR
NOW = 20_000 * DAY + 20 * HOUR
INSTANT = st.integers(0, 2**62)
GPU_S = st.floats(0, 1e9, allow_nan=False)


def budget(held, limit=100.0, *, ends_at_ns=NOW + 4 * HOUR):
    return Budget("embed.ns", held, limit, ends_at_ns)


def lease(start, seconds, *, function="embed", device="GPU-1", share=1.0, phase=LeasePhase.RUNNING):
    return LeaseInterval(
        id=f"r:{start}", function=function, namespace="ns", revision="1", replica="r", tenant="t", price_class="standard",
        device=device, share=share, phase=phase, started_at_ns=start * SECOND, ended_at_ns=(start + seconds) * SECOND,
    )  # fmt: skip


@given(INSTANT)
def test_an_instant_is_in_its_day_whose_borders_are_midnights(now_ns):
    start_ns, end_ns = utc_day(now_ns)
    assert start_ns <= now_ns < end_ns == start_ns + DAY
    midnight = datetime.fromtimestamp(start_ns // SECOND, timezone.utc)
    assert (midnight.hour, midnight.minute, midnight.second, start_ns % SECOND) == (0, 0, 0, 0)
    assert utc_day(end_ns - 1) == (start_ns, end_ns)
    assert utc_day(end_ns)[0] == end_ns


@pytest.mark.parametrize(
    ("held", "state"),
    [
        (0, BudgetState.OPEN), (79.9, BudgetState.OPEN), (80, BudgetState.NEARLY_SPENT), (99.9, BudgetState.NEARLY_SPENT),
        (100, BudgetState.SPENT), (250, BudgetState.SPENT),
    ],
)  # fmt: skip
def test_it_is_nearly_spent_from_four_fifths_on_and_spent_at_its_limit(held, state):
    assert budget(held).state(NOW) is state


@given(GPU_S)
def test_without_a_limit_it_is_always_open(held):
    free = budget(held, 0.0)
    assert (free.state(NOW), free.opens_in_s(NOW), free.refusal(NOW), free.text(NOW)) == (BudgetState.OPEN, 0, None, "")


@given(GPU_S, st.floats(1e-3, 1e9), INSTANT)
def test_it_refuses_only_when_spent_and_opens_when_it_says_so(held, limit, now_ns):
    it = budget(held, limit, ends_at_ns=utc_day(now_ns)[1])
    spent = it.state(now_ns) is BudgetState.SPENT
    assert spent == (held >= limit)
    assert (it.refusal(now_ns) is not None) == spent == (it.opens_in_s(now_ns) > 0)
    assert it.opens_in_s(now_ns) <= DAY / SECOND
    assert it.state(it.ends_at_ns) is BudgetState.OPEN
    assert bool(it.text(now_ns)) == (it.state(now_ns) is not BudgetState.OPEN)


@given(st.lists(GPU_S, min_size=2, max_size=2).map(sorted), st.floats(1e-3, 1e9))
def test_holding_more_never_opens_it(held, limit):
    order = list(BudgetState)
    less, more = (order.index(budget(h, limit).state(NOW)) for h in held)
    assert less <= more


def test_the_refusal_says_how_much_of_how_much_until_when_and_what_to_do():
    refusal = budget(7215.4, 7200.0).refusal(NOW)
    assert refusal is not None
    assert (refusal.http_status, refusal.code, refusal.retry_after_s) == (429, "budget-spent", 4 * 3600)
    assert refusal.to_text() == (
        "✗ The budget of embed.ns is spent.  [budget-spent]\n"
        "  It held 7,215.4 of 7,200.0 GPU-seconds in this UTC day.\n"
        "  It wakes again at 00:00 UTC, in 4h00m; for more today raise price.budget (gpufn.dev/budget)."
    )
    assert budget(7215.4, 7200.0).text(NOW) == f"{refusal.message} {refusal.why} {refusal.hint}"


def test_nearly_spent_it_says_the_same_without_a_wake():
    text = budget(NEAR_RATIO * 100).text(NOW)
    assert text.startswith(
        "The budget of embed.ns is nearly spent. It held 80.0 of 100.0 GPU-seconds in this UTC day. A new day"
    )


def test_each_caller_has_a_refusal_of_his_own():
    assert budget(100).refusal(NOW) is not budget(100).refusal(NOW)


def test_what_is_held_counts_by_share_within_the_day_and_not_while_parked():
    leases = [
        lease(0, 20),  # of which ten before the day
        lease(20, 10, share=0.5, phase=LeasePhase.IDLE),
        lease(30, 10, device="GPU-1,GPU-2", share=2.0, phase=LeasePhase.RESTORING),
        lease(40, 10, phase=LeasePhase.PARKED),
        lease(50, 10, device="cpu"),
        lease(60, 7, function="other", phase=LeasePhase.DRAINING),
    ]
    assert held_gpu_s(leases, 10 * SECOND, 1000 * SECOND) == {"embed.ns": 10 + 5 + 20, "other.ns": 7}
