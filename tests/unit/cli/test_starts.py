import csv
import io
import json
import time
import xml.etree.ElementTree as ET

import pytest
import yaml

from adapter.cli.main import run
from adapter.cli.timeline import BAR_CELLS, COLOURS, bars, picture
from adapter.ledger.store import Ledger, ledger_url
from adapter.records import Phase, PhaseName, Rung, SkippedRung, StartRecord

MS = 10**6


def record(rung=Rung.LOAD, *, function="embed", at_ns=0, phases=None, **changes):
    """Phases as (name, start, end) in milliseconds."""
    phases = phases or [("boot", 0, 100), ("load", 100, 900), ("first_response", 900, 1000)]
    fields = {
        "function": function, "namespace": "openfaas-fn", "revision": "1", "replica": f"{function}-{at_ns}", "rung": rung,
        "started_at_ns": 1_700_000_000 * 10**9 + at_ns, "total_ns": max(end for _, _, end in phases) * MS,
        "phases": tuple(Phase(PhaseName(name), start * MS, end * MS) for name, start, end in phases),
    }  # fmt: skip
    return StartRecord(**(fields | changes))


PLAIN = record(
    skipped=(
        SkippedRung(Rung.RESTORE, "no-snapshot", "no snapshot fits yet. The kernel differs."),
        SkippedRung(Rung.START, "off", "The handler defines no `build`."),
    ),
    held_requests=2,
)
RESTORED = record(
    Rung.RESTORE, at_ns=60 * 10**9, phases=[("schedule", 0, 10), ("restore", 10, 60), ("first_response", 60, 80)]
)
FAILED = record(function="broken", at_ns=90 * 10**9, phases=[("boot", 0, 50)], error="load raised ValueError")


@pytest.fixture
def _ledger(state_dir, monkeypatch):
    monkeypatch.setenv("GPUFN_HOME", str(state_dir))
    ledger = Ledger.open(ledger_url(state_dir))
    for each in (PLAIN, RESTORED, FAILED):
        ledger.add_start(each)
    ledger.close()


