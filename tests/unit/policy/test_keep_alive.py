import pytest

from adapter.policy.keep_alive import ENOUGH_GAPS, LEAST_S, Basis, Gap, Habits, History, Wake, keep_alive, wake_s
from adapter.records import Phase, PhaseName, Rung, StartRecord
from adapter.spec import parse_spec

RESTORED = (Wake(Rung.RESTORE, 2.4),)


def spec(**scale):
    return parse_spec({"gpu": {"count": 1}, "scale": scale}, {})


def gaps(*seconds):
    return tuple(Gap(each) for each in seconds)


@pytest.mark.parametrize(("idle", "seconds", "said"), [("5m", 300.0, "5m00s"), ("0s", 0.0, "never")])
def test_what_the_user_says_is_what_happens(idle, seconds, said):
    chosen = keep_alive(spec(idle=idle), Habits(gaps(*[60.0] * 50), RESTORED), current_s=10.0)
    assert (chosen.seconds, chosen.basis) == (seconds, Basis.SET)
    assert said in chosen.reason


def test_before_anything_was_measured_a_start_with_a_model_is_assumed():
    chosen = keep_alive(spec(), Habits())
    assert (chosen.seconds, chosen.basis) == (330.0, Basis.ASSUMED)
    assert "no cold start was measured yet" in chosen.reason


def test_with_few_gaps_it_is_kept_for_what_a_wake_costs():
    chosen = keep_alive(spec(), Habits(gaps(100, 200, 300), RESTORED))
    assert (chosen.seconds, chosen.basis) == (pytest.approx(26.4), Basis.PRIOR)
    assert chosen.reason == (
        "a cold start takes 2.40s, which is worth 26.40s of a held GPU (cold_price 10); "
        "3 of 10 idle gaps known, so it is kept for what that costs"
    )


def test_regular_callers_are_waited_for_where_that_is_cheaper():
    chosen = keep_alive(spec(), Habits(gaps(*[80.0] * 20), (Wake(Rung.LOAD, 24.0),)))
    assert (chosen.seconds, chosen.basis) == (pytest.approx(84.0), Basis.LEARNED)
    assert "100% of the latest 20 idle gaps are shorter" in chosen.reason


def test_callers_who_never_come_back_soon_let_go_early():
    chosen = keep_alive(spec(), Habits(gaps(*[5000.0] * 20), RESTORED))
    assert chosen.seconds == pytest.approx(26.4 / 4)


def test_what_is_set_stays_where_the_best_is_hardly_better():
    known = Habits(gaps(*range(20, 60, 2)), RESTORED)
    best = keep_alive(spec(), known).seconds
    assert keep_alive(spec(), known, current_s=best + 2).seconds == best + 2
    assert "would save less than a tenth" in keep_alive(spec(), known, current_s=best + 2).reason
    assert keep_alive(spec(), known, current_s=400.0).seconds == best


def test_a_wake_that_varies_a_little_changes_nothing():
    assert keep_alive(spec(), Habits((), (Wake(Rung.LOAD, 22.0),)), current_s=220.0).seconds == 220.0
    assert keep_alive(spec(), Habits((), (Wake(Rung.LOAD, 44.0),)), current_s=220.0).seconds == 484.0


@pytest.mark.parametrize(
    ("rungs", "expected"),
    [
        ([(Rung.LOAD, 24.0)], 24.0),
        ([(Rung.LOAD, 24.0), (Rung.RESTORE, 2.0)], 2.0),  # as many of each: the latest
        ([(Rung.RESTORE, 2.0), (Rung.RESTORE, 4.0), (Rung.LOAD, 24.0)], 3.0),  # one that failed to restore
        ([(Rung.RESTORE, 2.0), (Rung.RESUME, 0.1), (Rung.RESUME, 0.1)], 2.0),  # a parked one was not at zero
        ([(Rung.RESUME, 0.1)], None),
    ],
)
def test_the_next_wake_is_like_most_of_the_latest(rungs, expected):
    assert wake_s(Habits((), tuple(Wake(*each) for each in rungs))) == expected


