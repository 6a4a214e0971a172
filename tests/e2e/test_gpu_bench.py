"""`make gpu-bench` on the simulated GPU: that its code runs, before there is a GPU to run it on."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.gpu, pytest.mark.criu]

NOTHING = ("gpu_turns_lost", "gpu_turns_leaked", "gpu_kills_lost", "gpu_kills_leaked")
RUNGS = ("gpu_toy_load_s", "gpu_toy_resume_s", "gpu_toy_restore_s")


@pytest.mark.timeout(1200)
def test_every_part_that_the_simulated_driver_can_do_comes_to_its_end(repository, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--simulated", "--patience", "5", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    bars = {bar["name"]: bar for bar in json.loads(file.read_text())["bars"]}
    assert [bars[name]["value"] for name in NOTHING] == [0] * 4
    assert bars["gpu_canary_plain"]["value"] == 1
    assert {*RUNGS, "gpu_resume_over_driver", "gpu_weights_over_pcie"} <= bars.keys()
    assert not [name for name, bar in bars.items() if name.endswith("_failed") and bar["value"]]
