import json
import stat
from pathlib import Path

import pytest
import yaml

from adapter.cli.main import run
from adapter.cli.templates import TEMPLATES, config_file
from adapter.spec import FIELDS, parse_spec, read_config, read_handler_shape

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_new_folder_is_a_function_that_deploys(template, tmp_path, capsys):
    assert run(["init", "my-fn", "--template", template]) == 0
    folder = tmp_path / "my-fn"
    shape = read_handler_shape(folder)
    assert (shape.has_load, shape.handle_arguments) == (True, 2)
    assert parse_spec(read_config(folder), {}) == parse_spec({}, {})
    stack = yaml.safe_load((folder / "stack.yaml").read_text())
    assert stack["provider"]["name"] == "openfaas"
    entry = stack["functions"]["my-fn"]
    assert entry["image"] == "my-fn:latest"
    assert (entry["lang"], entry["handler"], entry["skip_build"]) == ("dockerfile", ".", True)
    assert json.loads((folder / "examples" / "hello.json").read_text())["request"]
    assert "gpufn run my-fn" in (folder / "README.md").read_text()
    assert "gpufn run my-fn" in capsys.readouterr().err


def test_the_embed_template_pins_what_functions_embed_pins(tmp_path):
    run(["init", "my-fn", "--template", "embed"])
    lines = (tmp_path / "my-fn" / "requirements.txt").read_text().splitlines()
    pinned = (REPOSITORY / "functions" / "embed" / "requirements.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} <= set(pinned)


def test_its_readme_says_how_to_log_in_before_it_deploys(tmp_path):
    run(["init", "my-fn"])
    text = (tmp_path / "my-fn" / "README.md").read_text()
    assert -1 < text.index("faas-cli login") < text.index("faas-cli deploy -f")


def test_the_first_handler_fits_on_a_screen(tmp_path):
    run(["init", "fn"])
    assert len((tmp_path / "fn" / "handler.py").read_text().splitlines()) <= 8


def test_the_config_file_names_every_key_with_its_default(tmp_path):
    lines = [line.removeprefix("# ") for line in config_file().splitlines() if "=" in line or line.startswith("[")]
    (tmp_path / "gpufn.toml").write_text("\n".join(lines))
    tables = read_config(tmp_path)
    assert {(table, key) for table, keys in tables.items() for key in keys} == {
        (item.table, item.key) for item in FIELDS
    }
    assert parse_spec(tables, {}) == parse_spec({}, {})


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "fn").mkdir()
    (tmp_path / "fn" / "mine.txt").write_text("mine")
    assert run(["init", "fn"]) == 5
    assert "folder-exists" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "fn").iterdir()] == ["mine.txt"]
    (tmp_path / "file").touch()
    assert run(["init", "file"]) == 5


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "fn").mkdir()
    assert run(["init", "fn"]) == 0
    assert (tmp_path / "fn" / "handler.py").exists()


@pytest.mark.parametrize("name", ["My_Fn", "../up", "-a", "a-", "a/b", "a.b", "", "é", "a" * 64, "a\n"])
def test_a_bad_name_is_refused(name, tmp_path, capsys):
    assert run(["init", "--", name]) == 3
    assert "bad-name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bad_name_is_answered_with_a_good_one(capsys):
    run(["init", "My Great_Fn!"])
    assert "gpufn init my-great-fn" in capsys.readouterr().err


def test_nothing_half_made_is_left_where_writing_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert run(["init", "fn", "--into", str(tmp_path / "file" / "below")]) == 3
    assert "unwritable" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_folder_is_for_its_user_and_readable_as_usual(tmp_path):
    run(["init", "fn"])
    assert (tmp_path / "fn" / "handler.py").stat().st_mode & stat.S_IRUSR
