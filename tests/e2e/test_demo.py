"""The README's demo, as a user runs it."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.criu]


@pytest.mark.timeout(1500)  # a first run builds an environment with torch
def test_the_demo_is_true(repository):
    done = subprocess.run([sys.executable, "-m", "scripts.demo"], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for claim in ("ANSWER", "COLD STARTS", "restore", "times faster", "REPLICA-SECONDS"):
        assert claim in done.stdout
    assert "nothing left running" in done.stderr
