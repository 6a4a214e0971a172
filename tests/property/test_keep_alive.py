"""Keep-alive over everything that may happen: never much worse than hindsight, and never restless."""

import itertools
import math
import random

from hypothesis import assume, given, settings, strategies as st

from adapter.policy.keep_alive import ENOUGH_GAPS, LEAST_S, TRUST, Basis, Gap, Habits, History, Wake, keep_alive
from adapter.records import Rung
from adapter.spec import parse_spec

SLACK = 1.25
"""How far what is set may lie outside of the bounds before it is changed."""

GAPS = st.floats(0.01, 100_000.0)
WAKES = st.floats(0.05, 300.0)
PRICES = st.sampled_from((0.0, 1.0, 10.0, 500.0))


def spec(price=10.0, idle_max="720h", park="0s"):
    return parse_spec({"gpu": {"count": 1}, "scale": {"cold_price": price, "idle_max": idle_max, "park": park}}, {})


def habits(gaps, *wakes_s, rung=Rung.RESTORE, parks=False):
    return Habits(tuple(Gap(seconds) for seconds in gaps), tuple(Wake(rung, s) for s in wakes_s), parks)


def rent(idle_s, park_s=math.inf, resume=0.0):
    return idle_s if idle_s <= park_s else park_s + resume + 0.02 * (idle_s - park_s)


@given(st.lists(GAPS, min_size=1, max_size=60), WAKES, PRICES, st.sampled_from(("0s", "10s", "60s")))
def test_whatever_comes_it_costs_a_known_factor_of_what_hindsight_would(gaps, wake_s, price, park):
    """The competitive ratio, over any sequence of gaps, of the decisions as they were made one after the other."""
    parks, park_s = park != "0s", float(park[:-1]) or math.inf
    wake, resume = wake_s * (1 + price), 0.5 * (1 + price)
    history = History(parks)
    history.woke(Wake(Rung.RESTORE, wake_s))
    now_s, set_s, paid, hindsight = 0.0, None, 0.0, 0.0
    for gap_s in gaps:
        history.idle(now_s)
        set_s = keep_alive(spec(price, park=park), history.habits(now_s), current_s=set_s).seconds
        kept = rent(gap_s, park_s, resume) if gap_s <= set_s else rent(set_s, park_s, resume) + wake
        paid += kept
        hindsight += min(rent(gap_s, park_s, resume), wake)
        now_s += gap_s
        history.busy(now_s)
        now_s += 1.0
    least = rent(LEAST_S, park_s, resume) / wake  # where a wake costs less than the shortest keep-alive
    assert paid <= (1 + max(TRUST * SLACK, least)) * hindsight * (1 + 1e-9) + (resume if parks else 0.0) * len(gaps)


@given(st.lists(GAPS, max_size=ENOUGH_GAPS - 1), WAKES, PRICES)
def test_what_is_not_known_yet_costs_twice_hindsight_at_most(gaps, wake_s, price):
    wake = wake_s * (1 + price)
    assume(LEAST_S <= wake <= 720 * 3600)
    chosen = keep_alive(spec(price), habits(gaps, wake_s))
    assert chosen.basis is Basis.PRIOR
    assert math.isclose(chosen.seconds, wake)


@given(st.lists(GAPS, max_size=60), WAKES, st.lists(st.floats(0, 10_000), min_size=2, max_size=2), st.booleans())
def test_who_pays_more_for_a_cold_second_is_never_kept_shorter(gaps, wake_s, prices, parks):
    known = habits(gaps, wake_s, parks=parks)
    cheap, dear = (keep_alive(spec(price, park="60s"), known).seconds for price in sorted(prices))
    assert cheap <= dear * (1 + 1e-9)


@given(st.lists(GAPS, max_size=60), WAKES, PRICES, st.floats(1.0, 86400.0), st.none() | GAPS, st.booleans())
def test_it_is_within_its_bounds_and_says_why(gaps, wake_s, price, idle_max_s, current_s, parks):
    asked = spec(price, f"{idle_max_s:.3f}s", "60s")
    chosen = keep_alive(asked, habits(gaps, wake_s, parks=parks), current_s=current_s, may_prewarm=True)
    assert min(LEAST_S, asked.idle_max_s) <= chosen.seconds <= asked.idle_max_s
    assert "cold start takes" in chosen.reason
    assert chosen == keep_alive(asked, habits(gaps, wake_s, parks=parks), current_s=current_s, may_prewarm=True)
    if chosen.prewarm:
        assert chosen.prewarm.after_s > chosen.seconds
        assert chosen.prewarm.for_s > wake_s


