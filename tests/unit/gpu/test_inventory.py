"""Which GPUs a process may use, by its variables."""

import sys

import pytest

from adapter.errors import GpuError
from adapter.gpu.inventory import Gpu, Instance, Inventory, take_inventory, visible_devices


def gpu(index, *, mig=False):
    uuid = f"GPU-{index}{index}aa0000-0000-4000-8000-000000000000"
    instances = tuple(Instance(f"MIG-{index}{number}bb", 40) for number in range(2)) if mig else ()
    return Gpu(index, uuid, "H100", 80, mig, instances, True)


FOUR = Inventory("580.95.05", "13.0", tuple(gpu(index) for index in range(4)))
ONE = Inventory("580.95.05", "13.0", (gpu(0),))
MIXED = Inventory("580.95.05", "13.0", (gpu(0), gpu(1, mig=True)))


def seen(inventory, **environ):
    return [device.uuid[:6] for device in visible_devices(inventory, environ)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0,1", ["GPU-00", "GPU-11"]),
        ("2,0", ["GPU-22", "GPU-00"]),
        (" 1 , 3 ", ["GPU-11", "GPU-33"]),
        ("GPU-22", ["GPU-22"]),
        ("gpu-22AA,0", ["GPU-22", "GPU-00"]),
        ("1,9,0", ["GPU-11"]),
        ("1,-1,0", ["GPU-11"]),
    ],
)
def test_cuda_sees_what_its_variable_names_in_that_order_up_to_the_first_that_is_none(value, expected):
    assert seen(FOUR, CUDA_VISIBLE_DEVICES=value) == expected


@pytest.mark.parametrize("value", ["", "-1", "none", "9", "GPU-", "GPU-99", "1,1", "all", "²"])
def test_a_variable_that_names_none_is_said_to_do_so(value):
    with pytest.raises(GpuError) as none:
        visible_devices(FOUR, {"CUDA_VISIBLE_DEVICES": value})
    assert none.value.code == "no-visible-gpu"
    assert "CUDA_VISIBLE_DEVICES" in none.value.why


def test_without_variables_all_are_seen():
    assert seen(FOUR) == ["GPU-00", "GPU-11", "GPU-22", "GPU-33"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", ["GPU-00", "GPU-11", "GPU-22", "GPU-33"]),
        ("2", ["GPU-22"]),
        ("GPU-11,GPU-33", ["GPU-11", "GPU-33"]),
    ],
)
def test_the_container_runtimes_variable_narrows_where_more_gpus_are_here(value, expected):
    assert seen(FOUR, NVIDIA_VISIBLE_DEVICES=value) == expected


@pytest.mark.parametrize("value", ["", "none", "void"])
def test_a_container_without_gpus_has_none_even_where_they_can_be_seen(value):
    with pytest.raises(GpuError) as none:
        visible_devices(FOUR, {"NVIDIA_VISIBLE_DEVICES": value})
    assert "NVIDIA_VISIBLE_DEVICES" in none.value.why


@pytest.mark.parametrize("value", ["3", "GPU-33", "GPU-00", "0"])
def test_the_one_gpu_of_a_container_is_its_gpu_whatever_the_host_calls_it(value):
    assert seen(ONE, NVIDIA_VISIBLE_DEVICES=value) == ["GPU-00"]


def test_cudas_indices_count_the_gpus_of_the_container():
    assert seen(FOUR, NVIDIA_VISIBLE_DEVICES="1,3", CUDA_VISIBLE_DEVICES="1") == ["GPU-33"]


def test_instances_are_seen_by_uuid_and_for_their_gpu_the_first():
    assert seen(MIXED, CUDA_VISIBLE_DEVICES="MIG-11bb") == ["MIG-11"]
    assert seen(MIXED, CUDA_VISIBLE_DEVICES="0,1") == ["GPU-00", "MIG-10"]


def test_without_nvidia_ml_py_there_is_no_gpu_and_the_reason_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(GpuError) as missing:
        take_inventory()
    assert missing.value.code == "no-gpu"
    assert "nvidia-ml-py" in missing.value.why
    assert missing.value.exit_code == 8
