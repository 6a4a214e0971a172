"""How the parts of `make gpu-bench` are run and kept; what they measure needs a GPU."""

import importlib
import json
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from adapter.gpu.client import start_helper
from adapter.gpu.wire import Operation
from benchmarks.gpu import __main__ as runner, bench as bench_module, kills, llama, park
from benchmarks.gpu.__main__ import PARTS, Outcome, heard, outcome_of
from benchmarks.gpu.bench import GB, MIB, Bench, label
from benchmarks.results_file import WANTED, Bar
from benchmarks.session import Answer
from tests.conftest import has_gpu

LOST = Bar.of("gpu_turns_lost", 0, "requests")


@pytest.fixture
def parts(monkeypatch):
    """What comes of each part instead of running it; asked for are only these."""

    def parts(**outcomes):
        asked = []

        def run(name, _environment, limit_s, *flags):
            asked.append((name, limit_s, flags))
            return outcomes[name]

        monkeypatch.setattr(runner, "outcome_of", run)
        return asked

    return parts


def run_all(names, **options):
    bars = runner.run_all(names, {}, **{"simulated": True, "results": None, **options})
    return {bar.name: bar for bar in bars}


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_module_that_says_what_it_measures(name):
    module = importlib.import_module(f"benchmarks.gpu.{name}")
    assert callable(module.run)
    assert module.__doc__


def test_a_part_that_fails_is_kept_with_its_reason_and_stops_no_other(parts, tmp_path):
    parts(park=Outcome(failed="The driver hangs."), turns=Outcome([LOST]))
    bars = run_all(["park", "turns"], results=tmp_path)
    assert (bars["gpu_park_failed"].met, bars["gpu_park_failed"].runs) == (False, ("The driver hangs.",))
    assert bars["gpu_turns_lost"].met is bars["gpu_turns_failed"].met is True
    (file,) = tmp_path.glob("*.json")
    kept = json.loads(file.read_text())
    assert [bar["name"] for bar in kept["bars"]] == ["gpu_park_failed", "gpu_turns_lost", "gpu_turns_failed"]
    assert kept["machine"]["gpu"] == {"simulated": True}
    assert "simulated GPU" in file.with_suffix(".svg").read_text()


def test_parts_for_which_no_time_is_left_are_failed_ones(parts, monkeypatch):
    asked = parts()
    monkeypatch.setattr(runner, "_ALL_S", 0.0)
    assert "No time" in run_all(["park"])["gpu_park_failed"].runs[0]
    assert not asked


def test_a_part_gets_its_own_limit_and_never_more_than_is_left(parts, monkeypatch):
    asked = parts(llama=Outcome(), park=Outcome())
    monkeypatch.setattr(runner, "_ALL_S", 100.0)
    run_all(["llama", "park"])
    assert [limit_s <= 100 for _, limit_s, _ in asked] == [True, True]
    assert asked[1][1] == PARTS["park"].limit_s


def test_a_simulated_gpus_speeds_are_measured_against_nothing(parts):
    slow = Bar.of("gpu_weights_over_pcie", 0.1, "ratio")
    assert slow.met is False
    parts(stream=Outcome([slow]), turns=Outcome([Bar.of("gpu_turns_lost", 1, "requests")]))
    bars = run_all(["stream", "turns"])
    assert bars["gpu_weights_over_pcie"].met is None
    assert bars["gpu_turns_lost"].met is False


def test_what_was_measured_until_the_end_came_is_kept():
    first, again = Bar.of("gpu_toy_load_s", 2, "s"), Bar.of("gpu_toy_load_s", 1, "s", [2, 1])
    lines = [json.dumps({"bar": bar.to_json()}) for bar in (LOST, first, again)]
    outcome = heard([*lines, json.dumps({"failed": "why"}), json.dumps({"starts": {"a": 1}}), lines[0][:20]])
    assert (outcome.failed, outcome.starts) == ("why", {"a": 1})
    assert [(bar.name, bar.value) for bar in outcome.all_bars("toy")] == [
        ("gpu_turns_lost", 0), ("gpu_toy_load_s", 1), ("gpu_toy_failed", 1),
    ]  # fmt: skip


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_a_real_part_says_why_it_cannot_be_run():
    outcome = outcome_of("canaries", os.environ, 60)
    assert "No GPU can be used here" in outcome.failed or "driver" in outcome.failed
    assert not outcome.bars


def test_a_part_that_is_not_done_in_its_time_is_ended():
    assert outcome_of("canaries", os.environ, 0.001).failed == "It was not done in 0 s."


