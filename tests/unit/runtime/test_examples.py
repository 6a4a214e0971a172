"""Examples: what a folder's files mean, which answers pass, and what is said about those that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapter.errors import ConfigError
from adapter.runtime.examples import Example, load_examples


def write(folder: Path, name: str, content: Any) -> None:
    (folder / "examples").mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "examples" / name).write_text(text, encoding="utf-8")


def only(folder: Path, request: dict, response: dict | None = None) -> Example:
    write(folder, "one.json", {"request": request, **({} if response is None else {"response": response})})
    [example] = load_examples(folder)
    return example


def test_a_folder_without_examples_has_none(tmp_path: Path) -> None:
    assert load_examples(tmp_path) == []


def test_examples_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "notes.txt", "c.json"):
        write(tmp_path, name, {"request": {}})
    assert [example.name for example in load_examples(tmp_path)] == ["a", "b", "c"]


def test_an_empty_request_is_a_post_to_the_root(tmp_path: Path) -> None:
    example = only(tmp_path, {})
    assert (example.method, example.path, example.headers, example.body) == ("POST", "/", {}, b"")


@pytest.mark.parametrize(
    ("request_body", "body", "content_type"),
    [
        ({"body": "grüße"}, "grüße".encode(), None),
        ({"body": {"a": [1]}}, b'{"a": [1]}', "application/json"),
        ({"body": ["a"]}, b'["a"]', "application/json"),
        ({"body": None}, b"null", "application/json"),
        ({"body_base64": "AP8="}, b"\x00\xff", None),
        ({"body": [1], "headers": {"Content-Type": "x/y"}}, b"[1]", "x/y"),
    ],
)
def test_bodies(request_body: dict, body: bytes, content_type: str | None, tmp_path: Path) -> None:
    example = only(tmp_path, request_body)
    assert example.body == body
    assert example.headers.get("Content-Type") == content_type


@pytest.mark.parametrize(
    ("response", "status", "body", "difference"),
    [
        (None, 200, b"anything", ""),
        (None, 500, b"", "status 500 instead of 200"),
        ({"status": 404}, 404, b"", ""),
        ({"body": "yes"}, 200, b"yes", ""),
        ({"body": "yes"}, 200, b"no", "body 'no' instead of 'yes'"),
        ({"body_contains": "es"}, 200, b"yes", ""),
        ({"body_contains": "es"}, 200, b"\xff", "body '�' does not contain 'es'"),
        ({"json": {"a": [1, {"b": 0.5}]}}, 200, b'{"a": [1.00001, {"b": 0.49996}]}', ""),
        ({"json": {"a": [1, {"b": 0.5}]}}, 200, b'{"a": [1, {"b": 0.51}]}', "$.a[1].b: 0.51 instead of 0.5"),
        ({"json": {"b": 0.5}, "tolerance": 0.1}, 200, b'{"b": 0.51}', ""),
        ({"json": {"b": 0.5}, "tolerance": 0}, 200, b'{"b": 0.5000000001}', "$.b: 0.5000000001 instead of 0.5"),
        ({"json": 1}, 200, b"true", "$: 'True' instead of '1'"),
        ({"json": 10**400}, 200, str(10**400 + 1).encode(), "instead of"),
        ({"json": 1.0}, 200, str(10**400).encode(), "instead of"),
        ({"json": [1, 2]}, 200, b"[1]", "$: 1 items instead of 2"),
        ({"json": {"a": 1}}, 200, b'{"b": 1}', "$: keys ['b'] instead of ['a']"),
        ({"json": None}, 200, b"null", ""),
        ({"json": {}}, 200, b"<html>", "body '<html>' is not JSON"),
        ({"json": {}}, 200, b"[" * 100_000, "is not JSON"),
    ],
)
def test_answers(response: dict | None, status: int, body: bytes, difference: str, tmp_path: Path) -> None:
    said = only(tmp_path, {}, response).check(status, {}, body)
    assert difference in said
    assert bool(said) == bool(difference)
    assert len(said) < 1000


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        "[]",
        {},
        {"request": []},
        {"request": {}, "response": []},
        {"request": {}, "answer": {}},
        {"request": {"url": "/"}},
        {"request": {}, "response": {"code": 200}},
        {"request": {"headers": []}},
        {"request": {"method": 1}},
        {"request": {"path": "no-slash"}},
        {"request": {"body": "a", "body_base64": "YQ=="}},
        {"request": {"body_base64": "not base64!"}},
        {"request": {"body_base64": 7}},
        {"request": {}, "response": {"status": "200"}},
        {"request": {}, "response": {"status": True}},
        {"request": {}, "response": {"body": {}}},
        {"request": {}, "response": {"body_contains": ["a"]}},
        {"request": {}, "response": {"json": 1, "tolerance": -1}},
        {"request": {}, "response": {"json": 1, "tolerance": "small"}},
    ],
)
def test_a_malformed_example_is_named(content: Any, tmp_path: Path) -> None:
    write(tmp_path, "broken.json", content)
    with pytest.raises(ConfigError) as caught:
        load_examples(tmp_path)
    assert "broken.json" in caught.value.message
    assert caught.value.why
    assert caught.value.hint


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "picture.json").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match=r"picture\.json"):
        load_examples(tmp_path)
