"""PyTorch files and GGUF, converted by the function's interpreter: as tensors only, and without the builder's secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapter.errors import AdapterError
from adapter.packaging.sources import WeightsConfig, fetch_weights, source_identity
from adapter.snapshot import weights

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
pytestmark = pytest.mark.torch

NET = WeightsConfig("./net")
BUILDS = """
import json, os, torch

def build(device):
    json.load(open(os.path.join(os.environ['MODEL_DIR'], 'config.json')))
    print('noise of a handler')
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.norm = torch.nn.LayerNorm(4, bias=False)
    return model

def handle(event, context): ...
"""


@pytest.fixture
def function(tmp_path: Path) -> Path:
    folder = tmp_path / "function"
    (folder / "net").mkdir(parents=True)
    (folder / "handler.py").write_text(BUILDS)
    (folder / "net" / "config.json").write_text("{}")
    return folder


def fails(function: Path, config: WeightsConfig = NET, **options) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        fetch_weights(config, function, function.parent / "layers" / "weights", **options)
    assert list((function.parent / "layers").iterdir()) == []
    assert caught.value.why
    return caught.value


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("output_norm.weight", np.arange(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "net.pt"])
def test_tensors_that_pytorch_saved_become_a_weight_snapshot(function, name):
    torch.save({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, function / "net" / name)
    fetched = fetch_weights(NET, function, function.parent / "weights")
    assert (fetched.tensors, fetched.has_snapshot) == (2, True)
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    weights.fill(model, fetched.folder)
    assert model(torch.ones(3)).tolist() == [3.0, 3.0]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_with_what_it_asked_for_and_has_not_run(function):
    torch.save({"weight": torch.ones(2), "evil": Evil(function / "ran")}, function / "net" / "pytorch_model.bin")
    error = fails(function)
    assert (error.code, "mkdir would have to run" in error.why) == ("unsafe-checkpoint", True)
    assert "torch.save" in error.hint
    assert not (function / "ran").exists()


def test_a_bare_pickle_is_refused(function):
    (function / "net" / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n(S'false'\ntR.")
    assert "pytorch_model.bin" in fails(function).message


def test_a_truncated_file_is_refused(function):
    path = function / "net" / "pytorch_model.bin"
    torch.save({"weight": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    assert fails(function).code == "bad-checkpoint"


def test_an_interpreter_without_torch_is_said(function, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text("raise ModuleNotFoundError('No module', name='torch')")
    torch.save({"weight": torch.ones(1)}, function / "net" / "pytorch_model.bin")
    error = fails(function, environ={"PYTHONPATH": str(tmp_path / "path")})
    assert (error.code, error.why.startswith("torch is not installed")) == ("convert-needs", True)
    assert "requirements" in error.hint


def test_an_interpreter_that_is_not_there_is_said(function):
    (function / "net" / "pytorch_model.bin").touch()
    assert fails(function, python="/nowhere/python").code == "convert-failed"


def test_an_interpreter_that_dies_is_said_in_its_own_words(function, tmp_path):
    (function / "net" / "pytorch_model.bin").touch()
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'libc is too old' >&2\nkill -9 $$\n")
    script.chmod(0o755)
    error = fails(function, python=str(script))
    assert (error.code, error.why) == ("convert-failed", "libc is too old.")


def test_no_variable_of_the_builder_reaches_the_reader_of_a_strangers_file(function, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-the-builder")
    (function / "net" / "pytorch_model.bin").touch()
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\nexit 1\n")
    script.chmod(0o755)
    fails(function, python=str(script))
    seen = (tmp_path / "seen").read_text()
    assert "of-the-builder" not in seen
    assert "MODEL_DIR=" in seen


def test_gguf_is_dequantised_into_the_model_that_build_makes(function):
    write_gguf(function / "net" / "tiny.gguf")
    config = WeightsConfig("./net", dtype="float32")
    fetched = fetch_weights(config, function, function.parent / "weights")
    assert (fetched.tensors, fetched.has_snapshot) == (1, True)
    index = json.loads((fetched.folder / "weights.json").read_text().splitlines()[1])
    assert index["tensors"][0]["names"] == ["model.norm.weight"]


def test_gguf_needs_build(function):
    write_gguf(function / "net" / "tiny.gguf")
    (function / "handler.py").write_text("def handle(event, context): ...\n")
    assert fails(function, WeightsConfig("./net", dtype="float32")).code == "no-build"


def test_another_build_is_another_layer_where_the_names_are_its(function):
    write_gguf(function / "net" / "tiny.gguf")
    kept, changed = WeightsConfig("./net"), WeightsConfig("./net", dtype="float32")
    before = [source_identity(config, function) for config in (kept, changed)]
    (function / "handler.py").write_text(BUILDS + "\n")
    after = [source_identity(config, function) for config in (kept, changed)]
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)


def test_safetensors_need_neither_torch_nor_numpy(tmp_path):
    """As in a slim builder: the conversion in an interpreter that refuses both."""
    from tests.fakes.checkpoints import safetensors

    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model.safetensors").write_bytes(safetensors(a=[1.0]))
    code = (
        "import sys; sys.modules.update(torch=None, numpy=None, requests=None, huggingface_hub=None)\n"
        "from pathlib import Path; from adapter.packaging.sources import *\n"
        f"here = Path({str(tmp_path)!r}); print(fetch_weights(WeightsConfig('./net'), here, here / 'out').tensors)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
