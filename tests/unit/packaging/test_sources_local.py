"""Weights in the function folder: what is written, byte for byte the same each time, and what is refused by name."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from adapter.errors import AdapterError, ConfigError, SnapshotError
from adapter.packaging.sources import WeightsConfig, fetch_weights, source_identity
from adapter.snapshot.weightsfile import verify
from adapter.spec import parse_spec


def tensors(**values: list[float]) -> bytes:
    """A safetensors file without torch: float32 vectors by name."""
    header, data = {}, b""
    for name, numbers in values.items():
        part = struct.pack(f"<{len(numbers)}f", *numbers)
        header[name] = {"dtype": "F32", "shape": [len(numbers)], "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def function(tmp_path: Path) -> Path:
    folder = tmp_path / "function"
    (folder / "net").mkdir(parents=True)
    (folder / "handler.py").write_text("def handle(event, context): ...\n")
    (folder / "net" / "model.safetensors").write_bytes(tensors(a=[1.0, 2.0], b=[3.0]))
    (folder / "net" / "config.json").write_text('{"size": 2}')
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "layers").mkdir()
    return tmp_path / "layers" / "weights"


NET = WeightsConfig("./net")


def contents(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        body = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[path.relative_to(folder).as_posix()] = (body, facts.st_mode, facts.st_mtime)
    return found


def refused(function: Path, target: Path, config: WeightsConfig) -> AdapterError:
    """The error of a fetch that must leave nothing behind."""
    with pytest.raises(AdapterError) as caught:
        fetch_weights(config, function, target)
    assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == []
    assert caught.value.why
    return caught.value


def test_a_folder_becomes_a_weight_snapshot_and_what_a_loader_needs(function, target):
    fetched = fetch_weights(NET, function, target)
    assert sorted(contents(target)) == [
        "model", "model/config.json", "model/model.safetensors", "weights.json", "weights.safetensors"
    ]  # fmt: skip
    verify(target)
    assert os.readlink(target / "model" / "model.safetensors") == "../weights.safetensors"
    assert (fetched.has_snapshot, fetched.tensors, fetched.source, fetched.left_out) == (True, 2, "./net", ())


def test_the_same_input_gives_the_same_bytes_modes_and_times(function, target):
    fetch_weights(NET, function, target)
    first = contents(target)
    other = target.with_name("again")
    os.utime(function / "net" / "config.json", (1, 1))
    fetch_weights(NET, function, other)
    assert contents(other) == first
    assert {mtime for _, _, mtime in first.values()} == {315_532_801.0}


def test_what_was_there_is_replaced_whole(function, target):
    fetch_weights(NET, function, target)
    (target / "stray").touch()
    (function / "net" / "model.safetensors").write_bytes(tensors(c=[9.0]))
    assert fetch_weights(NET, function, target).tensors == 1
    assert not (target / "stray").exists()
    assert [path.name for path in target.parent.iterdir()] == ["weights"]


def test_what_was_there_stays_when_the_new_weights_fail(function, target):
    fetch_weights(NET, function, target)
    first = contents(target)
    (function / "net" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(SnapshotError):
        fetch_weights(NET, function, target)
    assert contents(target) == first


def test_shards_are_taken_as_their_index_names_them(function, target):
    net = function / "net"
    (net / "model.safetensors").unlink()
    (net / "one.safetensors").write_bytes(tensors(a=[1.0]))
    (net / "two.safetensors").write_bytes(tensors(b=[2.0]))
    (net / "spare.safetensors").write_bytes(tensors(c=[2.0]))
    index = net / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    fetched = fetch_weights(NET, function, target)
    assert (fetched.tensors, fetched.left_out) == (2, ("spare.safetensors",))
    (net / "two.safetensors").unlink()
    with pytest.raises(SnapshotError) as caught:
        fetch_weights(NET, function, target)
    assert (caught.value.code, "'two.safetensors'" in caught.value.message) == ("weights-missing", True)


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "two.safetensors\n", "/etc/passwd"])
def test_an_index_cannot_name_a_file_elsewhere(function, target, place):
    net = function / "net"
    (net / "model.safetensors").rename(net.parent / "elsewhere.safetensors")
    (net / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    assert refused(function, target, NET).code == "weights-missing"


def test_links_inside_the_folder_are_followed_as_hubs_caches_have_them(function, target):
    blobs = function / "net" / ".blobs"
    blobs.mkdir()
    (function / "net" / "model.safetensors").rename(blobs / "0123abc")
    (function / "net" / "model.safetensors").symlink_to(".blobs/0123abc")
    assert fetch_weights(NET, function, target).tensors == 2
    assert not (target / "weights.safetensors").is_symlink()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_function_folder_is_refused(function, target, tmp_path, name):
    (tmp_path / "secret").write_text("of the builder")
    path = function / "net" / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "secret")
    error = refused(function, target, NET)
    assert (error.code, name in error.message) == ("weights-unsafe", True)


def test_a_folder_that_is_a_link_out_is_refused(function, target, tmp_path):
    (tmp_path / "outside").mkdir()
    (function / "out").symlink_to(tmp_path / "outside")
    assert refused(function, target, WeightsConfig("./out")).code == "weights-unsafe"
    assert refused(function, target, WeightsConfig("./net/../../outside")).code == "weights-unsafe"


def test_links_in_a_ring_end(function, target):
    (function / "net" / "self").symlink_to("../net")
    assert refused(function, target, NET).code == "weights-unsafe"
    (function / "net" / "self").unlink()
    (function / "net" / "a.json").symlink_to("b.json")
    (function / "net" / "b.json").symlink_to("a.json")
    assert refused(function, target, NET).code == "weights-missing"


def test_a_pipe_is_no_weights(function, target):
    os.mkfifo(function / "net" / "tokenizer.json")
    assert refused(function, target, NET).code == "weights-unsafe"


def test_missing_weights_are_said(function, target):
    error = refused(function, target, WeightsConfig("./gone"))
    assert (error.code, error.exit_code) == ("weights-missing", 4)


@pytest.mark.parametrize("keep", [7, 40, -1])
def test_a_truncated_file_is_refused(function, target, keep):
    path = function / "net" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    error = refused(function, target, NET)
    assert (error.code, "model.safetensors" in error.message) == ("bad-checkpoint", True)


@pytest.mark.parametrize("name", ["model.pkl", "model.joblib", "last.ckpt"])
def test_what_runs_code_when_it_is_read_is_refused_with_the_reason(function, target, name):
    (function / "net" / "model.safetensors").rename(function / "net" / name)
    error = refused(function, target, NET)
    assert (error.code, name in error.message, "would have to run" in error.why) == ("weights-unsafe", True, True)


def test_code_and_pickles_beside_the_weights_stay_out(function, target):
    for name in ("modeling.py", "optimizer.bin", "state.pkl"):
        (function / "net" / name).write_text("x")
    assert fetch_weights(NET, function, target).left_out == ("modeling.py", "optimizer.bin", "state.pkl")
    assert sorted(path.name for path in (target / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_file_with_its_digest(function, target):
    config = WeightsConfig("./net/model.safetensors", "sha256:" + "0" * 64)
    error = refused(function, target, config)
    assert error.code == "weights-digest"
    digest = error.why.split()[3].rstrip(",")
    assert fetch_weights(WeightsConfig(config.source, digest), function, target).tensors == 2


def test_gguf_is_kept_as_it_is(function, target):
    (function / "net" / "model.safetensors").unlink()
    (function / "net" / "tiny.gguf").write_bytes(b"GGUF of whatever version")
    fetched = fetch_weights(NET, function, target)
    assert not fetched.has_snapshot
    assert "GGUF is kept as it is" in fetched.note
    assert (target / "model" / "tiny.gguf").read_bytes() == b"GGUF of whatever version"


def test_a_pipeline_of_several_models_is_kept_as_it_is(function, target):
    (function / "net" / "model.safetensors").unlink()
    for part in ("unet", "vae"):
        (function / "net" / part).mkdir()
        (function / "net" / part / "model.safetensors").write_bytes(tensors(a=[1.0]))
    assert not fetch_weights(NET, function, target).has_snapshot
    assert (target / "model" / "vae" / "model.safetensors").is_file()


def test_include_says_which_of_several(function, target):
    (function / "net" / "other.safetensors").write_bytes(tensors(z=[1.0]))
    (function / "net" / "model.safetensors").rename(function / "net" / "large.safetensors")
    assert not fetch_weights(NET, function, target).has_snapshot
    config = WeightsConfig("./net", include=("other.*", "*.json"))
    assert fetch_weights(config, function, target).has_snapshot
    assert (target / "model" / "config.json").exists()


def test_the_identity_of_a_folder_is_that_of_its_contents(function):
    first = source_identity(NET, function)
    (function / "handler.py").write_text("def handle(event, context): return 1\n")
    os.utime(function / "net" / "model.safetensors", (5, 5))
    assert source_identity(NET, function) == first
    (function / "net" / "config.json").write_text("{}")
    assert source_identity(NET, function) != first


def test_the_identity_of_what_is_remote_needs_no_network(function):
    sources = ["hf://o/n@v1", "hf://o/n@v2", "oci://127.0.0.1:1/m@sha256:" + "a" * 64]
    found = {source_identity(WeightsConfig(source), function) for source in sources}
    assert len(found) == len(sources)
    assert all(identity.startswith("sha256:") for identity in found)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf://org/name", "no fixed revision"),
        ("hf://org/name@main", "no fixed revision"),
        ("oci://ghcr.io/org/name", "no digest"),
        ("oci://ghcr.io/org/name:v1", "no source of weights"),
        ("/etc/weights", "no source of weights"),
        ("../weights", "no source of weights"),
        ("ftp://host/x", "no source of weights"),
        ("http://example.com/x", "not encrypted"),
        ("https://user:pass@example.com/x", "password"),
        ("https://example.com/x", "digest"),
        ("https://[::1/x", "no source of weights"),
        ("s3://bucket/x", "no source of weights"),
        ("file:///etc/passwd", "no source of weights"),
    ],
)
def test_a_source_that_says_not_exactly_what_it_is_is_refused(function, target, source, says):
    error = refused(function, target, WeightsConfig(source))
    assert isinstance(error, ConfigError)
    assert says in f"{error.message} {error.why}"
    assert "pass@" not in f"{error.message} {error.why} {error.hint}"
    assert error.hint


def test_the_table_of_the_file():
    assert WeightsConfig.of(parse_spec({}, {})) is None
    assert WeightsConfig.of(parse_spec({"weights": {"source": "./net"}}, {})) == NET
    with pytest.raises(ConfigError) as caught:
        WeightsConfig.of(parse_spec({"weights": {"dtype": "float16"}}, {}))
    assert "not the source" in caught.value.why


def test_a_full_disk_is_said_and_nothing_is_left(function, target, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapter.packaging.weights_layer.shutil.copyfile", full)
    error = refused(function, target, NET)
    assert (error.code, error.why) == ("disk-full", "The disk is full.")
