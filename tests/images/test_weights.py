"""Weights in a layer of an image: a replica maps them at its first start, and its process snapshot does so too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapter.packaging.packages import shim_requirements
from adapter.packaging.sources import WeightsConfig, fetch_weights
from tests.fakes.checkpoints import safetensors
from tests.images.conftest import CACHE
from tests.images.wheels import fetch

pytestmark = [pytest.mark.e2e, pytest.mark.criu]

HANDLER = """
import os, struct, torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(300_000))

def load(device):
    raise RuntimeError('the weights are mapped, not loaded')

def build(device):
    with torch.device('meta'):
        return Net()

def handle(event, context):
    return str(context.model.weight.sum().item())
"""
ANSWER = b"150000.0"
DOCKERFILE = """
FROM {base}
USER 0
COPY packages /packages
COPY shim /shim/adapter
COPY weights /weights
COPY function /function
ENV PYTHONPATH=/shim:/packages GPUFN_WEIGHTS=/weights
USER 1000
CMD ["python3", "-m", "adapter.runtime"]
"""


@pytest.fixture(scope="module")
def image(docker, run_image, repository, tmp_path_factory):
    """A function image made by hand, its weights by the same code as any builder's."""
    context: Path = tmp_path_factory.mktemp("context")
    function = context / "function"
    (function / "net").mkdir(parents=True)
    (function / "handler.py").write_text(HANDLER)
    (function / "net" / "model.safetensors").write_bytes(safetensors(weight=[0.5] * 300_000))
    fetch_weights(WeightsConfig("./net"), function, context / "weights")
    shutil.rmtree(function / "net")
    shutil.copytree(repository / "adapter", context / "shim", ignore=shutil.ignore_patterns("__pycache__"))
    wheels = fetch(CACHE, "\n".join(shim_requirements(gpus=0)), repository / "requirements-dev.lock")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    target = ["--target", str(context / "packages"), "--python-version", "3.13", "--only-binary", ":all:"]
    subprocess.run([*pip, *target, *shim_requirements(gpus=0)], check=True)
    (context / "Dockerfile").write_text(DOCKERFILE.format(base=run_image))
    name = "gpufn-test/weights:1"
    docker("build", "--quiet", "--network", "none", "--tag", name, str(context))
    return name


def record_of(container) -> dict:
    """What the replica says of its start."""
    events = [json.loads(line) for line in container.logs().splitlines() if line.startswith("{")]
    return next(event["record"] for event in events if event["event"] == "started")


def snapshot_of(container, within: float = 90) -> dict:
    """What became of its snapshot."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        events = [json.loads(line) for line in container.logs().splitlines() if line.startswith("{")]
        for event in events:
            if event["event"] == "snapshot" and event["state"] != "building":
                return event
        time.sleep(0.1)
    raise AssertionError(container.logs())


def test_a_user_without_rights_starts_from_the_layer(image, start_container):
    container = start_container(image)
    container.wait_until_ready()
    assert container.ask(body=b"x").body == ANSWER
    assert record_of(container)["rung"] == "start"


def test_a_process_snapshot_of_it_comes_back_in_another_container(image, start_container, tmp_path):
    from adapter.snapshot.process import find_criu

    store = tmp_path / "snapshots"
    store.mkdir(mode=0o700)
    criu = Path(find_criu().path).parent
    rungs = []
    for life in range(2):
        container = start_container(
            image,
            environment={"GPUFN_CRIU": "/criu/criu"},
            mounts={criu: "/criu:ro", store: "/var/lib/gpufn/snapshots"},
            capabilities=["CHECKPOINT_RESTORE"],
            security=["seccomp=unconfined"],
            user="0",
            options=["--cap-drop", "ALL"],
        )
        container.wait_until_ready()
        assert container.ask(body=b"x").body == ANSWER
        if not life:
            assert snapshot_of(container)["state"] == "published", container.logs()
        rungs.append(record_of(container)["rung"])
        container.kill()
        container.wait_until_ended()
    assert rungs == ["start", "restore"]
    kinds = {path.name.split("-")[0] for path in store.glob("*/*/*-*") if not path.name.startswith(".")}
    assert kinds == {"process"}
