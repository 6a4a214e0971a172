"""Weight snapshots against real torch: what comes back is what was there, or a refusal by name."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapter import pagecache
from adapter.errors import SnapshotCorrupt, SnapshotError, SnapshotMismatch
from adapter.snapshot import layout, weights, weightsfile
from adapter.snapshot.checksum import CHUNK_BYTES
from adapter.snapshot.store import Store
from adapter.snapshot.tensorfile import read_header

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:ComplexHalf support")]


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


class Buffers(torch.nn.Module):
    """Every kind of buffer; not a parameter among them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(5))
        self.register_buffer("table", torch.rand(3, 4), persistent=False)
        self.register_buffer("absent", None)
        self.register_buffer("empty", torch.zeros(0, 7))
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("transposed", torch.rand(3, 5).t())
        self.register_buffer("every_other", torch.rand(9)[::2])
        self.register_buffer("expanded", torch.rand(4, 1).expand(4, 6))


class Shared(torch.nn.Module):
    """Buffers that lie in each other's memory, also under another type."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(12, dtype=torch.float32)
        self.register_buffer("front", base[:8])
        self.register_buffer("back", base[4:].reshape(2, 4))
        self.register_buffer("bytes", base.view(torch.uint8)[5:9])
        apart = torch.rand(20)
        self.register_buffer("left", apart[:10])
        self.register_buffer("right", apart[10:])


class Types(torch.nn.Module):
    """Every data type, in items of random bits."""

    NAMES = sorted(layout._ITEM_BYTES)

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            dtype = getattr(torch, name)
            noise = torch.randint(0, 2 if name == "bool" else 256, (7 * dtype.itemsize,), dtype=torch.uint8)
            self.register_buffer(f"as_{name}", noise.view(dtype))


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
        self.normal = torch.nn.BatchNorm1d(4)


def parametrized() -> torch.nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))


def several() -> object:
    """Modules wherever a `load` may put them."""
    return {
        "encoder": torch.nn.Linear(2, 3),
        "stack": [torch.nn.Linear(3, 3), (torch.nn.Bilinear(2, 2, 2), "words")],
        "more": SimpleNamespace(decoder=torch.nn.Linear(3, 2), vocabulary={"a": 1}, settings=None),
        7: torch.nn.Conv2d(1, 1, 2),
    }


def two_ways_to_one() -> object:
    shared = torch.nn.Linear(2, 2)
    return {"first": shared, "second": torch.nn.Sequential(shared, torch.nn.Linear(2, 2))}


MODELS = {
    "linear": lambda: torch.nn.Linear(3, 5),
    "half": lambda: torch.nn.Linear(3, 5).to(torch.bfloat16),
    "channels_last": lambda: torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "frozen": lambda: torch.nn.Linear(3, 5).requires_grad_(False),
    "tied": Tied,
    "buffers": Buffers,
    "shared": Shared,
    "types": Types,
    "recurrent": Recurrent,
    "parametrized": parametrized,
    "several": several,
    "two_ways_to_one": two_ways_to_one,
    "mixed_modes": lambda: torch.nn.Sequential(torch.nn.Dropout().eval(), torch.nn.Linear(2, 2), torch.nn.Dropout()),
}


def built(name: str) -> object:
    with torch.device("meta"):
        return MODELS[name]()


def tensors(model: object) -> dict[str, torch.Tensor]:
    return {slot.name: slot.value for slot in layout.slots_of(model)}


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    weights.save(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)), tmp_path)
    return tmp_path


def fresh() -> torch.nn.Module:
    with torch.device("meta"):
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))


@pytest.mark.parametrize("name", MODELS)
def test_every_bit_comes_back(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    reference = {}
    for key, value in tensors(model).items():
        torch.save(value.detach(), tmp_path / key)
        reference[key] = torch.load(tmp_path / key, weights_only=True)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    weights.save(model, folder)
    weights.verify(folder)
    copy = built(name)
    weights.fill(copy, folder)
    found = tensors(copy)
    assert found.keys() == reference.keys()
    for key, value in reference.items():
        assert found[key].dtype == value.dtype
        assert found[key].shape == value.shape
        assert found[key].device.type == "cpu"
        assert raw(found[key]) == raw(value), key


@pytest.mark.parametrize("name", MODELS)
def test_strides_gradients_kinds_and_modes_come_back(name: str, tmp_path: Path) -> None:
    model, copy = MODELS[name](), built(name)
    weights.save(model, tmp_path)
    weights.fill(copy, tmp_path)
    before, after = tensors(model), tensors(copy)
    for key, value in before.items():
        assert after[key].stride() == value.stride(), key
        assert after[key].requires_grad == value.requires_grad, key
        assert isinstance(after[key], torch.nn.Parameter) == isinstance(value, torch.nn.Parameter), key
    modes = [(path, module.training) for path, module in layout.submodules_of(model)]
    assert modes == [(path, module.training) for path, module in layout.submodules_of(copy)]


@pytest.mark.parametrize("name", MODELS)
def test_what_shared_memory_shares_it_again(name: str, tmp_path: Path) -> None:
    model, copy = MODELS[name](), built(name)
    weights.save(model, tmp_path)
    weights.fill(copy, tmp_path)
    before, after = list(tensors(model).values()), list(tensors(copy).values())
    for i in range(len(before)):
        for j in range(i):
            assert (after[i] is after[j]) == (before[i] is before[j])


def test_a_write_through_one_view_is_seen_through_the_other(tmp_path: Path) -> None:
    copy = built("shared")
    weights.save(Shared(), tmp_path)
    weights.fill(copy, tmp_path)
    copy.front[5] = 77.0
    assert copy.back[0, 1] == 77.0


def test_a_recurrent_layer_computes_with_its_filled_weights(tmp_path: Path) -> None:
    model, copy = Recurrent().eval(), built("recurrent")
    weights.save(model, tmp_path)
    weights.fill(copy, tmp_path)
    x = torch.rand(5, 2, 3)
    assert torch.equal(copy.lstm(x)[0], model.lstm(x)[0])


def test_a_filled_model_is_in_evaluation_mode_where_the_saved_was(tmp_path: Path) -> None:
    """A network built without weights is in training mode: with dropout it would answer at random."""
    weights.save(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).eval(), tmp_path)
    with torch.device("meta"):
        copy = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    weights.fill(copy, tmp_path)
    assert not any(module.training for module in copy.modules())


def test_a_model_that_is_no_meta_model_is_filled_too(saved: Path) -> None:
    reference, copy = fresh(), torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    weights.fill(reference, saved)
    weights.fill(copy, saved)
    assert torch.equal(copy[0].weight, reference[0].weight)


def test_a_write_to_a_parameter_stays_in_this_process(saved: Path) -> None:
    before = (saved / weights.DATA).read_bytes()
    first, second = fresh(), fresh()
    weights.fill(first, saved)
    weights.fill(second, saved)
    with torch.no_grad():
        first[0].weight.zero_()
    assert not torch.equal(first[0].weight, second[0].weight)
    assert (saved / weights.DATA).read_bytes() == before
    weights.verify(saved)


def test_parameters_are_mapped_pages_of_the_file(saved: Path) -> None:
    copy = fresh()
    weights.fill(copy, saved)
    address = copy[0].weight.data_ptr()
    maps = Path("/proc/self/maps").read_text().splitlines()
    [line] = [
        line for line in maps if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split(" ")[0], 16)
    ]
    assert line.endswith(str(saved / weights.DATA))
    assert line.split()[1] == "rw-p"


def test_a_filled_model_outlives_its_files(saved: Path) -> None:
    """A snapshot may be evicted while a replica that was filled from it serves."""
    copy, other = fresh(), fresh()
    weights.fill(copy, saved)
    weights.fill(other, saved)
    expected = other[0].weight.clone()
    for path in saved.iterdir():
        path.unlink()
    assert torch.equal(copy[0].weight, expected)


def test_any_safetensors_reader_opens_the_file(saved: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    copy = fresh()
    weights.fill(copy, saved)
    loaded = safetensors.load_file(saved / weights.DATA)
    assert loaded.keys() == dict(copy.named_parameters()).keys()
    assert all(torch.equal(loaded[name], value) for name, value in copy.named_parameters())


def test_the_data_begins_on_a_page_and_tensors_on_cache_lines(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb"):
        pass
    weights.save(torch.nn.Sequential(torch.nn.Linear(17, 5), torch.nn.Linear(64, 64)), tmp_path)
    with (tmp_path / weights.DATA).open("rb") as file:
        header = read_header(file.fileno())
    assert header.data_at % 4096 == 0
    assert header.tensors["1.weight"].start % 64 == 0


def test_files_are_private(saved: Path) -> None:
    assert {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()} == {0o600}


def test_a_device_gets_copies(saved: Path) -> None:
    """Stands in for a GPU: the way is the same for every device that is not the CPU."""
    copy = fresh()
    weights.fill(copy, saved, "cpu:0")
    assert copy[0].weight.device.type == "cpu"


# --- what cannot be kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: {"tokenizer": "words"}, "no weights"),
        (lambda: torch.jit.script(torch.nn.Linear(2, 2)), "TorchScript"),
        (lambda: torch.nn.Linear(2, 2, device="meta"), "weight has no data"),
        (lambda: torch.nn.LazyLinear(3), "weight"),
        (lambda: {"a": {"b": torch.nn.Linear(2, 2)}, "a.b": torch.nn.Linear(2, 2)}, "a.b.weight"),
    ],
    ids=["nothing", "script", "meta", "lazy", "same-name"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_cannot_be_kept_is_refused_by_name(model, named: str, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError) as caught:
        weights.save(model(), tmp_path)
    assert named in f"{caught.value} {caught.value.why}"
    assert not list(tmp_path.iterdir())


def test_a_sparse_buffer_is_refused_by_name(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    with pytest.raises(SnapshotError, match="adjacency"):
        weights.save(model, tmp_path)


def test_a_plain_attribute_without_data_is_refused_by_name(tmp_path: Path) -> None:
    class Careless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
            self.positions = torch.arange(4)

    weights.save(Careless(), tmp_path)
    with torch.device("meta"):
        copy = Careless()
    with pytest.raises(SnapshotMismatch, match="positions has no data"):
        weights.fill(copy, tmp_path)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False)), "1.bias is not in the model"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2), torch.nn.Linear(2, 2)), "2.bias is not in the snapshot"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), "0.weight has the shape"),
        (lambda: fresh().to(torch.float16), "float16"),
        (torch.nn.ReLU, "is not in the model"),
    ],
    ids=["missing", "extra", "shape", "dtype", "empty"],
)  # fmt: skip
def test_weights_of_another_model_are_refused_by_name(other, named: str, saved: Path) -> None:
    with torch.device("meta"):
        model = other()
    with pytest.raises(SnapshotMismatch, match=named):
        weights.fill(model, saved)


# --- damage and hostility --------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found(saved: Path) -> None:
    path = saved / weights.DATA
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotCorrupt, match="damaged"):
        weights.verify(saved)


def test_a_flipped_bit_in_the_index_is_found(saved: Path) -> None:
    path = saved / weights.INDEX
    text = path.read_text()
    path.write_text(text.replace('"shape": [5, 3]', '"shape": [3, 5]'))
    assert path.read_text() != text
    for use in (lambda: weights.verify(saved), lambda: weights.fill(fresh(), saved)):
        with pytest.raises(SnapshotCorrupt, match=weights.INDEX):
            use()


@pytest.mark.parametrize("name", [weights.DATA, weights.INDEX])
@pytest.mark.parametrize("damage", ["removed", "truncated", "emptied", "link", "folder", "pipe"])
def test_files_that_are_not_whole_files_are_refused(name: str, damage: str, saved: Path) -> None:
    path = saved / name
    data = path.read_bytes()
    path.unlink()
    if damage in {"truncated", "emptied"}:
        path.write_bytes(data[: len(data) - 1 if damage == "truncated" else 0])
    elif damage == "link":
        (saved / "elsewhere").write_bytes(data)
        path.symlink_to(saved / "elsewhere")
    elif damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    for use in (lambda: weights.verify(saved), lambda: weights.fill(fresh(), saved)):
        with pytest.raises(SnapshotCorrupt):
            use()


def forged(folder: Path, change) -> None:
    """An index that whoever wrote it signed with its own, right digest."""
    contents = json.loads((folder / weights.INDEX).read_text().splitlines()[1])
    change(contents)
    text = json.dumps(contents).encode()
    head = json.dumps({"digest": weightsfile._digest(text)}).encode()
    (folder / weights.INDEX).write_bytes(head + b"\n" + text)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["tensors"][0].update(stride=[2**40, 1]),
        lambda index: index["tensors"][0].update(offset=2**62),
        lambda index: index["tensors"][0].update(offset=-1),
        lambda index: index["tensors"][0].update(piece="1.bias"),
        lambda index: index["tensors"][0].update(piece="nowhere"),
        lambda index: index["tensors"][0].update(piece=["1.bias"]),
        lambda index: index["tensors"][0].update(dtype="load"),
        lambda index: index["tensors"][0].update(dtype=["float32"]),
        lambda index: index["tensors"][0].update(shape=[True, 3]),
        lambda index: index["tensors"][0].update(names=[]),
        lambda index: index["tensors"][0].update(names=index["tensors"][1]["names"]),
        lambda index: index["tensors"].pop(),
        lambda index: index["tensors"].append(3),
        lambda index: index.update(tensors={}),
        lambda index: index.update(format=1),
        lambda index: index.update(complete=1),
        lambda index: index.update(chunks=["no digest"]),
        lambda index: index.update(chunks=[3]),
        lambda index: index["tensors"][0].update(requires_grad="yes"),
        lambda index: index.update(training=[[]]),
        lambda index: index.pop("chunks"),
    ],
)
def test_a_forged_index_is_refused(change, saved: Path) -> None:
    forged(saved, change)
    with pytest.raises(SnapshotCorrupt):
        weights.fill(fresh(), saved)


def test_a_type_that_needs_another_alignment_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.register_buffer("a", torch.zeros(3, dtype=torch.uint8))
    model.register_buffer("b", torch.zeros(4, dtype=torch.uint8))
    weights.save(model, tmp_path)

    def change(index) -> None:
        index["tensors"][1].update(dtype="float32", shape=[1], stride=[1])

    forged(tmp_path, change)
    with pytest.raises(SnapshotCorrupt, match="not aligned"):
        weights.fill(model, tmp_path)


@pytest.fixture
def several_chunks(tmp_path: Path) -> Path:
    model = torch.nn.Module()
    for name in "abc":
        model.register_buffer(name, torch.randint(1, 100, (CHUNK_BYTES,), dtype=torch.uint8))
    weights.save(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("at", "named"),
    [
        (CHUNK_BYTES // 2, "chunk 0 of 4, which holds the header, a."),
        (CHUNK_BYTES + 1, "chunk 1 of 4, which holds a, b."),
        (3 * CHUNK_BYTES, "chunk 3 of 4, which holds c."),
    ],
)
def test_damage_is_named_by_chunk_and_tensor(at: int, named: str, several_chunks: Path) -> None:
    with (several_chunks / weights.DATA).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 64]))
    with pytest.raises(SnapshotCorrupt, match="damaged") as caught:
        weights.verify(several_chunks)
    assert named in caught.value.message


def test_the_store_names_what_is_damaged_in_a_copy(tmp_path: Path) -> None:
    with Store(tmp_path).building("t", "fn.ns", {"code": "a"}, "weights") as draft:
        weights.save(torch.nn.Linear(3, 3), draft.path)
        published = draft.publish({})
    with (published.path / weights.DATA).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(SnapshotCorrupt, match="chunk 0 of 1, which holds the header, bias, weight"):
        Store(tmp_path).find("t", "fn.ns", {"code": "a"}, "weights")


def test_zeros_may_become_holes(tmp_path: Path) -> None:
    """A copy may leave out what is zero; it is the same file."""
    model = torch.nn.Module()
    model.register_buffer("zeros", torch.zeros(3 * CHUNK_BYTES, dtype=torch.uint8))
    weights.save(model, tmp_path)
    path = tmp_path / weights.DATA
    size = path.stat().st_size
    os.truncate(path, CHUNK_BYTES)
    os.truncate(path, size)
    assert path.stat().st_blocks * 512 < size / 2
    weights.verify(tmp_path)


def test_what_is_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def damaging(fd: int) -> None:
        if os.fstat(fd).st_size > CHUNK_BYTES:
            os.pwrite(fd, b"?", CHUNK_BYTES)
        real(fd)

    model = torch.nn.Linear(2048, 2048)
    monkeypatch.setattr(os, "fsync", damaging)
    with pytest.raises(SnapshotCorrupt, match="damaged in chunk 1 of"):
        weights.save(model, tmp_path)
    assert not (tmp_path / weights.INDEX).exists()


def test_a_page_that_cannot_be_read_is_an_error_and_no_crash(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        pagecache.ctypes.set_errno(errno.EFAULT)
        return -1

    monkeypatch.setattr(pagecache, "resident_ratio", lambda _: 0.0)
    monkeypatch.setattr(pagecache, "_madvise", failing)
    with pytest.raises(SnapshotCorrupt, match=f"{weights.DATA} cannot be read"):
        weights.fill(fresh(), saved)


# --- memory given up and brought back ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_released_weights_come_back_into_the_same_tensors(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    weights.save(model, tmp_path)
    before = tensors(model)
    expected = {key: raw(value) for key, value in before.items()}
    strides = {key: value.stride() for key, value in before.items()}
    given_up = weights.release(model, tmp_path)
    assert given_up >= sum(storage.nbytes() for storage in storages(MODELS[name]()).values())
    assert not any(storage.nbytes() for storage in storages(model).values())
    weights.refill(model, tmp_path)
    for key, value in tensors(model).items():
        assert value is before[key]
        assert value.stride() == strides[key]
        assert raw(value) == expected[key], key


def storages(model: object) -> dict:
    return {storage._cdata: storage for storage in (t.untyped_storage() for t in tensors(model).values() if t.numel())}


def test_views_that_shared_memory_share_it_after_a_refill(tmp_path: Path) -> None:
    model = Shared()
    weights.save(model, tmp_path)
    weights.release(model, tmp_path)
    weights.refill(model, tmp_path)
    model.front[5] = 77.0
    assert model.back[0, 1] == 77.0


def test_a_recurrent_layer_computes_after_a_refill(tmp_path: Path) -> None:
    model = Recurrent().eval()
    x = torch.rand(5, 2, 3)
    expected = model.lstm(x)[0]
    weights.save(model, tmp_path)
    weights.release(model, tmp_path)
    weights.refill(model, tmp_path)
    assert torch.equal(model.lstm(x)[0], expected)


def test_mapped_weights_are_not_given_up(saved: Path) -> None:
    model = fresh()
    weights.fill(model, saved)
    with torch.no_grad():
        model[0].weight.zero_()
    assert weights.release(model, saved) == 0
    weights.refill(model, saved)
    assert not model[0].weight.any(), "what this replica wrote stays"


@pytest.mark.parametrize(
    "other",
    [
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 3)),
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 5)),
        lambda: transposed(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))),
    ],
    ids=["shape", "names", "strides"],
)
def test_nothing_is_given_up_that_would_not_come_back(other, saved: Path) -> None:
    model = other()
    expected = {key: raw(value) for key, value in tensors(model).items()}
    with pytest.raises(SnapshotMismatch):
        weights.release(model, saved)
    assert {key: raw(value) for key, value in tensors(model).items()} == expected


def transposed(model: torch.nn.Module) -> torch.nn.Module:
    model[0].weight = torch.nn.Parameter(model[0].weight.t().contiguous().t())
    return model


def test_a_file_that_became_shorter_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(300, 300)
    weights.save(model, tmp_path)
    weights.release(model, tmp_path)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(SnapshotCorrupt, match="ends early"):
        weights.refill(model, tmp_path)


def test_short_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(30, 30)
    expected = model.weight.clone()
    weights.save(model, tmp_path)
    weights.release(model, tmp_path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:17]], at))
    weights.refill(model, tmp_path)
    assert torch.equal(model.weight, expected)


# --- half-written snapshots ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_full_disk_leaves_no_snapshot(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(os, call), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == number + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(SnapshotError, match="cannot be written") as caught:
        weights.save(torch.nn.Linear(2, 2), tmp_path)
    assert "No space" in caught.value.why
    assert not (tmp_path / weights.INDEX).exists()
    monkeypatch.undo()
    weights.save(torch.nn.Linear(2, 2), tmp_path)
    weights.verify(tmp_path)


def test_what_a_killed_save_left_is_written_anew(tmp_path: Path) -> None:
    for name in (weights.DATA, f"{weights.DATA}.part", f"{weights.INDEX}.part"):
        (tmp_path / name).write_bytes(b"half")
    with pytest.raises(SnapshotCorrupt):
        weights.verify(tmp_path)
    weights.save(torch.nn.Linear(2, 2), tmp_path)
    weights.verify(tmp_path)


def test_a_snapshot_is_never_overwritten(saved: Path) -> None:
    with pytest.raises(SnapshotError, match="already"):
        weights.save(torch.nn.Linear(2, 2), saved)
    weights.verify(saved)
