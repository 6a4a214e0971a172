import pytest

from adapter.policy.node_terms import NodeTerms, Requirement, Taint, Toleration, untolerated

LABELS = {"zone": "a", "gpus": "8", "empty": ""}


@pytest.mark.parametrize(
    ("key", "operator", "values", "holds"),
    [
        ("zone", "In", ("a", "b"), True), ("zone", "In", ("b",), False), ("none", "In", ("",), False),
        ("zone", "NotIn", ("b",), True), ("zone", "NotIn", ("a",), False), ("none", "NotIn", ("a",), True),
        ("empty", "Exists", (), True), ("none", "Exists", (), False),
        ("none", "DoesNotExist", (), True), ("zone", "DoesNotExist", (), False),
        ("gpus", "Gt", ("4",), True), ("gpus", "Gt", ("8",), False), ("gpus", "Lt", ("9",), True), ("zone", "Gt", ("1",), False),
        ("gpus", "Gt", (), False), ("zone", "Like", ("a",), False),
    ],
)  # fmt: skip
def test_conditions_hold_as_in_kubernetes(key, operator, values, holds):
    assert Requirement(key, operator, values).holds(LABELS) is holds


def test_all_of_a_selector_and_one_alternative_must_hold():
    zone, disk = Requirement("zone", "In", ("a",)), Requirement("disk", "Exists")
    assert NodeTerms((zone,), ((disk, zone), (zone,))).missing(LABELS) == ""
    assert NodeTerms((zone, disk)).missing(LABELS) == "disk is there"
    assert NodeTerms((), ((disk,), (zone, disk))).missing(LABELS) == "disk is there or zone is a and disk is there"


def test_an_alternative_without_conditions_matches_no_node():
    assert NodeTerms((), ((),)).missing(LABELS)


@pytest.mark.parametrize(
    ("toleration", "tolerates"),
    [
        (Toleration(), True),
        (Toleration("team"), True),
        (Toleration("team", "ml"), True),
        (Toleration("team", ""), False),
        (Toleration("other"), False),
        (Toleration("team", None, "NoExecute"), False),
        (Toleration("", None, "NoSchedule"), True),
    ],
)
def test_a_taint_is_tolerated_by_key_value_and_effect(toleration, tolerates):
    taint = Taint("team", "ml")
    assert untolerated([taint], [toleration]) == (None if tolerates else taint)


def test_taints_that_only_weigh_keep_nobody_out():
    assert untolerated([Taint("slow", "", "PreferNoSchedule")], []) is None
