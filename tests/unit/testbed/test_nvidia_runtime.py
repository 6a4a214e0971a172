"""Containers see the driver and GPUs that their environment asks for, as with NVIDIA's runtime."""

from __future__ import annotations

import pytest

from tests.testbed.nvidia_runtime import INSIDE, with_driver


def container(*env):
    return {"process": {"args": ["sh"], "env": list(env)}, "mounts": [{"destination": "/proc"}]}


def environment(spec):
    return dict(entry.split("=", 1) for entry in spec["process"]["env"])


@pytest.mark.parametrize("env", [(), ("NVIDIA_VISIBLE_DEVICES=",), ("NVIDIA_VISIBLE_DEVICES=void",)])
def test_who_asks_for_no_gpu_gets_no_driver(env):
    assert with_driver(container(*env), "/driver") == container(*env)


def test_a_container_gets_the_driver_and_its_gpus():
    made = with_driver(container("NVIDIA_VISIBLE_DEVICES=GPU-1,GPU-2", "A=b=c"), "/driver")
    assert environment(made) == {
        "NVIDIA_VISIBLE_DEVICES": "GPU-1,GPU-2",
        "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2",
        "LD_LIBRARY_PATH": INSIDE,
        "A": "b=c",
    }
    assert [mount["destination"] for mount in made["mounts"]] == ["/proc", INSIDE]
    assert made["process"]["args"] == ["sh"]


def test_a_container_that_looks_at_all_gpus_is_limited_to_none():
    made = environment(with_driver(container("NVIDIA_VISIBLE_DEVICES=all", "LD_LIBRARY_PATH=/x"), "/driver"))
    assert "CUDA_VISIBLE_DEVICES" not in made
    assert made["LD_LIBRARY_PATH"] == f"{INSIDE}:/x"