@pytest.mark.usefixtures("_ledger")
class TestCommand:
    def test_a_column_for_each_phase_there_is_in_order(self, capsys):
        assert run(["starts", "embed"]) == 0
        header, plain, restored = (line.split() for line in capsys.readouterr().out.splitlines())
        assert header == [
            "STARTED",
            "FUNCTION",
            "RUNG",
            "TOTAL",
            "SCHEDULE",
            "BOOT",
            "RESTORE",
            "LOAD",
            "FIRST_RESPONSE",
        ]
        assert plain == ["2023-11-14T22:13:20Z", "embed", "load", "1.00s", "–", "100ms", "–", "800ms", "100ms"]
        assert restored == ["2023-11-14T22:14:20Z", "embed", "restore", "80ms", "10ms", "–", "50ms", "–", "20ms"]

    def test_the_latest_comes_last_and_last_counts_from_there(self, capsys):
        assert run(["starts", "--last", "2", "-o", "json"]) == 0
        assert [r["function"] for r in json.loads(capsys.readouterr().out)] == ["embed", "broken"]

    def test_a_failed_start_says_why(self, capsys):
        assert run(["starts", "broken"]) == 0
        assert "load failed" in (out := capsys.readouterr().out)
        assert out.splitlines()[1].endswith("load raised ValueError")

    def test_wide_says_why_faster_rungs_were_skipped(self, capsys):
        assert run(["starts", "embed", "-o", "wide"]) == 0
        header, plain, _ = capsys.readouterr().out.splitlines()
        assert "SKIPPED" in header
        assert "restore: no snapshot fits yet" in plain
        assert "The kernel differs" not in plain  # --timeline says it all
        assert "build" not in plain  # most handlers have none

    def test_json_and_yaml_are_the_record_itself(self, capsys):
        for form, read in (("json", json.loads), ("yaml", yaml.safe_load)):
            assert run(["starts", "embed", "-o", form]) == 0
            assert [StartRecord.from_json(r) for r in read(capsys.readouterr().out)] == [PLAIN, RESTORED]

    def test_csv_has_whole_nanoseconds(self, capsys):
        assert run(["starts", "embed", "-o", "csv"]) == 0
        plain, restored = csv.DictReader(io.StringIO(capsys.readouterr().out))
        assert (plain["started_at_ns"], plain["load_ns"], plain["restore_ns"]) == (
            str(PLAIN.started_at_ns),
            str(800 * MS),
            "",
        )
        assert restored["total_ns"] == str(80 * MS)
        assert (restored["rung"], restored["error"]) == ("restore", "")

    def test_names_are_replicas_which_logs_take(self, capsys):
        assert run(["starts", "embed", "-o", "name"]) == 0
        assert capsys.readouterr().out.split() == [PLAIN.replica, RESTORED.replica]

    def test_a_name_may_have_its_namespace_in_it(self, capsys):
        assert run(["starts", "embed.openfaas-fn", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)) == 2

    def test_every_namespace_is_named(self, capsys):
        assert run(["starts", "-A"]) == 0
        assert capsys.readouterr().out.split()[2] == "NAMESPACE"

    def test_namespaces_and_time_narrow_it(self, capsys):
        assert run(["starts", "-n", "other", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == []
        assert run(["starts", "--since", "1h", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == []
        hours = int(time.time() - PLAIN.started_at_ns / 1e9) // 3600 + 1
        assert run(["starts", "--since", f"{hours}h", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)) == 3

    def test_since_that_is_no_duration_is_refused(self, capsys):
        assert run(["starts", "--since", "yesterday"]) == 2
        assert "--since" in capsys.readouterr().err

    def test_bars(self, capsys):
        assert run(["starts", "--timeline"]) == 0
        out = capsys.readouterr().out
        assert "load raised ValueError" in out
        assert "not restore: no snapshot fits yet. The kernel differs." in out
        assert "no `build`" not in out

    def test_a_picture_is_written_beside_the_table(self, tmp_path, capsys):
        assert run(["starts", "--picture", str(tmp_path / "starts.svg")]) == 0
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 4
        assert "starts.svg" in err
        assert ET.parse(tmp_path / "starts.svg").getroot().tag.endswith("svg")

    def test_a_picture_that_cannot_be_written(self, tmp_path, capsys):
        assert run(["starts", "--picture", str(tmp_path / "none" / "starts.svg")]) == 3
        assert "No such file" in capsys.readouterr().err


def test_nothing_yet_says_what_to_do(state_dir, capsys):
    (state_dir / "functions").mkdir()
    (state_dir / "functions" / "embed.openfaas-fn.json").touch()
    assert run(["starts", "embed", "--state", str(state_dir)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "No starts of embed.openfaas-fn. Call a function: gpufn invoke embed\n"


def test_a_function_that_is_not_known_is_an_error(state_dir, capsys):
    for words in (["absent"], ["absent.team1", "--json"], ["absent", "-A"]):
        assert run(["starts", *words, "--state", str(state_dir)]) == 4
        out, err = capsys.readouterr()
        assert out == ""
        assert "No function absent" in err
        assert str(state_dir) in err


def test_a_bar_stands_where_its_phase_was():
    lines = bars([PLAIN]).splitlines()[1:4]
    drawn = [line.split("|")[1] for line in lines]
    assert [len(bar) for bar in drawn] == [BAR_CELLS] * 3
    assert drawn[0].rstrip() == "█" * round(BAR_CELLS / 10)
    assert [len(bar) - len(bar.lstrip()) for bar in drawn] == [0, int(BAR_CELLS * 0.1), int(BAR_CELLS * 0.9)]
    assert all(len(line) <= 80 for line in lines)


def test_the_shortest_phase_has_a_cell_and_nothing_runs_over():
    odd = record(phases=[("boot", 0, 0), ("load", 0, 100_000), ("first_response", 100_000, 100_000)])
    for shown in (odd, record(phases=[("boot", 0, 0)]), record(total_ns=5)):
        for line in bars([shown]).splitlines()[1:]:
            bar = line.split("|")[1]
            assert len(bar) == BAR_CELLS
            assert "█" in bar


SVG = "{http://www.w3.org/2000/svg}"


def boxes(svg):
    """Class -> rectangles (x, y, width) that are phases: those with a tooltip."""
    root = ET.fromstring(svg)
    return [
        (box.get("class"), float(box.get("x")), float(box.get("y")), float(box.get("width")))
        for box in root.iter(f"{SVG}rect")
        if box.find(f"{SVG}title") is not None
    ]


def test_lanes_have_one_scale_and_bars_their_place():
    drawn = boxes(picture([PLAIN, RESTORED]))
    assert [kind for kind, *_ in drawn] == ["boot", "load", "first_response", "schedule", "restore", "first_response"]
    widths = {kind: width for kind, _, _, width in drawn[:2]} | {"restore": drawn[4][3]}
    assert widths["load"] / widths["boot"] == pytest.approx(8, rel=0.02)
    assert widths["load"] / widths["restore"] == pytest.approx(16, rel=0.02)
    assert drawn[0][1] == drawn[3][1]
    assert len({y for _, _, y, _ in drawn}) == 2


def test_phases_that_overlap_stand_below_each_other():
    overlapping = record(phases=[("import", 0, 500), ("load", 200, 800), ("warmup", 800, 900)])
    (_, _, first, _), (_, _, second, _), (_, _, third, _) = boxes(picture([overlapping]))
    assert first < second
    assert third == first
    below = boxes(picture([overlapping, PLAIN]))[3][2]
    assert below > second


def test_a_picture_says_everything_in_words_and_knows_the_dark():
    svg = picture([PLAIN, FAILED])
    words = " ".join(ET.fromstring(svg).itertext())
    for text in ("embed", "broken", "load failed", "1.00s", "boot: 100ms, from 0ms", "first response", "0.5 s"):
        assert text in words
    assert "prefers-color-scheme: dark" in svg


def test_colours_are_fixed_and_each_phase_has_its_own():
    assert set(COLOURS) == set(PhaseName)
    for ground in (0, 1):
        assert len({pair[ground] for pair in COLOURS.values()}) == len(PhaseName)


def test_names_that_are_markup_stay_words():
    svg = picture([record(function='<script>&"')])
    assert "<script>" not in svg
    assert '<script>&"' in " ".join(ET.fromstring(svg).itertext())


def test_a_legend_that_is_too_long_goes_on_below():
    every = record(phases=[(name.value, n * 10, n * 10 + 10) for n, name in enumerate(PhaseName)])
    root = ET.fromstring(picture([every]))
    legend = [box for box in root.iter(f"{SVG}rect") if box.get("width") == "12"]
    assert [box.get("class") for box in legend] == [name.value for name in PhaseName]
    assert all(float(box.get("x")) < 940 for box in legend)


@pytest.mark.parametrize("records", [[], [record(phases=[("boot", 0, 0)])], [record(phases=[("load", 0, 3_600_000)])]])
def test_pictures_of_little_and_of_much(records):
    root = ET.fromstring(picture(records))
    ticks = list(root.iter(f"{SVG}line"))
    assert 2 <= len(ticks) <= 12


def test_every_length_has_a_few_round_ticks():
    for total_ms in (1, 7, 19, 20, 21, 49, 50, 51, 99, 100, 101, 999, 12_345, 10**6):
        root = ET.fromstring(picture([record(phases=[("load", 0, total_ms)])]))
        assert 2 <= len(list(root.iter(f"{SVG}line"))) <= 12
