import json
import sys

import pytest

from adapter.hosts import inventory
from adapter.hosts.inventory import parse_inventory, read_inventory
from adapter.policy.grants import Device

H100 = {"index": 0, "uuid": "GPU-1", "name": "NVIDIA H100", "memory_bytes": 80, "mig": [], "persistence": True}
SLICE = {"uuid": "MIG-1", "name": "NVIDIA H100 MIG 1g.10gb", "memory_bytes": 10}


def answer(*devices, **more):
    return json.dumps({"driver": "580.1", "devices": devices, "why_not": "", **more})


@pytest.fixture
def child(monkeypatch):
    """What runs in the place of the inventory."""
    return lambda code: monkeypatch.setattr(inventory, "_COMMAND", (sys.executable, "-c", code))


def test_gpus_are_devices():
    found = parse_inventory(answer(H100, {**H100, "uuid": "GPU-2"}))
    assert found.devices == (Device("GPU-1", "NVIDIA H100", 80), Device("GPU-2", "NVIDIA H100", 80))
    assert (found.driver, found.why_not) == ("580.1", "")


def test_a_gpu_that_is_cut_is_its_slices():
    found = parse_inventory(answer({**H100, "mig": [SLICE, {"uuid": "MIG-2", "memory_bytes": 20 * 2**30}]}))
    assert found.devices == (
        Device("MIG-1", "NVIDIA H100 MIG 1g.10gb", 10, is_slice=True),
        Device("MIG-2", "NVIDIA H100 MIG 20.0Gi", 20 * 2**30, is_slice=True),
    )


def test_gpus_without_persistence_mode_are_named():
    found = parse_inventory(
        answer(H100, {**H100, "uuid": "GPU-2", "persistence": False}, {**H100, "persistence": None})
    )
    assert found.asleep == ("GPU-2",)


def test_why_there_is_none_is_kept():
    assert parse_inventory(answer(why_not="No driver.")).why_not == "No driver."
    assert parse_inventory(answer()).why_not


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"devices": 3}', '{"devices": [{"uuid": "GPU-1"}]}', "no json"])
def test_anything_else_is_no_inventory(text):
    with pytest.raises(ValueError, match=r".+"):
        parse_inventory(text)


def test_it_is_read_from_a_child(child):
    child(f"print({answer(H100)!r})")
    assert [device.uuid for device in read_inventory().devices] == ["GPU-1"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no library')", "no library"),
        ("import os; os.abort()", "code -6"),
        ("print('nonsense')", "cannot be listed"),
    ],
)
def test_a_child_that_fails_is_a_reason_and_no_error(child, code, said):
    child(code)
    found = read_inventory()
    assert found.devices == ()
    assert said in found.why_not


def test_a_driver_that_hangs_is_a_reason_and_no_error(child, monkeypatch):
    child("import time; time.sleep(60)")
    monkeypatch.setattr(inventory, "_LIMIT_S", 0.1)
    assert "timed out" in read_inventory().why_not
