"""Which devices a kubelet gave to whom: asked of a real gRPC server with messages as kubelets send them."""

from __future__ import annotations

import asyncio

import pytest

from adapter.agent.kubelet import Kubelet
from adapter.errors import Unavailable
from tests.fakes.kubelet import devices, kubelet


def asked(path, allocatable, pods):
    async def ask():
        async with kubelet(path, allocatable, pods) as one:
            return await one.allocation()

    return asyncio.run(ask())


def test_whole_gpus_and_slices_go_to_containers(tmp_path):
    found = asked(
        tmp_path / "k.sock",
        [devices("nvidia.com/gpu", "GPU-a", "GPU-b"), devices("nvidia.com/mig-1g.10gb", "MIG-c"), devices("example.com/fpga", "f")],
        {
            ("acme", "embed", "main"): [devices("nvidia.com/gpu", "GPU-a"), devices("example.com/fpga", "f")],
            ("acme", "other", "main"): [devices("nvidia.com/mig-1g.10gb", "MIG-c")],
            ("acme", "plain", "main"): [],
        },
    )  # fmt: skip
    assert found.shares == {"GPU-a": 1.0, "GPU-b": 1.0, "MIG-c": 1.0}
    assert found.devices == {("acme", "embed", "main"): {"GPU-a": 1.0}, ("acme", "other", "main"): {"MIG-c": 1.0}}


def test_of_a_gpu_that_is_sold_several_times_each_has_a_share(tmp_path):
    found = asked(
        tmp_path / "k.sock",
        [devices("nvidia.com/gpu.shared", *(f"GPU-a::{n}" for n in range(4)))],
        {("acme", "embed", "main"): [devices("nvidia.com/gpu.shared", "GPU-a::1", "GPU-a::3")]},
    )
    assert found.shares == {"GPU-a": 0.25}
    assert found.devices == {("acme", "embed", "main"): {"GPU-a": 0.5}}


def test_without_a_kubelet_it_is_said_so(tmp_path):
    with pytest.raises(Unavailable) as caught:
        asyncio.run(Kubelet(tmp_path / "none.sock").allocation())
    assert caught.value.code == "kubelet-unreachable"
