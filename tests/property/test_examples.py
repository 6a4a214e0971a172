"""Comparison of JSON values: a value is like itself, close numbers are alike, everything else is told apart."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, strategies as st

from adapter.runtime.examples import Example, difference, load_examples

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | numbers | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_a_value_is_like_itself_through_json(value: Any) -> None:
    assert difference(json.loads(json.dumps(value)), value, 0) == ""


@given(values, values, st.floats(0, 0.5))
def test_comparison_is_symmetric(one: Any, other: Any, tolerance: float) -> None:
    assert bool(difference(one, other, tolerance)) == bool(difference(other, one, tolerance))


@given(st.floats(-1e9, 1e9), st.floats(-0.9, 0.9))
def test_numbers_within_the_tolerance_are_alike(number: float, share: float) -> None:
    tolerance = 1e-3
    assert difference(number * (1 + share * tolerance), number, tolerance) == ""


@given(st.floats(-1e3, 1e3), st.floats(2, 1e6), st.booleans())
def test_numbers_beyond_the_tolerance_differ(number: float, times: float, above: bool) -> None:
    tolerance = 1e-3
    step = times * tolerance * max(1.0, abs(number)) * (1 if above else -1)
    assert difference(number + 2 * step, number, tolerance)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), numbers), min_size=1, max_size=4), st.data())
def test_one_changed_leaf_is_found_where_it_is(pairs: list, data: st.DataObject) -> None:
    value = [{key: number} for key, number in pairs]
    at = data.draw(st.integers(0, len(value) - 1))
    changed = [dict(item) for item in value]
    key = pairs[at][0]
    changed[at][key] = "no number"
    assert difference(changed, value, 1e-4).startswith(f"$[{at}].{key}:")


json_bodies = st.none() | st.booleans() | st.integers() | st.lists(leaves, max_size=3)
requests = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["GET", "post", "PUT"]),
        "path": st.text(max_size=8).map(lambda text: "/" + text),
        "headers": st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
        "body": st.text(max_size=20) | json_bodies,
    },
)


@given(requests, values)
def test_an_example_accepts_the_answer_it_states_and_no_other_status(request: dict, answer: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").mkdir()
        written = {"request": request, "response": {"status": 201, "json": answer}}
        (Path(folder) / "examples" / "it.json").write_text(json.dumps(written), encoding="utf-8")
        [example] = load_examples(Path(folder))
    assert isinstance(example, Example)
    assert example.method == request.get("method", "POST").upper()
    body = request.get("body", "")
    assert example.body == (body.encode() if isinstance(body, str) else json.dumps(body).encode())
    assert example.check(201, {}, json.dumps(answer).encode()) == ""
    assert example.check(200, {}, json.dumps(answer).encode()) != ""
