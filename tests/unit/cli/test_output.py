import csv
import io
import json
from decimal import Decimal

import click
import pytest
import yaml

from adapter.cli import output as module
from adapter.cli.main import run
from adapter.cli.output import Column, Output, format_instant, format_table, output_options, progress

ROWS = [{"name": "embed", "seconds": 1.25, "tags": ["a", "b"]}, {"name": 'a, "b"', "seconds": None, "tags": []}]
COLUMNS = [
    Column("NAME", "name"),
    Column("SECONDS", "seconds", lambda s: "–" if s is None else f"{s:.1f}s", right=True),
    Column("TAGS", "tags", wide=True),
]


def printed(capsys, form, **options):
    Output(form, **options).rows(ROWS, COLUMNS)
    return capsys.readouterr().out


def test_tables_are_aligned_and_hold_no_boxes(capsys):
    assert printed(capsys, "table") == 'NAME    SECONDS\nembed      1.2s\na, "b"        –\n'
    assert printed(capsys, "wide").splitlines()[1:] == ["embed      1.2s  a,b", 'a, "b"        –  –']
    assert printed(capsys, "table", headers=False).splitlines() == ["embed   1.2s", 'a, "b"     –']


def test_json_and_yaml_carry_everything(capsys):
    assert json.loads(printed(capsys, "json")) == ROWS
    assert yaml.safe_load(printed(capsys, "yaml")) == ROWS


def test_csv_can_be_read_back(capsys):
    first, second = csv.DictReader(io.StringIO(printed(capsys, "csv")))
    assert first == {"name": "embed", "seconds": "1.25", "tags": '["a", "b"]'}
    assert second["name"] == 'a, "b"'
    assert printed(capsys, "csv", headers=False).startswith("embed,")


def test_names_are_for_scripts(capsys):
    assert printed(capsys, "name") == 'embed\na, "b"\n'
    Output("name").rows(ROWS, COLUMNS, name="seconds")
    assert capsys.readouterr().out.splitlines()[0] == "1.25"


def test_csv_writes_truth_as_json_does(capsys):
    Output("csv", headers=False).rows([{"name": True}], COLUMNS[:1])
    assert capsys.readouterr().out == "true\n"


def test_one_thing_has_no_line_of_csv(capsys):
    assert run(["describe", "embed", "-o", "csv"]) == 2
    assert "'csv' is not one of" in capsys.readouterr().err


def test_an_empty_list_is_data_for_programs_and_a_hint_for_people(capsys):
    for form, out in (("table", ""), ("json", "[]\n"), ("yaml", "[]\n"), ("csv", "name,seconds,tags\n"), ("name", "")):
        Output(form).rows([], COLUMNS, empty="Deploy one.")
        captured = capsys.readouterr()
        assert captured.out == out
        assert captured.err == ("Deploy one.\n" if form == "table" else "")


def test_one_thing(capsys):
    value = {"name": "embed", "in_flight": 2, "tags": [], "price": Decimal("0.10")}
    Output().value(value)
    assert capsys.readouterr().out.splitlines() == [
        "NAME       embed",
        "IN FLIGHT  2",
        "TAGS       –",
        "PRICE      0.10",
    ]
    for form, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        Output(form).value(value)
        assert read(capsys.readouterr().out) == value | {"price": "0.10"}
    Output("name").value(value)
    assert capsys.readouterr().out == "embed\n"


def test_tables_of_nothing_but_headers():
    assert format_table([], COLUMNS[:1]) == "NAME"
    assert format_table([], COLUMNS, headers=False) == ""


@pytest.mark.parametrize(
    ("words", "form", "headers"),
    [
        ([], "table", True),
        (["-o", "csv"], "csv", True),
        (["--json"], "json", True),
        (["--no-headers", "-o", "wide"], "wide", False),
        (["-o", "name", "--no-headers"], "name", False),
    ],
)
def test_options(words, form, headers):
    got = []

    @click.command()
    @output_options
    def command(output):
        got.append(output)

    command.main(words, standalone_mode=False)
    assert got == [Output(form, headers)]


def test_instants_are_utc_to_the_second():
    assert format_instant(1_700_000_000_999_999_999) == "2023-11-14T22:13:20Z"


def test_progress_leaves_a_line_when_it_is_over(capsys):
    with progress("building") as line:
        line.update("built")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("✓ built  ")


def test_progress_that_fails_leaves_the_words_to_the_error(capsys):
    with pytest.raises(ValueError), progress("building"):
        raise ValueError
    assert capsys.readouterr().err == ""


def test_without_a_terminal_or_with_a_dumb_one_nothing_moves(monkeypatch):
    assert module._console() is None
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert module._console() is None


def test_unknown_forms_are_refused(capsys):
    assert run(["starts", "-o", "xml"]) == 2
    assert "yaml" in capsys.readouterr().err
