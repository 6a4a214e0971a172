"""What a ledger promises, on every database it can live in.

PostgreSQL takes part where it is installed; see `conftest.py`.
"""

from __future__ import annotations

import logging
import random
import threading
import tracemalloc
import uuid
from contextlib import closing
from dataclasses import replace
from decimal import Decimal

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings, strategies as st

from adapter.errors import LedgerError
from adapter.ledger import schema
from adapter.ledger.store import Ledger
from adapter.policy.activity import Run
from adapter.policy.pricing import PriceClass, PricePlan
from adapter.policy.report import GROUPS, report
from adapter.records import DeviceInterval, LeaseInterval, LeasePhase, Phase, PhaseName, Rung, SkippedRung, StartRecord


def interval(n, *, replica="embed-1", function="embed", **changes):
    base = LeaseInterval(
        id=f"{replica}:{n}", function=function, namespace="openfaas-fn", revision="1", replica=replica, tenant="default",
        price_class="standard", device="GPU-5b1f", share=0.3, phase=LeasePhase.IDLE,
        started_at_ns=1_700_000_000_000_000_000 + n * 10, ended_at_ns=1_700_000_000_000_000_010 + n * 10,
    )  # fmt: skip
    return replace(base, **changes)


def start(n, *, function="embed", **changes):
    base = StartRecord(
        function=function, namespace="openfaas-fn", revision="1", replica=f"{function}-{n}", rung=Rung.LOAD,
        started_at_ns=1_700_000_000_000_000_000 + n, total_ns=10**9, phases=(Phase(PhaseName.LOAD, 0, 10**9),),
        skipped=(SkippedRung(Rung.RESTORE, "none", "no „snapshot“ yet"),), held_requests=3,
    )  # fmt: skip
    return replace(base, **changes)


ALWAYS = (0, 2**62)


def test_what_goes_in_comes_out(ledger):
    intervals = [interval(n, phase=phase) for n, phase in enumerate(LeasePhase)]
    assert ledger.add_intervals(intervals) == len(intervals)
    ledger.add_start(start(1))
    assert ledger.intervals(*ALWAYS) == intervals
    assert ledger.starts() == [start(1)]


def test_it_outlives_the_process_that_wrote_it(url, ledger):
    ledger.add_intervals([interval(0)])
    ledger.add_start(start(0))
    ledger.close()
    again = Ledger.open(url)
    assert (again.intervals(*ALWAYS), again.starts()) == ([interval(0)], [start(0)])
    again.close()


def test_a_range_excludes_what_only_touches_it(ledger):
    ledger.add_intervals([interval(n) for n in range(4)])
    first = interval(0).started_at_ns
    assert ledger.intervals(first + 10, first + 20) == [interval(1)]
    assert ledger.intervals(first + 15, first + 21) == [interval(1), interval(2)]
    assert ledger.intervals(first - 10, first) == []


def test_intervals_of_one_function(ledger):
    ledger.add_intervals([interval(0), interval(0, replica="x-1", function="x")])
    assert [i.function for i in ledger.intervals(*ALWAYS, function="x")] == ["x"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    steps=st.lists(st.tuples(st.sampled_from(LeasePhase), st.integers(1, 50)), min_size=1, max_size=12), data=st.data()
)
def test_reports_of_a_summary_are_reports_of_the_intervals(ledger, steps, data):
    name, at_ns, facts = f"embed-{uuid.uuid4().hex}", 1_700_000_000_000_000_000, []
    for n, (phase, length) in enumerate(steps):
        facts.append(interval(n, replica=name, phase=phase, started_at_ns=at_ns, ended_at_ns=at_ns + length))
        at_ns += length
    ledger.add_intervals(facts)
    low = facts[0].started_at_ns - 1
    start_ns, end_ns = sorted(data.draw(st.lists(st.integers(low, at_ns + 1), min_size=2, max_size=2, unique=True)))
    plan = PricePlan("EUR", {"standard": PriceClass(per_gpu_second=Decimal("0.5"))})
    options = {"start_ns": start_ns, "end_ns": end_ns, "by": GROUPS}
    summary = [i for i in ledger.summary(start_ns, end_ns) if i.replica == name]
    assert report(summary, [], plan, **options) == report(facts, [], plan, **options)
    assert len({i.phase for i in summary}) == len(summary)


