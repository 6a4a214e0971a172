"""What is known of traffic: asked for in pieces that overlap, kept while the ledger is down."""

import asyncio

import pytest
from hypothesis import given, strategies as st

from adapter.errors import Unavailable
from adapter.ledger.traffic import LedgerTraffic, joined
from adapter.policy.activity import Activity, Run, activity
from adapter.records import Rung

S = 10**9


def did(*busy, **wakes):
    wakes_s = {Rung(rung): seconds for rung, seconds in wakes.items()}
    return Activity("f", "ns", tuple((a * S, b * S) for a, b in busy), wakes_s)


class Ledger:
    """Answers as it is told to; `asked` are the times since when it was asked."""

    def __init__(self):
        self.asked, self.now_s = [], 10_000_000.0
        self.answer = []

    async def ask(self, since_ns):
        self.asked.append(since_ns)
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def traffic(self):
        return LedgerTraffic(self.ask, clock=lambda: self.now_s, clock_ns=lambda: int(self.now_s * S))


@pytest.fixture
def ledger():
    return Ledger()


def test_many_who_want_to_know_ask_once(ledger):
    traffic = ledger.traffic()

    async def all_at_once():
        await asyncio.gather(*(traffic.of("ns", f"f{n}") for n in range(20)))

    asyncio.run(all_at_once())
    assert len(ledger.asked) == 1


def test_the_next_question_is_for_what_is_new_and_what_came_late(ledger):
    traffic = ledger.traffic()
    asyncio.run(traffic.of("ns", "f"))
    first_s = ledger.now_s
    ledger.now_s += 60
    asyncio.run(traffic.of("ns", "f"))
    assert ledger.asked[0] == (first_s - 2 * 86400) * S
    assert ledger.asked[1] == (first_s - 15 * 60) * S


def test_while_the_ledger_is_down_what_it_said_stays_and_is_soon_not_fresh(ledger):
    traffic = ledger.traffic()
    assert not traffic.is_fresh
    ledger.answer = [did((1, 2))]
    assert asyncio.run(traffic.of("ns", "f")) == did((1, 2))
    assert traffic.is_fresh
    ledger.answer = Unavailable("The ledger does not answer.")
    ledger.now_s += 301
    assert asyncio.run(traffic.of("ns", "f")) == did((1, 2))
    assert not traffic.is_fresh
    ledger.answer = []
    ledger.now_s += 31
    assert asyncio.run(traffic.of("ns", "f")) == did((1, 2))
    assert traffic.is_fresh


def test_a_function_of_which_nothing_is_said_for_a_week_is_forgotten(ledger):
    traffic = ledger.traffic()
    ledger.answer = [did((1, 2))]
    asyncio.run(traffic.of("ns", "f"))
    ledger.answer = []
    ledger.now_s += 6 * 86400
    assert asyncio.run(traffic.of("ns", "f")) == did((1, 2))
    ledger.now_s += 2 * 86400
    assert asyncio.run(traffic.of("ns", "f")) is None


def test_what_was_missed_while_it_was_down_is_asked_for_afterwards(ledger):
    traffic = ledger.traffic()
    asyncio.run(traffic.of("ns", "f"))
    answered_s = ledger.now_s
    ledger.answer = Unavailable("down")
    for _ in range(3):
        ledger.now_s += 3600
        asyncio.run(traffic.of("ns", "f"))
    assert ledger.asked[-1] == (answered_s - 15 * 60) * S


def test_wakes_that_are_told_of_twice_count_once():
    found = joined(did(load=(3.0, 2.0, 1.0)), did(load=(5.0, 4.0, 3.0, 2.0)))
    assert found.wakes_s == {Rung.LOAD: (5.0, 4.0, 3.0, 2.0)}
    assert joined(did(load=(3.0,)), did(restore=(0.5,))).wakes_s == {Rung.LOAD: (3.0,), Rung.RESTORE: (0.5,)}


def test_a_busy_time_that_goes_on_is_one():
    assert joined(did((0, 10), (100, 110)), did((105, 130))).busy == did((0, 10), (100, 130)).busy


TIMES = st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 60)), max_size=20)


@given(TIMES, st.lists(st.integers(0, 2000), min_size=1, max_size=4))
def test_in_pieces_or_at_once_the_same_is_known(times, cuts):
    runs = [Run("ns", "f", begin * S, (begin + length) * S) for begin, length in sorted(times)]
    known, told_s = None, 0
    for now_s in [*sorted(cuts), 3000]:  # each answer has what ended since a while before the one before it
        piece = activity([run for run in runs if (told_s - 100) * S < run.ended_at_ns <= now_s * S], [])
        known, told_s = (joined(known, piece[0]) if piece else known), now_s
    assert ([known] if known else []) == activity(runs, [])
