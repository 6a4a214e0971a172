import os
from dataclasses import fields
from pathlib import Path

import pytest

from adapter.errors import ConfigError, HandlerError
from adapter.spec import FIELDS, FunctionSpec, asked_in, parse_spec, read_config, read_handler_shape


def shape(tmp_path, source: str):
    (tmp_path / "handler.py").write_text(source)
    return read_handler_shape(tmp_path)


def test_nothing_asked_gives_the_defaults():
    spec = parse_spec({}, {})
    for item in FIELDS:
        if item.name != "in_flight":
            assert getattr(spec, item.name) == item.default
    assert spec.in_flight == 8


def test_the_table_and_the_spec_have_the_same_fields():
    assert [item.name for item in FIELDS] == [item.name for item in fields(FunctionSpec)]


def test_no_two_keys_collide():
    assert len({item.annotation for item in FIELDS}) == len({(item.table, item.key) for item in FIELDS}) == len(FIELDS)


def test_an_annotation_wins_over_the_file():
    spec = parse_spec({"scale": {"idle": "5m", "max": 3}}, {"gpufn.dev/idle": "10s", "com.openfaas.scale.max": "9"})
    assert (spec.idle_s, spec.max_replicas) == (10.0, 3)


def test_values_as_annotations_write_them():
    given = {
        "gpu": "0.5",
        "models": "a100,l40s",
        "memory": "16Gi",
        "in-flight": "4",
        "snapshot": "off",
        "snapshot-env": "A B",
    }
    spec = parse_spec({}, {f"gpufn.dev/{name}": text for name, text in given.items()})
    assert (spec.gpus, spec.gpu_models, spec.gpu_memory_bytes) == (0.5, ("a100", "l40s"), 16 * 2**30)
    assert (spec.in_flight, spec.process_snapshot, spec.snapshot_env) == (4, "off", ("A", "B"))


def test_a_gpu_function_handles_one_request_at_once_unless_told():
    assert parse_spec({"gpu": {"count": 1}}, {}).in_flight == 1
    assert parse_spec({"gpu": {"count": 1}, "scale": {"in_flight": 6}}, {}).in_flight == 6


def test_a_switch_may_be_written_as_toml_boolean():
    assert parse_spec({"snapshot": {"process": False, "weights": True}}, {}).process_snapshot == "off"


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("scale", "min", -1), ("scale", "min", 1.5), ("scale", "min", True), ("scale", "min", "many"), ("scale", "max", 0),
        ("scale", "max", float("inf")), ("scale", "max", float("nan")), ("scale", "idle", "soon"), ("scale", "idle", -1),
        ("scale", "idle", "800h"), ("limits", "start_timeout", "0s"), ("limits", "body", "big"), ("limits", "body", 1.5),
        ("gpu", "count", 1.5), ("gpu", "count", -0.5), ("gpu", "count", [1]), ("gpu", "models", [1]), ("gpu", "models", {}),
        ("gpu", "mig", "big"), ("gpu", "mig", 1), ("gpu", "mig", "1g.5gb; rm"), ("gpu", "compute", "new"), ("gpu", "compute", "< 8"),
        ("gpu", "compute", ""), ("gpu", "compute", float("inf")), ("gpu", "spot", "often"), ("scale", "cold_price", -1),
        ("scale", "cold_price", "1e9"), ("scale", "cold_price", float("nan")), ("scale", "idle_max", "0s"), ("scale", "idle_max", "-5m"),
        ("scale", "idle_max", "10000h"), ("price", "budget", -1), ("price", "budget", "much"), ("price", "budget", float("nan")),
        ("snapshot", "process", "maybe"), ("snapshot", "process", 1), ("price", "class", 3),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name_with_the_accepted_form(table, key, value):
    with pytest.raises(ConfigError) as caught:
        parse_spec({table: {key: value}}, {})
    assert f"{table}.{key}" in caught.value.message
    assert caught.value.hint.startswith("Write ")
    assert caught.value.code == "bad-value"


