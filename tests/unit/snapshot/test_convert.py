"""Checkpoints of others: what comes out is what was in them, and what a stranger wrote is refused by name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from adapter.errors import AdapterError, ConfigError, SnapshotError, SnapshotMismatch
from adapter.snapshot import weights, weightsfile
from adapter.snapshot.convert import convert

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.torch


class Model(torch.nn.Module):
    """Embeddings that are tied to the head, layers of some types, and a table that no checkpoint holds."""

    def __init__(self, table_on: str = "cpu") -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(12, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(3))
        self.norm = torch.nn.LayerNorm(8).requires_grad_(False)
        self.head = torch.nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("table", torch.arange(6.0, device=table_on), persistent=False)


def built(**options: Any) -> Model:
    with torch.device("meta"):
        return Model(**options)


def once(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As checkpoints have it: tied tensors by their first name."""
    return {name: value.detach() for name, value in model.state_dict().items() if name != "head.weight"}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(1)
    return Model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "snapshot"
    path.mkdir()
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    return path


def halves(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[start::2]} for start in (0, 1)]


def write_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors.save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    places = {}
    for number, part in enumerate(halves(tensors)):
        file = f"model-{number}.safetensors"
        safetensors.save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def write_bin(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def write_sharded_bin(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    places = {}
    for number, part in enumerate(halves(tensors)):
        file = f"pytorch_model-{number}.bin"
        torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def write_wrapped(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save({"epoch": 3, "model": {"state_dict": tensors}}, folder / "last.pt")
    return folder / "last.pt"


KINDS = [write_safetensors, write_sharded, write_bin, write_sharded_bin, write_wrapped]


@pytest.mark.parametrize("write", KINDS)
def test_a_model_is_filled_from_a_converted_checkpoint(write, model: Model, source: Path, folder: Path) -> None:
    done = convert(write(source, once(model)), folder)
    weights.verify(folder)
    copy = built()
    weights.fill(copy, folder)
    for name, value in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value), name
    assert copy.head.weight is copy.embedding.weight
    assert torch.equal(copy.table, model.table)
    assert not copy.training
    assert copy.layers[0].weight.requires_grad
    assert not copy.norm.weight.requires_grad
    assert done.tensors == len(once(model))
    assert done.bytes == sum(value.nbytes for value in once(model).values())
    assert done.left_out == ()


@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_every_data_type_keeps_its_bits(write, source: Path, folder: Path) -> None:
    kinds = ["float64", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "int8", "uint8", "bool", "complex64"]
    holder = torch.nn.Module()
    for kind in kinds:
        noise = (
            torch.randint(0, 2, (24,), dtype=torch.uint8)
            if kind == "bool"
            else torch.randint(0, 256, (96,), dtype=torch.uint8)
        )
        holder.register_buffer(f"as_{kind}", noise.view(getattr(torch, kind)))
    convert(write(source, dict(holder.state_dict())), folder)
    copy = torch.nn.Module()
    for kind in kinds:
        copy.register_buffer(f"as_{kind}", torch.empty_like(holder.get_buffer(f"as_{kind}"), device="meta"))
    weights.fill(copy, folder)
    for kind in kinds:
        name = f"as_{kind}"
        assert torch.equal(copy.get_buffer(name).view(torch.uint8), holder.get_buffer(name).view(torch.uint8)), kind


def test_ties_and_strides_of_a_pytorch_file_are_kept(source: Path, folder: Path) -> None:
    base = torch.rand(6, 4)
    tensors = {"a": base, "b": base, "turned": base.t(), "part": base[2:]}
    convert(write_bin(source, tensors), folder)
    copy = torch.nn.Module()
    for name, value in tensors.items():
        copy.register_buffer(name, torch.empty_like(value, device="meta"))
    weights.fill(copy, folder)
    assert copy.a is copy.b
    assert copy.turned.stride() == (1, 4)
    copy.a[3, 1] = 7.0
    assert copy.turned[1, 3] == copy.part[1, 1] == 7.0


def test_the_whole_state_dict_with_ties_converts_too(model: Model, source: Path, folder: Path) -> None:
    convert(write_bin(source, model.state_dict()), folder)
    copy = built()
    weights.fill(copy, folder)
    assert copy.head.weight is copy.embedding.weight


def test_what_the_checkpoint_lacks_and_build_has_no_data_for_is_named(model: Model, source: Path, folder: Path) -> None:
    convert(write_safetensors(source, once(model)), folder)
    with pytest.raises(SnapshotMismatch, match="table is not in the snapshot"):
        weights.fill(built(table_on="meta"), folder)


def test_what_is_no_tensor_is_left_out(model: Model, source: Path, folder: Path) -> None:
    torch.save({**once(model), "epoch": 7, "words": ["a"]}, source / "x.pt")
    assert convert(source / "x.pt", folder).left_out == ("epoch", "words")


def test_tensors_that_the_index_does_not_name_are_left_out(model: Model, source: Path, folder: Path) -> None:
    write_sharded(source, once(model))
    index = source / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    del contents["weight_map"]["counts"]
    index.write_text(json.dumps(contents))
    assert convert(source, folder).left_out == ("counts",)


def test_links_are_followed_as_model_hubs_make_them(model: Model, source: Path, folder: Path, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path, once(model))
    (source / "model.safetensors").symlink_to(path)
    assert convert(source, folder).tensors == len(once(model))


@pytest.mark.parametrize("kind", ["safetensors", "bin", "gguf"])
def test_memory_stays_bounded(kind: str, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def anonymous_bytes() -> int:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024

    value = torch.rand(4096, 5120)  # 80 MiB
    path, names = source / f"model.{kind}", ()
    if kind == "safetensors":
        safetensors.save_file({"a": value}, path)
    elif kind == "bin":
        torch.save({"a": value}, path)
    else:
        write_gguf(path, "qwen2", {"output.weight": (value.numpy(), gguf.GGMLQuantizationType.Q8_0)})
        names = ("lm_head.weight",)
    del value
    convert(path, folder, names=names)  # what is imported and kept on a first use
    (folder / weights.INDEX).unlink()
    monkeypatch.setattr(weightsfile, "_COPY_BYTES", 4 * 2**20)
    peak, before, real = [0], anonymous_bytes(), weightsfile.Writer._write

    def measured(writer: weightsfile.Writer, chunk: memoryview) -> int:
        peak[0] = max(peak[0], anonymous_bytes() - before)
        return real(writer, chunk)

    monkeypatch.setattr(weightsfile.Writer, "_write", measured)
    convert(path, folder, names=names)
    assert peak[0] < 32 * 2**20


# --- GGUF ------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, architecture: str, tensors: dict[str, Any], **facts: int) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(facts.get("layers", 1))
    writer.add_head_count(facts.get("heads", 4))
    writer.add_head_count_kv(facts.get("key_heads", 2))
    for name, (value, kind) in tensors.items():
        writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


F32, F16, Q8 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
}


def interleaved(value: Any, heads: int) -> Any:
    """As llama.cpp writes queries and keys: the halves of each head's rotation in turns."""
    return value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


@pytest.fixture
def values() -> dict[str, Any]:
    random = np.random.default_rng(3)
    shapes = {"embed": (16, 64), "q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "layernorm": (64,)}
    return {
        name: random.standard_normal(next(shape for key, shape in shapes.items() if key in name), dtype=np.float32)
        for name in NAMES
    }


def filled(folder: Path, values: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The snapshot's tensors by their names in the model."""
    root = torch.nn.Module()
    for name, value in values.items():
        *path, attribute = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]
        owner.register_buffer(attribute, torch.empty(value.shape, dtype=dtype, device="meta"))
    weights.fill(root, folder)
    return dict(root.state_dict())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [F32, F16, Q8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_comes_back_dequantised_under_the_models_names(
    architecture: str, kind: Any, dtype: str, values: dict[str, Any], source: Path, folder: Path
) -> None:
    stored = {}
    for name, theirs in NAMES.items():
        value = values[name]
        if architecture == "llama" and (
            heads := {"attn_q": 4, "attn_k": 2}.get(theirs.split(".")[2] if "blk" in theirs else "")
        ):
            value = interleaved(value, heads)
        stored[theirs] = (value, F32 if value.ndim == 1 else kind)
    stored["rope_freqs.weight"] = (np.ones(8, np.float32), F32)
    path = write_gguf(source / "model.gguf", architecture, stored)
    done = convert(source, folder, names=[*NAMES, "lm_head.weight"], dtype=dtype)
    assert path.exists()
    assert done.left_out == ("rope_freqs.weight",)
    found = filled(folder, values, getattr(torch, dtype))
    for name, theirs in NAMES.items():
        kept = gguf.dequantize(gguf.quantize(values[name], stored[theirs][1]), stored[theirs][1])
        assert torch.equal(found[name], torch.from_numpy(kept.copy()).to(getattr(torch, dtype))), name


def test_gguf_needs_the_models_names(source: Path, folder: Path) -> None:
    write_gguf(source / "m.gguf", "llama", {"output.weight": (np.ones((4, 32), np.float32), F32)})
    with pytest.raises(ConfigError, match="names tensors"):
        convert(source, folder)


def test_an_architecture_whose_tensors_gguf_changes_otherwise_is_refused_by_name(source: Path, folder: Path) -> None:
    write_gguf(source / "m.gguf", "gemma2", {"output.weight": (np.ones((4, 32), np.float32), F32)})
    with pytest.raises(SnapshotError, match=r"m\.gguf") as caught:
        convert(source, folder, names=["lm_head.weight"])
    assert "'gemma2'" in caught.value.why


@pytest.mark.parametrize("facts", [{"layers": 2**31}, {"heads": 3}, {"heads": 0}])
def test_gguf_facts_that_cannot_be_are_refused(facts: dict[str, int], source: Path, folder: Path) -> None:
    write_gguf(source / "m.gguf", "llama", {"blk.0.attn_q.weight": (np.ones((64, 32), np.float32), F32)}, **facts)
    with pytest.raises(SnapshotError) as caught:
        convert(source, folder, names=["model.layers.0.self_attn.q_proj.weight"])
    assert caught.value.code == "bad-checkpoint"


@pytest.mark.parametrize("cut", [0, 3, 30, 200, -1])
def test_a_truncated_gguf_file_is_refused(cut: int, source: Path, folder: Path) -> None:
    path = write_gguf(source / "m.gguf", "llama", {"output.weight": (np.ones((4, 32), np.float32), F32)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SnapshotError) as caught:
        convert(path, folder, names=["lm_head.weight"])
    assert caught.value.code == "bad-checkpoint"


# --- hostility -------------------------------------------------------------------------------------------------


class Runs:
    """Runs a command when it is unpickled by something that lets it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("name", ["x.pt", "pytorch_model.bin"])
def test_a_file_that_would_run_code_is_refused_by_name(name: str, source: Path, folder: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Runs(tmp_path / "ran")}, source / name)
    with pytest.raises(SnapshotError, match=name) as caught:
        convert(source / name, folder)
    assert caught.value.code == "unsafe-checkpoint"
    assert "mkdir" in caught.value.why
    assert not (tmp_path / "ran").exists()
    assert not list(folder.iterdir())


def test_the_form_before_torch_1_6_is_refused_with_the_reason(source: Path, folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, source / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(SnapshotError, match=r"x\.pt") as caught:
        convert(source / "x.pt", folder)
    assert "save it anew" in caught.value.why


def index_of(places: object) -> bytes:
    return json.dumps({"weight_map": places}).encode()


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"weight_map": {"a": "m.safetensors", "a": "m.safetensors"}}',
        index_of([]),
        index_of({}),
        index_of({"a": 3}),
        index_of({"a": "../checkpoint/m.safetensors"}),
        index_of({"a": "/etc/passwd"}),
        index_of({"a": ".."}),
        index_of({"a": ""}),
        index_of({"a": "missing.safetensors"}),
        index_of({"a": "m.safetensors", "b": "m.safetensors"}),
        index_of({"a": "m.safetensors", "b": "m.bin"}),
        index_of({"a": "model.safetensors.index.json"}),
        index_of({f"{number}": f"{number}.safetensors" for number in range(1001)}),
    ],
)
def test_a_hostile_index_is_refused(index: bytes, source: Path, folder: Path) -> None:
    safetensors.save_file({"a": torch.ones(2)}, source / "m.safetensors")
    torch.save({"b": torch.ones(2)}, source / "m.bin")
    (source / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(SnapshotError) as caught:
        convert(source, folder)
    assert caught.value.code == "bad-checkpoint"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin", "x.gguf", "x.index.json", "x.onnx"])
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "empty", "zeros", "text"])
def test_what_is_no_checkpoint_is_refused(name: str, kind: str, source: Path, folder: Path) -> None:
    path = source / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "zeros": bytes(5000), "text": b"PK\x03\x04 no " * 400}[kind])
    with pytest.raises(AdapterError) as caught:
        convert(path, folder, names=["a"])
    assert caught.value.code == "bad-checkpoint"
    assert not list(folder.iterdir())


def test_a_folder_with_several_gguf_files_names_them(source: Path, folder: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (source / name).touch()
    with pytest.raises(SnapshotError) as caught:
        convert(source, folder, names=["a"])
    assert "a.gguf, b.gguf" in caught.value.why


def test_a_checkpoint_that_shrinks_while_it_is_read_is_refused(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors.save_file({"a": torch.ones(2000)}, source / "m.safetensors")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: b"" if size == 8000 else real(fd, size, at))
    with pytest.raises(SnapshotError) as caught:
        convert(source / "m.safetensors", folder)
    assert "shorter while a was read" in caught.value.why
    assert not list(folder.iterdir())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sparse_tensor_is_refused_by_name(source: Path, folder: Path) -> None:
    torch.save({"a": torch.ones(2), "links": torch.eye(3).to_sparse()}, source / "x.pt")
    with pytest.raises(SnapshotError, match="links"):
        convert(source / "x.pt", folder)
