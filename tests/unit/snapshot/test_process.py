"""What a manifest may say about a process."""

import pytest
from hypothesis import given, strategies as st

from adapter.errors import SnapshotCorrupt, SnapshotError
from adapter.snapshot.process import ProcessFacts, find_criu

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


def criu_that_says(tmp_path, said: str):
    script = tmp_path / "criu"
    script.write_text(f'#!/bin/sh\n[ "$1" != check ] || {{ printf "%s" "{said}" >&2; exit 1; }}\necho Version: 4.1\n')
    script.chmod(0o755)
    return {"GPUFN_CRIU": str(script)}


READ_ONLY = "Error (criu/cr-check.c:160): sys/kernel/ns_last_pid sysctl is inaccessible: Read-only file system\n"


def test_a_read_only_proc_is_no_reason_against_criu(tmp_path):
    assert (
        find_criu(criu_that_says(tmp_path, f"Warn  (x): y\n{READ_ONLY}Warn  (x): Does not look good.\n")).version
        == "4.1"
    )


@pytest.mark.parametrize(
    "said", [f"{READ_ONLY}Error (x): no pidfd\n", "Error (x): no pidfd\n", "", "CRIU needs rights\n"]
)
def test_what_else_it_says_is_one(tmp_path, said):
    with pytest.raises(SnapshotError, match="No working CRIU"):
        find_criu(criu_that_says(tmp_path, said))