def test_starts_come_newest_first_and_can_be_narrowed(ledger):
    for record in (start(1), start(3), start(2, function="x"), start(4, namespace="other")):
        ledger.add_start(record)
    assert [s.replica for s in ledger.starts()] == ["embed-4", "embed-3", "x-2", "embed-1"]
    assert [s.replica for s in ledger.starts("embed", "openfaas-fn")] == ["embed-3", "embed-1"]
    assert [s.replica for s in ledger.starts(limit=2)] == ["embed-4", "embed-3"]
    assert [s.replica for s in ledger.starts(since_ns=start(3).started_at_ns)] == ["embed-4", "embed-3"]
    assert len(ledger.starts(limit=None)) == 4


def test_one_replica_may_start_more_than_once(ledger):
    ledger.add_start(start(1))
    ledger.add_start(start(1, started_at_ns=start(1).started_at_ns + 5, rung=Rung.RESUME))
    assert [s.rung for s in ledger.starts()] == [Rung.RESUME, Rung.LOAD]


def test_a_repeated_delivery_counts_once(ledger, caplog):
    assert ledger.add_intervals([interval(0), interval(1)]) == 2
    assert ledger.add_intervals([interval(1), interval(2), interval(1)]) == 1
    ledger.add_start(start(1))
    ledger.add_start(start(1))
    assert ledger.intervals(*ALWAYS) == [interval(0), interval(1), interval(2)]
    assert ledger.starts() == [start(1)]
    assert not caplog.records


def test_a_repeated_id_with_other_values_is_kept_out_and_logged(ledger, caplog):
    ledger.add_intervals([interval(0)])
    assert ledger.add_intervals([interval(0, share=1.0), interval(1)]) == 1
    ledger.add_start(start(1))
    ledger.add_start(start(1, total_ns=5))
    assert ledger.intervals(*ALWAYS) == [interval(0), interval(1)]
    assert ledger.starts() == [start(1)]
    assert [r.levelno for r in caplog.records] == [logging.ERROR] * 2
    assert caplog.records[0].fields == {"key": ("embed-1:0",)}


def test_an_interval_without_length_does_not_hold_up_the_rest(ledger, caplog):
    bad = interval(7, ended_at_ns=interval(7).started_at_ns)
    assert ledger.add_intervals([interval(0), bad, interval(1)]) == 2
    assert ledger.intervals(*ALWAYS) == [interval(0), interval(1)]
    assert len(caplog.records) == 1


def test_nothing_to_add_is_fine(ledger):
    assert ledger.add_intervals([]) == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data())
def test_duplicates_and_reordering_change_nothing(ledger, data):
    replica = f"embed-{uuid.uuid4().hex}"
    facts = [interval(n, replica=replica) for n in range(data.draw(st.integers(1, 8)))]
    deliveries = facts + data.draw(st.lists(st.sampled_from(facts), max_size=8))
    deliveries = data.draw(st.permutations(deliveries))
    cut = data.draw(st.integers(0, len(deliveries)))
    new = ledger.add_intervals(deliveries[:cut]) + ledger.add_intervals(deliveries[cut:])
    assert new == len(facts)
    assert [i for i in ledger.intervals(*ALWAYS) if i.replica == replica] == facts


