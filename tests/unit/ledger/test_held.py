import asyncio

import pytest

from adapter.errors import Unavailable
from adapter.ledger.held import LOOK_S, HeldToday
from adapter.policy.budget import BudgetState, utc_day
from tests.fakes.virtual_time import in_virtual_time

NOON = utc_day(1_800_000_000 * 10**9)[0] + 12 * 3600 * 10**9


class Ledger:
    """It says `answer`, or raises it, after `takes_s`."""

    def __init__(self, answer, takes_s=0.0):
        self.answer, self.takes_s, self.asked = answer, takes_s, []

    async def ask(self, start_ns, end_ns):
        loop = asyncio.get_running_loop()
        self.asked.append((loop.time(), start_ns, end_ns))
        await asyncio.sleep(self.takes_s)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def held(self):
        loop = asyncio.get_running_loop()
        began = loop.time()
        return HeldToday(self.ask, clock=loop.time, clock_ns=lambda: NOON + int((loop.time() - began) * 1e9))


def at(held, seconds):
    return held.budget("fn.team", 100.0).state(NOON + int(seconds * 1e9))


def test_it_is_asked_for_the_utc_day_and_known_until_that_is_over():
    ledger = Ledger({"fn.team": 100.0})

    async def scene():
        held = ledger.held()
        assert at(held, 0) is BudgetState.OPEN
        await held.look()
        assert (held.is_known, at(held, 0), at(held, 12 * 3600)) == (True, BudgetState.SPENT, BudgetState.OPEN)

    in_virtual_time(scene())
    assert [day for _, *day in ledger.asked] == [list(utc_day(NOON))]


def test_many_who_look_at_once_ask_once_and_a_slow_ledger_rests():
    ledger = Ledger({}, takes_s=2.0)

    async def scene():
        held = ledger.held()
        await asyncio.gather(*(held.look() for _ in range(5)))
        await asyncio.sleep(39)
        await held.look()
        assert len(ledger.asked) == 1
        await asyncio.sleep(2)
        await held.look()
        assert len(ledger.asked) == 2

    in_virtual_time(scene())


@pytest.mark.parametrize("problem", [Unavailable("It is away."), ValueError("a defect")])
def test_while_the_ledger_is_away_only_what_was_spent_stays_and_the_log_says_so_once(problem, caplog):
    ledger = Ledger({"fn.team": 120.0})

    async def scene():
        held = ledger.held()
        await held.look()
        ledger.answer, ledger.takes_s = problem, 30.0
        for _ in range(3):
            await asyncio.sleep(LOOK_S)
            await held.look()
        assert len(ledger.asked) == 4
        assert not held.is_known
        assert at(held, 60) is BudgetState.SPENT
        assert held.budget("other.team", 100.0).state(NOON) is BudgetState.OPEN
        ledger.answer = {}
        await asyncio.sleep(LOOK_S)
        await held.look()
        assert held.is_known

    in_virtual_time(scene())
    assert len([r for r in caplog.records if r.message.startswith("the ledger does not tell")]) == 1


def test_it_is_looked_at_once_and_then_while_somebody_wants_it_and_a_while_longer():
    ledger, wanted = Ledger(Unavailable("Not yet.")), [False]

    async def scene():
        watching = asyncio.ensure_future(ledger.held().watch(lambda: wanted[0]))
        await asyncio.sleep(3600)
        assert len(ledger.asked) == pytest.approx(3600 / LOOK_S, abs=2)  # until it has answered once
        ledger.answer = {}
        await asyncio.sleep(3600)
        ledger.asked.clear()
        await asyncio.sleep(3600)
        assert ledger.asked == []
        wanted[0] = True
        await asyncio.sleep(3600)
        assert len(ledger.asked) == pytest.approx(3600 / LOOK_S, abs=2)
        wanted[0] = False
        await asyncio.sleep(3600)
        assert len(ledger.asked) == pytest.approx(4200 / LOOK_S, abs=4)
        watching.cancel()

    in_virtual_time(scene())
