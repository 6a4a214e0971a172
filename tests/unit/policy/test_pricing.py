from decimal import Decimal

import pytest

from adapter.errors import ConfigError
from adapter.policy.pricing import PricePlan
from adapter.policy.report import report
from adapter.records import LeaseInterval, LeasePhase

PLAN = {
    "currency": "EUR",
    "classes": {
        "standard": {"per_gpu_second": 0.1, "per_replica_second": "0.00001", "billed": ["running", "idle"]},
        "spot": {"per_gpu_second": "0.03"},
    },
}
GPU_S = 10**9


def cost(plan, **changes):
    fields = {
        "id": "r:0", "function": "f", "namespace": "n", "revision": "1", "replica": "r", "tenant": "t",
        "price_class": "standard", "device": "GPU-1", "share": 1.0, "phase": LeasePhase.RUNNING,
        "started_at_ns": 0, "ended_at_ns": 3 * GPU_S,
    }  # fmt: skip
    (row,) = report([LeaseInterval(**(fields | changes))], [], plan, start_ns=0, end_ns=10**12, by=())
    return row.cost


def test_prices_are_exact():
    plan = PricePlan.parse(PLAN, "prices.yaml")
    assert plan.currency == "EUR"
    assert cost(plan) == Decimal("0.3")  # 0.1 * 3 as floats is 0.30000000000000004
    assert cost(plan, share=0.3) == Decimal("0.09")
    assert cost(plan, share=2.0) == Decimal("0.6")
    assert cost(plan, ended_at_ns=1) == Decimal("1e-10")


def test_a_replica_without_a_gpu_has_its_own_price():
    plan = PricePlan.parse(PLAN, "prices.yaml")
    assert cost(plan, device="cpu") == Decimal("0.00003")
    assert cost(plan, device="cpu", price_class="spot") == 0


def test_only_billed_phases_cost():
    plan = PricePlan.parse(PLAN, "prices.yaml")
    billed = {phase for phase in LeasePhase if cost(plan, phase=phase)}
    assert billed == {LeasePhase.RUNNING, LeasePhase.IDLE}
    unless_said = {phase for phase in LeasePhase if cost(plan, phase=phase, price_class="spot")}
    assert unless_said == set(LeasePhase) - {LeasePhase.PARKED}


def test_without_a_plan_everything_is_free():
    assert cost(PricePlan()) == 0


def test_whoever_names_a_class_that_the_plan_does_not_have_pays_the_standard_one():
    plan = PricePlan.parse(PLAN, "prices.yaml")
    assert cost(plan, price_class="unheard-of") == cost(plan, price_class="standard") > 0
    assert cost(plan, price_class="unheard-of", phase=LeasePhase.RESTORING) == 0
    without = PricePlan.parse({"classes": {"spot": PLAN["classes"]["spot"]}}, "prices.yaml")
    assert cost(without, price_class="unheard-of") == 0


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (None, "prices.yaml"),
        ([], "prices.yaml"),
        ("text", "prices.yaml"),
        ({}, "classes"),
        ({"classes": None}, "classes"),
        ({"classes": {}, "curency": "EUR"}, "curency"),
        ({"classes": {}, "currency": 5}, "currency"),
        ({"classes": {"a": 5}}, "classes.a"),
        ({"classes": {"a": {"per_second": 5}}}, "per_second"),
        ({"classes": {"a": {"per_gpu_second": -1}}}, "per_gpu_second"),
        ({"classes": {"a": {"per_gpu_second": "dear"}}}, "per_gpu_second"),
        ({"classes": {"a": {"per_gpu_second": True}}}, "per_gpu_second"),
        ({"classes": {"a": {"per_gpu_second": None}}}, "per_gpu_second"),
        ({"classes": {"a": {"per_gpu_second": float("nan")}}}, "per_gpu_second"),
        ({"classes": {"a": {"per_replica_second": float("inf")}}}, "per_replica_second"),
        ({"classes": {"a": {"per_replica_second": "0." + "1" * 40}}}, "per_replica_second"),
        ({"classes": {"a": {"per_replica_second": "1e999999"}}}, "per_replica_second"),
        ({"classes": {"a": {"billed": "running"}}}, "billed"),
        ({"classes": {"a": {"billed": ["asleep"]}}}, "billed"),
        ({"classes": {"a": {"billed": 5}}}, "billed"),
        ({"classes": {"a": {"billed": [["running"]]}}}, "billed"),
    ],
)
def test_a_plan_that_cannot_be_used_is_refused_by_its_key(data, named):
    with pytest.raises(ConfigError) as caught:
        PricePlan.parse(data, "prices.yaml")
    assert caught.value.message.startswith("prices.yaml")
    assert named in caught.value.message
    assert caught.value.hint
