"""What works here, found by canaries, and kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stubs.simulated import CUDA_UNKNOWN, GIB, StubGpu, uuid_of

pytestmark = pytest.mark.gpu


def find(machine, folder):
    """The verdicts, as the command prints them."""
    done = subprocess.run(
        [sys.executable, "-m", "adapter.gpu.capabilities", str(folder)],
        env={**os.environ, **machine.environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode in {0, 8}, done.stderr
    return json.loads(done.stdout)


def verdicts(machine, folder):
    found = find(machine, folder)["verdicts"]
    return {feature: verdict["works"] for feature, verdict in found.items()}


def test_every_feature_is_tried_and_has_a_verdict(machine, tmp_path):
    found = find(machine, tmp_path / "kept")
    assert set(found["verdicts"]) == {"plain", "virtual", "managed", "remap"}
    assert all(verdict["works"] or verdict["code"] for verdict in found["verdicts"].values())
    assert found["verdicts"]["plain"]["works"], found["verdicts"]["plain"]["reason"]


def test_the_simulated_driver_can_all_but_managed_memory(simulated, tmp_path):
    assert verdicts(simulated, tmp_path / "kept") == {"plain": True, "virtual": True, "managed": False, "remap": True}


def test_with_two_gpus_a_canary_moves_to_the_other(simulated, tmp_path):
    simulated.set(StubGpu(uuid_of(0)), StubGpu(uuid_of(1)))
    assert verdicts(simulated, tmp_path / "kept")["remap"]


def test_an_old_driver_without_remap_is_found_out(simulated, tmp_path):
    simulated.set(remap=False)
    assert verdicts(simulated, tmp_path / "kept") == {"plain": True, "virtual": True, "managed": False, "remap": False}


def test_verdicts_are_kept_until_the_driver_changes(simulated, tmp_path):
    before = find(simulated, tmp_path)
    simulated.fault(f"cuInit * fail {CUDA_UNKNOWN}")  # nothing could be tried now
    assert find(simulated, tmp_path) == before
    simulated.set(driver="590.10.01")
    assert find(simulated, tmp_path)["verdicts"]["plain"]["code"] == "canary-failed"


def test_what_could_not_be_tried_is_tried_again(simulated, tmp_path):
    simulated.fault(f"cuInit * fail {CUDA_UNKNOWN}")
    assert verdicts(simulated, tmp_path)["plain"] is None
    assert not list(tmp_path.glob("gpu-*.json"))
    simulated.fault()
    assert verdicts(simulated, tmp_path)["plain"] is True


def test_kept_verdicts_that_are_damaged_are_found_anew(simulated, tmp_path):
    before = find(simulated, tmp_path)
    (kept,) = tmp_path.glob("gpu-*.json")
    kept.write_text(kept.read_text()[:-20])
    assert find(simulated, tmp_path) == before
    assert json.loads(kept.read_text()) == before


def test_a_full_gpu_gives_no_verdict(simulated, tmp_path):
    simulated.set(StubGpu(uuid_of(0), bytes=1 << 20))
    assert set(verdicts(simulated, tmp_path).values()) == {None}


def test_without_a_gpu_the_reason_is_said(simulated, tmp_path):
    simulated.fault("nvmlInit * fail 9")
    assert find(simulated, tmp_path)["error"]["code"] == "no-gpu"


HANGING = """
import json, os, sys
from adapter.gpu import capabilities, inventory
found = capabilities.try_all(inventory.take_inventory(), os.environ, limit_s=8.0)
print(json.dumps({feature.value: [verdict.works, verdict.code] for feature, verdict in found.items()}))
"""


def test_a_driver_that_hangs_costs_its_time_limit_and_leaves_nothing_behind(simulated):
    simulated.set(StubGpu(uuid_of(0), bytes=GIB))
    simulated.fault("cuCheckpointProcessCheckpoint 1 hang")
    done = subprocess.run(
        [sys.executable, "-c", HANGING],
        env={**os.environ, **simulated.environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
    )
    found = json.loads(done.stdout)
    assert found["plain"] == [False, "helper-timeout"]
    assert found["virtual"] == [True, ""]
    assert simulated.held_bytes() == 0
