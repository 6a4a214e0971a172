from dataclasses import replace

from adapter.policy.pricing import PricePlan
from adapter.policy.report import GPU_SECONDS, REPLICA_SECONDS, report
from adapter.records import LeaseInterval, LeasePhase, Rung, StartRecord


def lease(
    n, phase=LeasePhase.RUNNING, *, replica="r", function="embed", tenant="acme", device="GPU-1", share=1.0, length=10
):
    return LeaseInterval(
        id=f"{replica}:{n}", function=function, namespace="ns", revision="1", replica=replica, tenant=tenant,
        price_class="standard", device=device, share=share, phase=phase, started_at_ns=n * 10, ended_at_ns=n * 10 + length,
    )  # fmt: skip


def start(at_ns, *, replica="r", function="embed", error=""):
    return StartRecord(
        function=function, namespace="ns", revision="1", replica=replica, rung=Rung.LOAD, started_at_ns=at_ns,
        total_ns=1, phases=(), error=error,
    )  # fmt: skip


def rows(leases, starts=(), *, start_ns=0, end_ns=1000, by=("function",)):
    return report(leases, starts, PricePlan(), start_ns=start_ns, end_ns=end_ns, by=by)


def test_intervals_are_cut_at_the_borders():
    (row,) = rows([lease(0, length=100)], start_ns=30, end_ns=70)
    assert row.allocated_ns == 40


def test_what_only_touches_the_range_is_not_in_it():
    assert rows([lease(0), lease(3)], start_ns=10, end_ns=30) == []


def test_parked_time_is_shown_but_not_allocated():
    (row,) = rows([lease(0), lease(1, LeasePhase.IDLE), lease(2, LeasePhase.PARKED)])
    assert row.phase_ns == {LeasePhase.RUNNING: 10, LeasePhase.IDLE: 10, LeasePhase.PARKED: 10}
    assert (row.allocated_ns, row.busy_ratio) == (20, 0.5)


def test_half_a_gpu_counts_half_and_two_count_twice():
    (row,) = rows([lease(0, share=0.5), lease(1, share=2.0, replica="s")])
    assert row.allocated_ns == 25


def test_gpu_seconds_and_replica_seconds_are_never_added_up():
    found = rows([lease(0), lease(1, device="cpu", replica="s")])
    assert [(r.unit, r.allocated_ns) for r in found] == [(GPU_SECONDS, 10), (REPLICA_SECONDS, 10)]


def test_starts_are_counted_in_the_groups_of_their_replicas():
    (acme, other) = rows(
        [lease(0), lease(0, tenant="other", replica="s")],
        [start(5), start(6, replica="s"), start(7, replica="s", error="broken")],
        by=("tenant",),
    )
    assert (acme.group, acme.starts, acme.failed_starts) == (("acme",), 1, 0)
    assert (other.group, other.starts, other.failed_starts) == (("other",), 1, 1)


def test_a_start_that_left_no_interval_is_counted_where_its_function_is():
    (row,) = rows([lease(0)], [start(5, replica="gone", error="broken")])
    assert (row.unit, row.failed_starts) == (GPU_SECONDS, 1)
    (row,) = rows([], [start(5, replica="gone", error="broken")])
    assert (row.group, row.failed_starts, row.allocated_ns, row.busy_ratio) == (("embed",), 1, 0, 0.0)


def test_starts_outside_the_range_are_not_counted():
    (row,) = rows([lease(0, length=100)], [start(9), start(10), start(19), start(20)], start_ns=10, end_ns=20)
    assert row.starts == 2


def test_starts_belong_to_no_phase():
    found = rows([lease(0), lease(1, LeasePhase.IDLE)], [start(5)], by=("phase", "function"))
    assert [(r.group, r.starts) for r in found] == [(("idle", "embed"), 0), (("running", "embed"), 0)]


def test_a_row_names_the_gpus_that_were_held():
    held = [replace(lease(n), gpu_model=model) for n, model in enumerate(("NVIDIA L4", "NVIDIA H100", ""))]
    (row,) = rows(held)
    assert row.gpu_models == {"NVIDIA L4", "NVIDIA H100"}
    assert [r.group for r in rows(held, by=("gpu_model",))] == [("",), ("NVIDIA H100",), ("NVIDIA L4",)]
