import json

import pytest
from hypothesis import given, settings, strategies as st

from adapter.cluster.listing import ITEM, read_list

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
NAMES = st.text() | st.sampled_from(["kind", "apiVersion", "metadata", "items"])


def whole(text):
    """What `read_list` told, put together again."""
    found, items = {}, []
    for name, value in read_list(text):
        if name == ITEM:
            items.append(value)
        else:
            found[name] = value
    return found, items


@settings(max_examples=40)
@given(st.dictionaries(NAMES, JSON), st.sampled_from([None, 0, 2, "\t"]), st.booleans())
def test_it_reads_what_the_json_module_reads(value, indent, ascii_only):
    value.pop(ITEM, None)
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    found, items = whole(" \n" + text + "\r\n")
    expected = dict(value)
    if isinstance(expected.get("items"), list):
        assert items == expected.pop("items")
    assert found == expected


@given(st.text(max_size=60) | st.text(alphabet='{}[]",:items 1', max_size=40))
def test_what_the_json_module_does_not_read_it_does_not_read_to_its_end(text):
    try:
        is_object = isinstance(json.loads(text), dict)
    except ValueError:
        is_object = False
    if is_object:
        whole(text)
    else:
        with pytest.raises(ValueError):
            whole(text)


def test_items_are_told_before_the_end_has_been_read():
    reading = read_list('{"kind": "List", "items": [1, 2, BROKEN')
    assert [next(reading) for _ in range(3)] == [("kind", "List"), (ITEM, 1), (ITEM, 2)]
    with pytest.raises(ValueError):
        next(reading)