def test_a_replica_that_parks_is_kept_far_longer_once_it_has():
    slow = Habits((), (Wake(Rung.LOAD, 10.0), Wake(Rung.RESUME, 0.2)), parks=True)
    chosen = keep_alive(spec(park="60s", idle_max="24h"), slow)
    assert chosen.seconds == pytest.approx(60 + (110 - 60 - 2.2) / 0.02)
    assert keep_alive(spec(park="60s", idle_max="30m"), slow).seconds == 1800.0
    quick = Habits((), RESTORED, parks=True)
    assert keep_alive(spec(park="60s"), quick).seconds == pytest.approx(26.4)  # cheaper to stop than to hold until then


def test_what_holds_no_gpu_is_cheap_to_keep_and_what_holds_many_is_dear():
    quick = Habits((), (Wake(Rung.RESTORE, 0.2),), parks=True)
    on_cpu = keep_alive(parse_spec({}, {}), quick).seconds
    assert on_cpu == pytest.approx(0.2 * 10.02 / 0.02)  # memory's rent, parked or not
    on_four = keep_alive(parse_spec({"gpu": {"count": 4}}, {}), Habits((), RESTORED)).seconds
    assert on_four == pytest.approx(2.4 * (4 + 10) / 4)


def test_the_shortest_keep_alive_is_the_shortest_that_frameworks_take_unless_the_user_wants_less():
    assert keep_alive(spec(), Habits((), (Wake(Rung.RESTORE, 0.085),))).seconds == LEAST_S
    assert keep_alive(spec(idle_max="2s"), Habits((), RESTORED)).seconds == 2.0


# Prewarming -----------------------------------------------------------------------------------------------------------

NIGHTLY = Habits(gaps(*[7200.0 + offset for offset in range(-20, 20, 2)]), (Wake(Rung.LOAD, 24.0),))


def test_callers_who_come_by_the_clock_find_it_awake():
    chosen = keep_alive(spec(), NIGHTLY, may_prewarm=True)
    assert chosen.prewarm is not None
    assert chosen.seconds < chosen.prewarm.after_s
    awake_s = chosen.prewarm.after_s + 24.0, chosen.prewarm.after_s + chosen.prewarm.for_s
    assert awake_s[0] <= 7190.0
    assert awake_s[1] >= 7210.0


def test_nobody_is_woken_on_the_last_gpu_or_for_callers_who_might_come_any_time():
    assert keep_alive(spec(), NIGHTLY, may_prewarm=False).prewarm is None
    any_time = Habits(gaps(*range(600, 20_000, 400)), (Wake(Rung.LOAD, 24.0),))
    assert keep_alive(spec(), any_time, may_prewarm=True).prewarm is None


def test_waiting_that_is_worth_nothing_is_not_prevented():
    assert keep_alive(spec(cold_price=0), NIGHTLY, may_prewarm=True).prewarm is None


# What it is learned from ----------------------------------------------------------------------------------------------


def test_a_gap_is_from_the_last_answer_to_the_next_request():
    history = History()
    assert not history.busy(5.0)  # the first request ends no gap
    history.idle(10.0)
    assert history.busy(70.0)
    history.idle(80.0)
    assert not history.busy(80.0 + LEAST_S)  # shorter than any keep-alive: it says nothing
    assert history.habits(100.0).gaps == (Gap(60.0, age_s=30.0),)


def test_a_wake_is_the_functions_own_time():
    phases = (
        Phase(PhaseName.GPU_WAIT, 0, 4 * 10**9),
        Phase(PhaseName.RESTORE, 4 * 10**9, 6 * 10**9),
        Phase(PhaseName.FIRST_RESPONSE, 6 * 10**9, 9 * 10**9),
    )
    record = StartRecord("f", "ns", "1", "r", Rung.RESTORE, 0, 9 * 10**9, phases)
    assert Wake.of(record) == Wake(Rung.RESTORE, 2.0)


def test_gaps_are_believed_from_ten_on():
    nine = Habits(gaps(*[80.0] * (ENOUGH_GAPS - 1)), RESTORED)
    assert keep_alive(spec(), nine).basis is Basis.PRIOR
    assert keep_alive(spec(), Habits((*nine.gaps, Gap(80.0)), RESTORED)).basis is Basis.LEARNED
