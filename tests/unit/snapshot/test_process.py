"""What a manifest may say about a process."""

import pytest
from hypothesis import given, strategies as st

from adapter.errors import SnapshotCorrupt
from adapter.snapshot.process import ProcessFacts

GOOD = {
    "criu": "/opt/criu",
    "criu_version": "4.1",
    "pid": 5000,
    "pipes": ["pipe:[1]", "pipe:[2]", "pipe:[3]", "pipe:[4]"],
    "mapped_bytes": 1,
    "copied_bytes": 0,
    "weights": "abc",
    "weights_left_out": False,
    "gpu": "",
}


def test_facts_come_back():
    assert ProcessFacts.of(GOOD).pid == 5000


@pytest.mark.parametrize(
    "change",
    [
        {"pid": "5000"},
        {"pid": 1},
        {"pid": -1},
        {"pid": True},
        {"pid": 2**40},
        {"pipes": ["pipe:[1]"] * 3},
        {"pipes": 5},
        {"pipes": [1, 2, 3, 4]},
        {"criu": 5},
        {"weights": ["x"]},
        {"copied_bytes": -1},
        {"mapped_bytes": 1.5},
        {"unknown": 1},
    ],
    ids=str,
)
def test_facts_of_the_wrong_kind_are_refused(change):
    with pytest.raises(SnapshotCorrupt):
        ProcessFacts.of({**GOOD, **change})


@pytest.mark.parametrize("name", ["criu", "pid", "pipes"])
def test_facts_that_are_missing_are_refused(name):
    with pytest.raises(SnapshotCorrupt):
        ProcessFacts.of({key: value for key, value in GOOD.items() if key != name})


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)


@given(name=st.sampled_from(sorted(GOOD)), value=json_values)
def test_no_value_does_more_than_be_refused(name, value):
    try:
        ProcessFacts.of({**GOOD, name: value})
    except SnapshotCorrupt:
        pass
