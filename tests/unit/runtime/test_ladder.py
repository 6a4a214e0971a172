"""Which rungs a replica may try where its image brings weights, and on which device."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adapter.errors import NotFound, SnapshotCorrupt, SnapshotMismatch
from adapter.packaging.sources import WeightsConfig, fetch_weights
from adapter.records import Rung
from adapter.replica import ReplicaSettings
from adapter.runtime.ladder import PROCESS, WEIGHTS, Step, Wanted, device_of, plan
from adapter.snapshot.identity import weights_identity
from adapter.spec import read_handler_shape
from tests.fakes.checkpoints import safetensors

BUILDS = "def load(device): ...\ndef build(device): ...\ndef handle(event, context): ...\n"


@pytest.fixture
def function(tmp_path: Path) -> Path:
    folder = tmp_path / "function"
    (folder / "net").mkdir(parents=True)
    (folder / "handler.py").write_text(BUILDS)
    (folder / "net" / "model.safetensors").write_bytes(safetensors(a=[1.0, 2.0]))
    return folder


@pytest.fixture
def weights(tmp_path: Path, function: Path) -> Path:
    return fetch_weights(WeightsConfig("./net"), function, tmp_path / "weights").folder


@pytest.fixture
def settings(tmp_path: Path, function: Path, weights: Path) -> ReplicaSettings:
    return ReplicaSettings(folder=str(function), weights_dir=str(weights), python=sys.executable)


@pytest.fixture
def stored(tmp_path: Path, settings: ReplicaSettings) -> ReplicaSettings:
    """With a store beside it."""
    return replace(settings, snapshot_dir=str(tmp_path / "store"))


def wanted(settings: ReplicaSettings, **environ: str) -> Wanted:
    return Wanted.of(settings, read_handler_shape(Path(settings.folder)), environ)


def start_of(wanted: Wanted) -> Step | None:
    return next((step for step in plan(wanted)[0] if step.rung is Rung.START), None)


def why_no_start(wanted: Wanted) -> str:
    return next(skipped.reason for skipped in plan(wanted)[1] if skipped.rung is Rung.START)


def publish(wanted: Wanted, kind: str, **facts: object) -> Path:
    identity = weights_identity(wanted.identity) if kind == WEIGHTS else wanted.identity
    assert wanted.store is not None
    with wanted.store.building(wanted.settings.tenant, wanted.function, identity, kind) as draft:
        (draft.path / "data").write_text("x")
        return draft.publish(facts).path


def test_the_images_weights_need_no_store(settings, weights):
    assert start_of(wanted(settings)) == Step(Rung.START, None, str(weights))


def test_a_handler_without_build_starts_by_load(settings, function):
    (function / "handler.py").write_text(BUILDS.replace("build", "other"))
    assert "no `build`" in why_no_start(wanted(settings))


def test_weight_snapshots_that_are_off_are_off_for_the_images_too(settings):
    assert start_of(wanted(replace(settings, weight_snapshot="off"))) is None


def test_the_stores_weights_go_before_the_images(stored):
    path = publish(wanted(stored), WEIGHTS)
    step = start_of(wanted(stored))
    assert step is not None
    assert step.snapshot is not None
    assert step.weights == str(path) == str(step.snapshot.path)


def test_other_weights_of_the_image_leave_no_snapshot_that_fits(stored, weights):
    publish(wanted(stored), PROCESS)
    publish(wanted(stored), WEIGHTS)
    wanted(stored).find(PROCESS)
    (weights / "model" / "config.json").write_text("{}")
    for kind in (PROCESS, WEIGHTS):
        with pytest.raises(NotFound) as caught:
            wanted(stored).find(kind)
        assert caught.value.why == "Differs in: weights."


def test_a_process_snapshot_that_maps_them_is_found_and_knows_where_they_are(stored, weights):
    key = wanted(stored).find_weights().key
    publish(wanted(stored), PROCESS, weights=key, weights_left_out=True)
    found = wanted(stored).find(PROCESS)
    assert wanted(stored).weights_of(found) == str(weights)


@pytest.mark.parametrize(("key", "error"), [("image:of-another", SnapshotMismatch), ("0123456789", NotFound)])
def test_a_process_snapshot_that_maps_others_is_not_used(stored, key, error):
    publish(wanted(stored), PROCESS, weights=key)
    with pytest.raises(error):
        wanted(stored).find(PROCESS)


def test_damaged_weights_are_named_and_a_snapshot_that_maps_them_is_not_used(stored, weights):
    key = wanted(stored).find_weights().key
    publish(wanted(stored), PROCESS, weights=key)
    os.truncate(weights / "weights.safetensors", 4100)
    fresh = wanted(stored)
    assert "image's weights are damaged" in why_no_start(fresh)
    with pytest.raises((NotFound, SnapshotCorrupt)):
        fresh.find(PROCESS)


def test_a_flipped_bit_is_found_at_the_first_start_on_a_node_with_a_store(stored, settings, weights):
    data = weights / "weights.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    assert "damaged in chunk 0" in why_no_start(wanted(stored))
    assert "damaged in chunk 0" in why_no_start(wanted(replace(settings, verify_weights="on")))
    assert start_of(wanted(settings)) is not None  # the engine that pulled the image has verified it


def test_a_replica_that_started_from_them_takes_no_weight_snapshot(stored):
    assert wanted(replace(stored, process_snapshot="off")).lacks_snapshots(Rung.LOAD)
    assert not wanted(replace(stored, process_snapshot="off")).lacks_snapshots(Rung.START)
    assert wanted(stored).lacks_snapshots(Rung.START)


def test_load_is_told_where_the_model_is_and_the_users_word_wins(settings, weights):
    assert wanted(settings).shared["MODEL_DIR"] == f"{weights}/model"
    assert wanted(settings, MODEL_DIR="/mine").shared["MODEL_DIR"] == "/mine"
    assert "MODEL_DIR" not in wanted(replace(settings, weights_dir="")).shared


@pytest.mark.parametrize(
    ("devices", "device"),
    [
        (["nvidia0", "nvidiactl"], "cuda:0"),
        (["nvidia3", "nvidia-uvm"], "cuda:0"),
        (["nvidiactl", "nvidia-uvm", "null"], "cpu"),
    ],
)
def test_a_gpu_is_one_by_whatever_number_its_machine_has_it(tmp_path, devices, device):
    for name in devices:
        (tmp_path / name).touch()
    assert device_of(ReplicaSettings(), {}, str(tmp_path)) == device
    assert device_of(ReplicaSettings(device="cuda:1"), {}, str(tmp_path)) == "cuda:1"


def test_gpus_that_are_not_shown_to_cuda_are_none(tmp_path):
    """As the pod webhook says to a function without GPUs, where a runtime shows every GPU to everybody."""
    (tmp_path / "nvidia0").touch()
    for none in ("", "-1"):  # the second is how many write it themselves
        assert device_of(ReplicaSettings(), {"CUDA_VISIBLE_DEVICES": none}, str(tmp_path)) == "cpu"
    assert device_of(ReplicaSettings(), {"CUDA_VISIBLE_DEVICES": "GPU-1"}, str(tmp_path)) == "cuda:0"