@given(st.lists(GAPS, min_size=2, max_size=60), WAKES, PRICES, st.randoms())
def test_the_order_of_gaps_does_not_matter_and_neither_does_deciding_again(gaps, wake_s, price, rng):
    first = keep_alive(spec(price), habits(gaps, wake_s))
    shuffled = habits(rng.sample(gaps, len(gaps)), wake_s)
    assert math.isclose(keep_alive(spec(price), shuffled).seconds, first.seconds)
    assert keep_alive(spec(price), shuffled, current_s=first.seconds).seconds == first.seconds


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from((0.02, 0.2, 5.0, 50.0)))
def test_of_memoryless_callers_it_is_all_or_nothing(seed, gaps_a_wake):
    """Where gaps have no memory waiting longer never teaches anything: kept throughout, or let go at once."""
    rng, wake = random.Random(seed), 40.0 * 11
    gaps = [rng.expovariate(gaps_a_wake / wake) for _ in range(250)]
    chosen = keep_alive(spec(), habits([gap for gap in gaps if gap > LEAST_S], 40.0))
    cost = sum(gap if gap <= chosen.seconds else chosen.seconds + wake for gap in gaps)
    always, never = sum(gaps), sum(LEAST_S + wake if gap > LEAST_S else gap for gap in gaps)
    if gaps_a_wake > 1:
        assert cost <= 1.1 * always
    else:
        assert chosen.seconds <= 1.5 * wake / TRUST
        assert cost <= (1 + 1 / TRUST + 0.1) * never


@settings(max_examples=12)
@given(st.integers(0, 2**32), st.sampled_from(("memoryless", "regular", "sessions")), st.booleans())
def test_while_callers_stay_the_same_it_hardly_ever_changes(seed, callers, has_jitter):
    """Each change is a write on a cluster: after it has learned, a few in hundreds of gaps."""
    rng, history, now_s, set_s, changes = random.Random(seed), History(), 0.0, None, 0
    for count in range(450):
        gap_s = {
            "memoryless": lambda: rng.expovariate(1 / 100),
            "regular": lambda: rng.gauss(60, 3),
            "sessions": lambda: rng.choice([rng.expovariate(1 / 20)] * 4 + [rng.expovariate(1 / 3000)]),
        }[callers]()
        history.woke(Wake(Rung.RESTORE, 8.0 * (rng.uniform(0.9, 1.1) if has_jitter else 1)))
        history.idle(now_s)
        now_s += max(0.1, gap_s)
        history.busy(now_s)
        now_s += 5.0
        before, set_s = set_s, keep_alive(spec(), history.habits(now_s), current_s=set_s).seconds
        changes += count >= 200 and before != set_s
    assert changes <= 7


@given(st.integers(1, 40), st.floats(900.0, 3000.0))
def test_time_forgets(old, gap_s):
    """Callers of a month ago who came back soon do not outvote those of today, who do not."""
    past = tuple(Gap(gap_s, age_s=30 * 86400.0) for _ in range(old))
    today = tuple(Gap(gap_s * 50, age_s=60.0) for _ in range(20))
    wakes = (Wake(Rung.LOAD, 300.0),)
    assert keep_alive(spec(), Habits(past, wakes)).seconds >= gap_s or old < ENOUGH_GAPS
    assert keep_alive(spec(), Habits(past + today, wakes)).seconds == 300.0 * 11 / TRUST


def test_a_long_history_is_bounded():
    history, now_s = History(), itertools.count(step=10.0)
    for at_s in itertools.islice(now_s, 5000):
        history.busy(at_s)
        history.idle(at_s)
        history.woke(Wake(Rung.RESTORE, 1.0))
    known = history.habits(50_000.0)
    assert len(known.gaps) <= 256
    assert len(known.wakes) <= 15
