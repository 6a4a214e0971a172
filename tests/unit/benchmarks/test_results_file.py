import json
import xml.etree.ElementTree as ET
from datetime import datetime, timezone

import pytest

from benchmarks import plot
from benchmarks.results_file import WANTED, Bar, merged, ratio_of_medians, save
from tests.unit.test_records import RECORD

NOON = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)


def saved(folder, *bars, starts=None):
    path = save(bars, starts or {}, folder=folder, now=lambda: NOON)
    return path, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("name", "value", "met"),
    [("listen_ms", 100, True), ("listen_ms", 100.1, False), ("embed_plain_over_restored", 15, True),
     ("embed_plain_over_restored", 14.9, False), ("held_500_lost", 0, True), ("held_500_lost", 1, False), ("anything", 1, None)],
)  # fmt: skip
def test_a_bar_knows_whether_it_is_met(name, value, met):
    assert Bar.of(name, value, "x").met is met


def test_the_file_has_the_form_that_was_agreed(tmp_path):
    path, data = saved(tmp_path, Bar.of("listen_ms", 80.12345, "ms", [80, 81]))
    assert path.name.endswith("_2026-11-24.json")
    assert data["date"] == "2026-11-24T12:00:00Z"
    assert data["bars"] == [
        {"name": "listen_ms", "value": 80.1235, "unit": "ms", "runs": [80, 81], "bar": "<= 100", "met": True}
    ]
    assert {"cpu", "cores", "memory_gib", "kernel", "python", "criu"} <= data["machine"].keys()


def test_the_machine_has_no_name(tmp_path):
    import platform

    _, data = saved(tmp_path)
    assert platform.node() not in json.dumps(data["machine"]).split('"')


def test_bars_of_one_day_come_together(tmp_path):
    saved(tmp_path, Bar.of("listen_ms", 80, "ms"), starts={"a": {"x": 1}})
    _, data = saved(tmp_path, Bar.of("held_500_lost", 0, "requests"), starts={"b": {"x": 2}})
    assert [bar["name"] for bar in data["bars"]] == ["listen_ms", "held_500_lost"]
    assert data["starts"] == {"a": {"x": 1}, "b": {"x": 2}}


def test_measuring_again_keeps_what_was_measured_before(tmp_path):
    for value in (120, 110, 90):
        _, data = saved(tmp_path, Bar.of("listen_ms", value, "ms"))
    assert data["bars"][0]["value"] == 90
    assert data["bars"][0]["earlier"] == [{"value": 120, "met": False}, {"value": 110, "met": False}]


def test_merging_keeps_order():
    old = [{"name": "a", "value": 1, "met": None}, {"name": "b", "value": 2, "met": None}]
    assert [bar["name"] for bar in merged(old, [{"name": "b"}, {"name": "c"}])] == ["a", "b", "c"]


def test_ratios_are_of_medians():
    assert ratio_of_medians([10, 1000, 12], [1, 2, 3]) == 6


def test_pictures_are_valid_and_say_every_bar(tmp_path):
    bars = [Bar.of(name, 1, "x<y") for name in WANTED] + [Bar.of("a fact", 1, "s")]
    path, _ = saved(tmp_path, *bars, starts={"embed <plain>": RECORD.to_json()})
    plot.write_plots(path)
    text = "".join(ET.parse(path.with_suffix(".svg")).getroot().itertext())
    assert all(name in text for name in WANTED)
    assert "a fact" not in text
    starts = "".join(ET.parse(path.with_name(f"{path.stem}_starts.svg")).getroot().itertext())
    assert "embed, <plain> start" in starts
    assert "until its first answer has ended" in starts


def test_without_starts_there_is_no_picture_of_them(tmp_path):
    path, _ = saved(tmp_path, Bar.of("listen_ms", 1, "ms"))
    plot.write_plots(path)
    assert [p.name for p in tmp_path.glob("*.svg")] == [path.with_suffix(".svg").name]
