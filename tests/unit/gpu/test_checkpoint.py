"""The driver without its bindings, or with older ones than a call needs."""

import sys
from types import SimpleNamespace

import pytest

from adapter.errors import GpuError
from adapter.gpu.checkpoint import Driver


def success(*values):
    return lambda *_: (0, *values)


@pytest.fixture
def bindings(monkeypatch):
    """Stand-ins for those of CUDA 12.8: they know checkpoints, and no GPU pairs."""
    found = SimpleNamespace(
        cuInit=success(),
        cuDeviceGetCount=success(1),
        cuDeviceGetUuid=success(SimpleNamespace(bytes=bytes(16))),
        cuCheckpointProcessRestore=success(),
    )
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=SimpleNamespace(driver=found)))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=found))
    return found


def test_missing_bindings_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(GpuError) as missing:
        Driver()
    assert missing.value.code == "no-cuda-bindings"
    assert "gpufn[park]" in missing.value.hint


def test_bindings_without_gpu_pairs_restore_in_place_and_refuse_another_gpu(bindings):
    driver = Driver()
    driver.restore(1)
    with pytest.raises(GpuError) as old:
        driver.restore(1, {driver.gpus()[0]: driver.gpus()[0]})
    assert old.value.code == "gpu-bindings-too-old"
    assert "cuda-bindings>=13" in old.value.hint


def test_bindings_without_checkpoints_are_said_to_be_too_old(bindings):
    with pytest.raises(GpuError) as old:
        Driver().unlock(1)
    assert old.value.code == "gpu-bindings-too-old"
    assert "cuCheckpointProcessUnlock" in old.value.why


def test_uuids_are_written_as_nvidia_smi_writes_them(bindings):
    bindings.cuDeviceGetUuid = success(SimpleNamespace(bytes=bytes(range(16))))
    assert Driver().gpus() == ["GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"]
