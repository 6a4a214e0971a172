import math
import os

import pytest

from benchmarks import loaders, weights
from benchmarks.results_file import WANTED

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}


def test_the_model_has_two_gigabytes_that_can_be_read_as_words():
    sizes = [BYTES[dtype] * math.prod(shape) for _, dtype, shape in loaders.shapes()]
    assert 1.9e9 < sum(sizes) < 2.1e9
    assert not any(size % 8 for size in sizes)
    assert {dtype for _, dtype, _ in loaders.shapes()} == set(BYTES)


def test_every_peer_has_a_loader_and_a_file():
    assert loaders.LOADERS.keys() == loaders.FILES.keys() == {"gpufn", *weights.PEERS}


class Answers:
    """Loaders that take as long as they are told."""

    def __init__(self, seconds, sums=None):
        self.seconds, self.sums, self.asked = seconds, sums or {}, []

    def __call__(self, _python, _what, _folder, name, _device, heat):
        self.asked.append(name)
        if name not in self.seconds:
            raise RuntimeError("no such symbol")
        return f'{{"seconds": {[self.seconds[name]]}, "bytes": 1000000000, "sum": {self.sums.get(name, 7)}}}\n'


@pytest.fixture
def rounds(tmp_path, monkeypatch):
    def rounds(answers, missing=()):
        monkeypatch.setattr(weights, "_loaders", answers)
        monkeypatch.setattr(weights, "read_through", lambda path: None)
        monkeypatch.setattr(weights, "drop", lambda path: None)
        monkeypatch.setattr(weights, "dd", lambda path, flags: 4e9 if flags else 2e9)
        return weights.Rounds(tmp_path / "python", tmp_path, dict(missing))

    return rounds


def test_bars_compare_with_the_best_peer_and_the_better_disk_and_say_who_is_missing(rounds):
    measured = rounds(
        Answers({"gpufn": 0.5, "safetensors": 2.0, "torch_mmap": 1.0}), {"runai": "it cannot be installed"}
    )
    for _ in range(3):
        measured.one()
    bars = {bar.name: bar for bar in measured.bars()}
    assert bars["weights_warm_over_best_peer"].value == bars["weights_cold_over_best_peer"].value == 2
    assert bars["weights_cold_over_disk"].value == 0.5
    assert bars["weights_cold_torch_mmap"].value == 1
    first = bars["weights_warm_over_best_peer"].runs[0]
    assert first["best"] == "torch_mmap"
    assert first["runai"] == "it cannot be installed"
    assert "no such symbol" in first["tensorizer"]


def test_turns_change_places(rounds):
    answers = Answers(dict.fromkeys(loaders.FILES, 1.0))
    measured = rounds(answers)
    for _ in range(2):
        measured.one()
    half = len(answers.asked) // 2
    assert answers.asked[:2] == ["gpufn", "gpufn"]
    assert answers.asked[half : half + 2] == ["safetensors", "safetensors"]
    assert answers.asked.count("gpufn") == answers.asked.count("runai") == 4


def test_other_bytes_than_the_others_are_no_result(rounds):
    with pytest.raises(RuntimeError, match="runai loaded other bytes"):
        rounds(Answers(dict.fromkeys(loaders.FILES, 1.0), {"runai": 8})).one()


def test_ours_has_to_run(rounds):
    with pytest.raises(RuntimeError, match="no such symbol"):
        rounds(Answers({"safetensors": 1.0})).one()


def test_cold_and_warm_are_made_sure_of(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(2**20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    loaders.read_through(path)
    assert loaders.resident(path) == 1
    try:
        loaders.drop(path)
    except RuntimeError as error:
        assert "stay in the page cache" in str(error)
    else:
        assert loaders.resident(path) == 0


def test_every_bar_is_explained(repository):
    text = (repository / "benchmarks" / "README.md").read_text()
    ours = {name for name in WANTED if name.startswith(("weights_", "second_", "stream_"))}
    assert len(ours) == 5
    assert all(f"`{name}`" in text for name in ours)
