"""What a host is told of the GPUs it may give away."""

import json

import pytest

from adapter.errors import GpuError
from adapter.gpu.inventory import Gpu, Instance, Inventory, offered
from adapter.hosts.inventory import parse_inventory

SLICES = (Instance("MIG-a", 10), Instance("MIG-b", 20))
INVENTORY = Inventory(
    "580.1",
    "13.0",
    (Gpu(0, "GPU-00", "H100", 100, False, (), True), Gpu(1, "GPU-11", "A100", 80, True, SLICES, None)),
)


def uuids(environ):
    return [(gpu["uuid"], [part["uuid"] for part in gpu["mig"]]) for gpu in offered(INVENTORY, environ)]


def test_everything_and_every_slice_where_nothing_is_masked():
    assert uuids({}) == [("GPU-00", []), ("GPU-11", ["MIG-a", "MIG-b"])]


def test_only_what_the_variable_names():
    assert uuids({"CUDA_VISIBLE_DEVICES": "GPU-00"}) == [("GPU-00", [])]
    assert uuids({"CUDA_VISIBLE_DEVICES": "MIG-b"}) == [("GPU-11", ["MIG-b"])]


def test_nothing_visible_is_an_error_that_names_the_variable():
    with pytest.raises(GpuError) as refused:
        offered(INVENTORY, {"CUDA_VISIBLE_DEVICES": ""})
    assert "CUDA_VISIBLE_DEVICES" in refused.value.why


def test_the_host_reads_what_is_offered():
    text = json.dumps({"driver": "580.1", "why_not": "", "devices": offered(INVENTORY, {})})
    devices = parse_inventory(text).devices
    assert [(device.uuid, device.memory_bytes, device.is_slice) for device in devices] == [
        ("GPU-00", 100, False),
        ("MIG-a", 10, True),
        ("MIG-b", 20, True),
    ]