def test_without_a_gpu_one_line_says_so_and_nothing_has_failed(monkeypatch, capsys):
    monkeypatch.setattr(runner, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu-bench"])
    assert runner.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "no NVIDIA GPU" in line


def test_sizes_that_do_not_fit_are_named_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "memory_bytes", lambda: (24 * GB, 2 * GB))
    monkeypatch.setattr(bench_module, "available_bytes", lambda: 10 * GB)
    fitting, left_out = Bench(tmp_path).sizes([1 * GB, 8 * GB, 40 * GB], host=1.5)
    assert fitting == [1 * GB]
    assert left_out == {"8gb": "not enough host memory", "40gb": "not enough GPU memory, host memory"}
    with pytest.raises(RuntimeError, match="nothing fits"):
        Bench(tmp_path).sizes([40 * GB], host=1.5)


def test_labels_are_words():
    assert (label(8 * GB), label(4 * MIB)) == ("8gb", "4mib")


def test_a_process_that_does_not_come_up_is_no_measurement(monkeypatch):
    monkeypatch.setattr(park.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="did not come up"), park.holder(MIB):
        pass


@pytest.mark.gpu
def test_a_process_whose_part_was_killed_ends_though_it_is_parked(simulated, monkeypatch, tmp_path):
    monkeypatch.setenv("LD_LIBRARY_PATH", simulated.search_path)
    with park.holder(MIB) as process, start_helper(str(tmp_path / "h")) as helper, helper.connect() as client:
        pidfd = os.pidfd_open(process.pid)
        assert client.ask(Operation.PARK, pidfd).error is None
        os.close(pidfd)
        process.stdin.close()
        assert process.wait(60) == 0
        process.stdin = None


@pytest.mark.parametrize("met", [(), ("helper", "parking")])
def test_kills_that_met_nobody_are_no_result(tmp_path, monkeypatch, met):
    """Without it nothing would be lost or leak, and every bar hold."""
    ended = []
    answer = Answer(200, b'{"whole": true}', None, 0.0, 0.0)
    session = SimpleNamespace(pid=0, call=lambda name, timeout_s: answer)
    monkeypatch.setattr(kills, "memory_bytes", lambda: (GB, GB))
    monkeypatch.setattr(kills, "sharing", lambda bench, names: nullcontext(session))
    monkeypatch.setattr(kills, "left_behind", lambda *_: [])
    monkeypatch.setattr(kills, "_MET_S", 0)
    monkeypatch.setattr(kills, "victims", lambda _, kind: [0] if kind in met else [])
    monkeypatch.setattr(kills.os, "kill", lambda pid, number: ended.append(pid))
    with pytest.raises(RuntimeError, match=r"never killed: .*waking"):
        list(kills.run(Bench(tmp_path, simulated=True)))
    assert bool(ended) is bool(met)


# The Llama --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "host", "layers", "lacking"),
    [(80, 128, 32, ""), (16, 128, 16, "GPU memory"), (80, 12, 4, "host memory"), (4, 1, 1, "GPU memory, host memory")],
)
def test_a_model_that_does_not_fit_has_fewer_layers_and_says_why(gpu, host, layers, lacking, tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "memory_bytes", lambda: (gpu * GB, 0))
    monkeypatch.setattr(llama, "available_bytes", lambda: host * GB)
    monkeypatch.setattr(llama.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**13}))
    assert llama.fitting_layers(tmp_path) == (layers, lacking)


def test_the_whole_model_has_eight_billion_numbers_of_two_bytes():
    shape = json.loads((llama.FUNCTION / "config.json").read_text())
    width, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    grouped = width // heads * shape["num_key_value_heads"]
    layer = 2 * width * width + 2 * width * grouped + 3 * width * inner
    whole = 2 * (shape["num_hidden_layers"] * layer + 2 * shape["vocab_size"] * width)
    assert shape["num_hidden_layers"] == llama.LAYERS
    assert whole == pytest.approx(llama.size_bytes(llama.LAYERS), rel=0.01)
    assert 15.5e9 < whole < 16.5e9


def test_its_environment_is_that_of_the_functions(repository):
    for name in ("requirements.txt", "requirements-nodeps.txt"):
        assert (llama.FUNCTION / name).read_text() == (repository / "functions" / "generate" / name).read_text()


def test_an_answer_that_differs_from_the_first_one_is_wrong():
    class Answer:
        status = 200

        def __init__(self, body):
            self.body = body

    subject = llama.llama()
    assert [subject.is_right(Answer(body)) for body in (b"1\n", b"1\n", b"2\n")] == [True, True, False]
    assert not llama.llama().is_right(Answer(b""))


def test_every_bar_is_explained(repository):
    text = (repository / "benchmarks" / "README.md").read_text()
    ours = [name for name in WANTED if name.startswith("gpu_")]
    assert len(ours) == 9
    assert all(f"`{name}`" in text for name in ours)