def test_many_threads_and_two_ledgers_may_write_at_once(url, ledger):
    other = Ledger.open(url)
    facts = [interval(n, replica=f"embed-{n % 5}") for n in range(60)]

    def write(into, seed):
        for fact in random.Random(seed).sample(facts, len(facts)):
            into.add_intervals([fact])
            into.intervals(fact.started_at_ns, fact.ended_at_ns)

    threads = [threading.Thread(target=write, args=(into, n)) for n, into in enumerate((ledger, other) * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.intervals(*ALWAYS) == sorted(facts, key=lambda i: (i.started_at_ns, i.id))
    other.close()


def test_many_may_open_it_for_the_first_time_at_once(url):
    ledgers = []
    threads = [threading.Thread(target=lambda: ledgers.append(Ledger.open(url))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledgers) == 6
    for ledger in ledgers:
        ledger.close()


def test_one_that_a_newer_gpufn_wrote_is_refused(url, ledger):
    with ledger._engine.begin() as connection:
        connection.exec_driver_sql(f"INSERT INTO schema_version VALUES ({schema.VERSION + 1})")
    with pytest.raises(LedgerError) as caught:
        Ledger.open(url)
    assert caught.value.code == "ledger-too-new"
    assert caught.value.hint


def test_an_older_one_gets_the_steps_it_lacks(url, ledger, monkeypatch):
    ledger.add_intervals([interval(0)])
    monkeypatch.setattr(
        schema, "STEPS", (*schema.STEPS, ("CREATE TABLE later (x TEXT)", "INSERT INTO later VALUES ('y')"))
    )
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    for _ in range(2):
        again = Ledger.open(url)
        with again._engine.begin() as connection:
            assert connection.exec_driver_sql("SELECT x FROM later").scalars().all() == ["y"]
        assert again.intervals(*ALWAYS) == [interval(0)]
        again.close()


def test_a_step_that_fails_leaves_nothing_of_itself(url, ledger, monkeypatch):
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, ("CREATE TABLE later (x TEXT)", "no such statement")))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    with pytest.raises(LedgerError):
        Ledger.open(url)
    assert "later" not in sa.inspect(ledger._engine).get_table_names()
    ledger.add_intervals([interval(0)])


def test_tables_and_steps_say_the_same(ledger):
    seen = sa.inspect(ledger._engine)
    for table in schema.metadata.tables.values():
        columns = {c["name"]: (str(c["type"]).split("(")[0], c["nullable"]) for c in seen.get_columns(table.name)}
        dialect = ledger._engine.dialect
        assert list(columns) == [c.name for c in table.columns]
        for column in table.columns:
            assert columns[column.name][0] in {str(column.type.compile(dialect)), "DOUBLE PRECISION", "REAL"}
        keys = seen.get_pk_constraint(table.name)["constrained_columns"]
        assert keys == [c.name for c in table.primary_key]


def test_a_record_of_another_version_hides_no_others(ledger, caplog):
    ledger.add_start(start(1))
    with ledger._engine.begin() as connection:
        row = {"replica": "x", "started_at_ns": 5, "function": "x", "namespace": "y", "record": '{"version": 99}'}
        connection.execute(schema.STARTS.insert().values(row))
    assert ledger.starts() == [start(1)]
    assert len(caplog.records) == 1


def device(n, **changes):
    base = DeviceInterval(
        id=f"node-1/GPU-5b1f:{n}", node="node-1", device="GPU-5b1f", model="H100", held_ns=3, others_ns=0,
        started_at_ns=1_700_000_000_000_000_000 + n * 10, ended_at_ns=1_700_000_000_000_000_010 + n * 10,
    )  # fmt: skip
    return replace(base, **changes)


def test_when_devices_were_there_goes_in_and_comes_out(ledger):
    assert ledger.add([interval(0)], [start(1)], [device(1), device(0)]) == 4
    assert ledger.add([interval(0)], [start(1)], [device(1), device(0, held_ns=9), device(2)]) == 1
    assert ledger.devices(*ALWAYS) == [device(0), device(1), device(2)]
    assert ledger.devices(device(0).ended_at_ns, device(2).started_at_ns) == [device(1)]


def test_what_is_added_together_is_there_whole_or_not_at_all(ledger):
    with pytest.raises(LedgerError):
        ledger.add([interval(0)], [], [device(0, model=None)])
    assert ledger.intervals(*ALWAYS) == []


def test_intervals_can_be_narrowed(ledger):
    facts = [
        interval(0),
        interval(1, namespace="other"),
        interval(2, phase=LeasePhase.RUNNING),
        interval(3, device="cpu"),
    ]
    ledger.add_intervals(facts)
    assert ledger.intervals(*ALWAYS, namespace="other") == [facts[1]]
    assert ledger.intervals(*ALWAYS, phase=LeasePhase.RUNNING) == [facts[2]]
    assert ledger.intervals(*ALWAYS, on_gpus=True) == facts[:3]
    assert ledger.intervals(*ALWAYS, limit=2) == facts[:2]


def test_runs_are_told_without_having_all_of_them_in_memory(ledger):
    ledger.add_intervals([interval(n, phase=LeasePhase.RUNNING) for n in range(6000)])
    ledger.add_intervals([interval(6000)])

    def peak_of(read):
        tracemalloc.start()
        number = read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert number == 6000
        return peak

    with closing(ledger.runs(*ALWAYS)) as runs:
        assert next(runs) == Run("openfaas-fn", "embed", interval(0).started_at_ns, interval(0).ended_at_ns)
    streamed = peak_of(lambda: sum(1 for _ in ledger.runs(*ALWAYS)))
    assert streamed < peak_of(lambda: len(list(ledger.runs(*ALWAYS)))) / 3
