"""Reports keep every nanosecond and every digit of money, wherever ranges are cut."""

from decimal import Decimal
from itertools import pairwise

from hypothesis import given, strategies as st

from adapter.policy.pricing import PriceClass, PricePlan
from adapter.policy.report import GPU_SECONDS, GROUPS, REPLICA_SECONDS, report
from adapter.records import LeaseInterval, LeasePhase, Rung, StartRecord

NAMES = st.sampled_from(["a", "b"])
INSTANT = st.integers(0, 10**13)
GROUPING = st.lists(st.sampled_from(GROUPS), unique=True, max_size=4)
MONEY = st.decimals(0, 1000, places=9, allow_nan=False, allow_infinity=False)


@st.composite
def intervals(draw):
    found = []
    for n in range(draw(st.integers(0, 12))):
        start, length = draw(INSTANT), draw(st.integers(1, 10**12))
        found.append(
            LeaseInterval(
                id=f"r:{n}", function=draw(NAMES), namespace=draw(NAMES), revision="1", replica=draw(NAMES),
                tenant=draw(NAMES), price_class=draw(NAMES), device=draw(st.sampled_from(["cpu", "GPU-1"])),
                share=draw(st.sampled_from([1.0, 0.5, 0.3, 0.333, 2.0])), phase=draw(st.sampled_from(LeasePhase)),
                started_at_ns=start, ended_at_ns=start + length,
            )
        )  # fmt: skip
    return found


@st.composite
def starts(draw):
    return [
        StartRecord(
            function=draw(NAMES), namespace=draw(NAMES), revision="1", replica=draw(NAMES), rung=Rung.LOAD,
            started_at_ns=draw(INSTANT), total_ns=1, phases=(), error=draw(st.sampled_from(["", "broken"])),
        )
        for _ in range(draw(st.integers(0, 5)))
    ]  # fmt: skip


@st.composite
def plans(draw):
    phases = st.frozensets(st.sampled_from(LeasePhase))
    classes = draw(st.dictionaries(NAMES, st.builds(PriceClass, MONEY, MONEY, phases), max_size=2))
    return PricePlan("EUR", classes)


RANGE = st.lists(INSTANT, min_size=2, max_size=6, unique=True).map(sorted)


def totals(rows):
    """Everything of a report, by its rows' groups."""
    found = {}
    for row in rows:
        there = found.setdefault((row.group, row.unit), [{}, Decimal(0), 0, 0])
        for phase, ns in row.phase_ns.items():
            there[0][phase] = there[0].get(phase, 0) + ns
        there[1] += row.cost
        there[2] += row.starts
        there[3] += row.failed_starts
    return found


@given(intervals(), starts(), plans(), RANGE, GROUPING)
def test_adjoining_ranges_add_up_to_the_whole(leases, records, plan, cuts, by):
    # A start's tenant is known from intervals of its replica in the same range: not what is tested here.
    by = [name for name in by if name in ("function", "namespace", "phase")]
    records = [] if any(i.device != "cpu" for i in leases) else records
    leases = [i for i in leases if all(r.replica != i.replica for r in records)]
    parts = [
        row for start, end in pairwise(cuts) for row in report(leases, records, plan, start_ns=start, end_ns=end, by=by)
    ]
    whole = report(leases, records, plan, start_ns=cuts[0], end_ns=cuts[-1], by=by)
    assert totals(parts) == totals(whole)


@given(intervals(), starts(), plans(), RANGE, GROUPING)
def test_groups_are_a_partition(leases, records, plan, cuts, by):
    whole = report(leases, records, plan, start_ns=cuts[0], end_ns=cuts[-1], by=())
    rows = report(leases, records, plan, start_ns=cuts[0], end_ns=cuts[-1], by=by)
    assert len({(row.group, row.unit) for row in rows}) == len(rows)
    for unit in (GPU_SECONDS, REPLICA_SECONDS):
        of_unit = [row for row in rows if row.unit == unit]
        of_whole = [row for row in whole if row.unit == unit]
        assert sum(r.allocated_ns for r in of_unit) == sum(r.allocated_ns for r in of_whole)
        assert sum(r.cost for r in of_unit) == sum(r.cost for r in of_whole)
    if "phase" not in by:
        for name in ("starts", "failed_starts"):
            assert sum(getattr(row, name) for row in rows) == sum(getattr(row, name) for row in whole)


@given(intervals(), RANGE, st.randoms())
def test_delivery_order_does_not_matter(leases, cuts, random):
    first = report(leases, [], PricePlan(), start_ns=cuts[0], end_ns=cuts[-1], by=("function", "phase"))
    shuffled = random.sample(leases, len(leases))
    assert report(shuffled, [], PricePlan(), start_ns=cuts[0], end_ns=cuts[-1], by=("function", "phase")) == first


@given(intervals(), plans(), RANGE, GROUPING)
def test_shares_are_ratios_and_costs_are_not_negative(leases, plan, cuts, by):
    for row in report(leases, [], plan, start_ns=cuts[0], end_ns=cuts[-1], by=by):
        assert 0 <= row.busy_ratio <= 1
        assert row.cost >= 0
        assert row.allocated_ns + row.phase_ns.get(LeasePhase.PARKED, 0) == sum(row.phase_ns.values())
