"""What of a node is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapter.agent.cache import Cached
from adapter.agent.node import Gpu, gpus_of, status_of
from adapter.agent.scrape import read_busy
from adapter.hosts import Inventory
from adapter.policy.grants import Device

LABELS = {"nvidia.com/gpu.product": "NVIDIA-L4", "nvidia.com/gpu.memory": "23034"}


def test_gpus_are_those_of_the_driver_and_those_of_the_kubelet():
    inventory = Inventory(
        (Device("GPU-a", "NVIDIA H100", 80 * 2**30), Device("MIG-b", "NVIDIA H100 MIG 1g.10gb", 10 * 2**30, is_slice=True)),
        "580.95",
    )  # fmt: skip
    assert gpus_of(inventory, ["GPU-a", "GPU-c"], LABELS) == [
        Gpu("GPU-a", "NVIDIA H100", 80 * 2**30),
        Gpu("GPU-c", "NVIDIA-L4", 23034 * 2**20),
        Gpu("MIG-b", "NVIDIA H100 MIG 1g.10gb", 10 * 2**30, "1g.10gb"),
    ]
    assert gpus_of(Inventory(), ["GPU-c"], {"nvidia.com/gpu.memory": "much"}) == [Gpu("GPU-c")]


def snapshot(name, used_s, kind="process"):
    return Cached(Path("/s") / name, name, kind, f"key-{used_s}", 1000, used_s * 10**9)


def test_of_each_function_the_process_snapshot_used_last_is_published():
    cached = [snapshot("t/a.n", 100), snapshot("t/a.n", 700), snapshot("t/b.n", 130), snapshot("t/c.n", 9, "weights")]
    status = status_of([], Inventory(why_not="No driver."), cached, disk_bytes_per_s=1.2345678e9, why_no_restore="")
    assert status["snapshots"] == [
        {"name": "t/a.n", "key": "key-700", "bytes": 1000, "usedAt": "1970-01-01T00:11:00Z"},
        {"name": "t/b.n", "key": "key-130", "bytes": 1000, "usedAt": "1970-01-01T00:02:00Z"},
    ]
    assert (status["whyNot"], status["diskBytesPerSecond"]) == ("No driver.", 1.235e9)
    assert status["restore"] == {"works": True, "whyNot": ""}


def test_uses_within_a_minute_are_no_news():
    first, second = (
        status_of([], Inventory(), [snapshot("t/a.n", s)], disk_bytes_per_s=0, why_no_restore="")["snapshots"][0][
            "usedAt"
        ]
        for s in (61, 119)
    )
    assert first == second


@pytest.mark.parametrize(("used_s", "text"), [(-(10**9), "1970-01-01T00:00:00Z"), (10**21, "9999-12-31T23:59:00Z")])
def test_a_time_that_a_container_made_up_is_published_as_the_nearest_there_is(used_s, text):
    status = status_of([], Inventory(), [snapshot("acme/a.x", used_s)], disk_bytes_per_s=0, why_no_restore="")
    assert status["snapshots"][0]["usedAt"] == text


@pytest.mark.parametrize(
    ("text", "busy_ns"),
    [
        (b"# TYPE gpufn_busy_seconds_total counter\ngpufn_busy_seconds_total 1.5\n", 1_500_000_000),
        (b"gpufn_busy_seconds_total 0\n", 0),
        (b"", None),
        (b"gpufn_busy_seconds_total_more 5\n", None),
        (b"gpufn_busy_seconds_total NaN\n", None),
        (b"gpufn_busy_seconds_total 1e300\n", None),
        (b"gpufn_busy_seconds_total -4\n", None),
        (b"gpufn_busy_seconds_total many\n", None),
        (b"\xff\xfe\x00", None),
    ],
)
def test_a_replicas_counter_is_believed_where_it_makes_sense(text, busy_ns):
    assert read_busy(text) == busy_ns
