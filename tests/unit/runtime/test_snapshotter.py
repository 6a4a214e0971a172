"""What is known before a model is loaded for a snapshot."""

import sys
from types import SimpleNamespace

import pytest

from adapter.errors import GpuError
from adapter.replica import ReplicaSettings
from adapter.runtime.snapshotter import Snapshotter


class Loaded(Exception):
    """A model was."""


def loads(*_):
    raise Loaded


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"device": "cuda:0"}, GpuError),
        ({"device": "cuda:0", "gpu_helper": "/run/helper"}, Loaded),  # the machine's, which has them
        ({"device": "cpu"}, Loaded),
    ],
)
def test_where_nothing_can_give_its_gpu_back_no_model_is_loaded(tmp_path, monkeypatch, settings, ends):
    (tmp_path / "handler.py").write_text("def load(device): ...\ndef handle(event, context): ...\n")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr("adapter.runtime.snapshotter.find_criu", lambda environ: SimpleNamespace())
    monkeypatch.setattr("adapter.runtime.snapshotter.raise_process_ids", lambda least: None)
    monkeypatch.setattr(Snapshotter, "_warm", loads)
    store = {"folder": str(tmp_path), "snapshot_dir": str(tmp_path / "store"), "runtime_dir": str(tmp_path)}
    with pytest.raises(ends):
        Snapshotter(ReplicaSettings(**store, **settings), {}).run()