@pytest.mark.parametrize(
    ("file", "annotations", "hint"),
    [
        ({"scale": {"idel": "5m"}}, {}, "scale.idle"),
        ({"scael": 1}, {}, "[scale]"),
        ({}, {"gpufn.dev/in-fligth": "1"}, "gpufn.dev/in-flight"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(file, annotations, hint):
    with pytest.raises(ConfigError) as caught:
        parse_spec(file, annotations)
    assert caught.value.code == "unknown-key"
    assert hint in caught.value.hint


def test_an_unknown_key_like_nothing_lists_what_there_is():
    with pytest.raises(ConfigError) as caught:
        parse_spec({"qqq": {"qqq": 1}}, {})
    assert "scale.idle" in caught.value.hint


@pytest.mark.parametrize("text", ["8.0", ">= 8.0", ">=8", " 8 ", 8, 8.0])
def test_a_least_compute_capability_may_be_written_in_several_ways(text):
    assert parse_spec({"gpu": {"compute": text}}, {}).compute_capability == (8, 0)


def test_any_compute_capability_is_none_in_particular():
    assert parse_spec({"gpu": {"compute": "any"}}, {}).compute_capability is None


def test_idle_time_is_learned_unless_it_is_said():
    assert parse_spec({}, {"gpufn.dev/idle": "auto"}).idle_s is None is parse_spec({}, {}).idle_s
    assert parse_spec({}, {"gpufn.dev/idle": "0"}).idle_s == 0


def test_a_budget_is_gpu_seconds_or_the_time_of_one_gpu():
    assert parse_spec({}, {"gpufn.dev/budget": "7200"}) == parse_spec({}, {"gpufn.dev/budget": "2h"})


@pytest.mark.parametrize(
    ("gpu", "count"),
    [({"mig": "1g.5gb"}, 1), ({"mig": "mig-1g.10gb+me", "count": 2}, 2), ({"mig": "3G.20GB", "memory": "20Gi"}, 1)],
)
def test_a_mig_profile_means_one_slice_unless_told(gpu, count):
    spec = parse_spec({"gpu": gpu}, {})
    assert (spec.gpus, spec.in_flight) == (count, 1)
    assert spec.mig_profile == gpu["mig"].lower().removeprefix("mig-")


def test_no_gpu_wins_over_the_profile_of_one():
    assert parse_spec({"gpu": {"mig": "1g.5gb"}}, {"gpufn.dev/gpu": "0"}).gpus == 0


@pytest.mark.parametrize("gpu", [{"mig": "1g.5gb", "count": 0.5}, {"mig": "1g.5gb", "memory": "6Gi"}])
def test_a_mig_profile_is_refused_beside_what_contradicts_it(gpu):
    with pytest.raises(ConfigError, match="contradict") as caught:
        parse_spec({"gpu": gpu}, {})
    assert caught.value.code == "contradiction"


def test_which_attributes_annotations_set():
    assert asked_in({"gpufn.dev/mig": "1g.5gb", "gpufn.dev/idle": "auto", "other/gpu": "1"}) == {
        "mig_profile",
        "idle_s",
    }


def test_least_replicas_cannot_exceed_most():
    with pytest.raises(ConfigError, match="above"):
        parse_spec({"scale": {"min": 3}}, {})


@pytest.mark.parametrize(
    ("file", "annotations", "said"),
    [
        ({"scale": {"min": 3, "max": 2}}, {}, "gpufn.toml: scale.min = 3 is above gpufn.toml: scale.max = 2."),
        ({}, {"min": "3", "max": "2"}, "annotation gpufn.dev/min = 3 is above annotation gpufn.dev/max = 2."),
        ({}, {"min": "3"}, "annotation gpufn.dev/min = 3 is above the default of scale.max = 1."),
        (
            {"scale": {"min": 3, "max": 4}},
            {"max": "2"},
            "gpufn.toml: scale.min = 3 is above annotation gpufn.dev/max = 2.",
        ),
        (
            {},
            {"mig": "1g.5gb", "gpu": "0.5"},
            "annotation gpufn.dev/gpu = 0.5 and annotation gpufn.dev/mig = 1g.5gb contradict each other.",
        ),
        (
            {"gpu": {"mig": "1g.5gb"}},
            {"memory": "6Gi"},
            "annotation gpufn.dev/memory = 6.0Gi and gpufn.toml: gpu.mig = 1g.5gb contradict each other.",
        ),
    ],
)
def test_what_contradicts_another_is_named_as_it_was_written(file, annotations, said):
    with pytest.raises(ConfigError) as caught:
        parse_spec(file, {f"gpufn.dev/{key}": text for key, text in annotations.items()})
    assert caught.value.message == said


def test_initial_replicas_stay_below_the_most():
    assert parse_spec({"scale": {"initial": 9, "max": 2}}, {}).initial_replicas == 2


def test_a_folder_without_a_file_asks_nothing(tmp_path):
    assert read_config(tmp_path) == {}


def test_the_file_is_read(tmp_path):
    (tmp_path / "gpufn.toml").write_text('[scale]\nidle = "1m"\n')
    assert read_config(tmp_path) == {"scale": {"idle": "1m"}}


@pytest.mark.parametrize("content", [b"[scale", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "gpufn.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"gpufn\.toml is not valid TOML"):
        read_config(tmp_path)


def test_a_file_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "gpufn.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"gpufn\.toml is not valid TOML"):
        read_config(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_named(tmp_path, make):
    make(tmp_path / "gpufn.toml")
    with pytest.raises(ConfigError, match=r"gpufn\.toml is no file"):
        read_config(tmp_path)


def test_a_handler_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "handler.py").mkdir()
    with pytest.raises(HandlerError, match="cannot be read"):
        read_handler_shape(tmp_path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def handle(event, context): ...", (False, False, 2)),
        ("def handle(request): ...", (False, False, 1)),
        ("def handle(*args): ...", (False, False, 2)),
        ("async def handle(event, context): ...", (False, False, 2)),
        ("def load(device): ...\ndef build(device): ...\ndef handle(e, c): ...", (True, True, 2)),
        ("from model import handle, load", (True, False, 2)),
        ("from model import infer as handle", (False, False, 2)),
        ("def make(): ...\nhandle = make()", (False, False, 2)),
    ],
)
def test_a_handler_is_read_without_running_it(tmp_path, source, expected):
    found = shape(tmp_path, source)
    assert (found.has_load, found.has_build, found.handle_arguments) == expected


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("def handel(event, context): ...", "handler-missing"),
        ("def handle(", "handler-syntax"),
        ("\0", "handler-syntax"),
        ("x = " + "-" * 3_000 + "1", "handler-syntax"),
        ("x = " + "-" * 300_000 + "1", "handler-syntax"),
    ],
)
def test_a_handler_that_cannot_work_is_refused(tmp_path, source, code):
    with pytest.raises(HandlerError) as caught:
        shape(tmp_path, source)
    assert caught.value.code == code


def test_reading_a_handler_runs_nothing(tmp_path):
    shape(tmp_path, "raise SystemExit('ran')\ndef handle(event, context): ...")


def test_a_folder_without_a_handler_says_how_to_start_one(tmp_path):
    with pytest.raises(HandlerError) as caught:
        read_handler_shape(tmp_path)
    assert "gpufn init" in caught.value.hint


@pytest.mark.parametrize("key", ["source", "digest", "include", "dtype"])
def test_what_is_built_into_an_image_is_no_annotation(key):
    with pytest.raises(ConfigError) as caught:
        parse_spec({}, {f"gpufn.dev/weights-{key}": "x"})
    assert caught.value.code == "built-in"
    assert f"{key} under [weights] in gpufn.toml" in caught.value.hint


def test_the_weights_of_an_image():
    spec = parse_spec({"weights": {"source": "./model", "include": ["*.safetensors"], "dtype": "bfloat16"}}, {})
    assert (spec.weights_source, spec.weights_include) == ("./model", ("*.safetensors",))
    assert (spec.weights_dtype, spec.weights_digest) == ("bfloat16", "")
