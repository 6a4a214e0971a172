"""JSON Patch operations as another program applies them."""

import jsonpatch
import pytest

from adapter.cluster.json_patch import Editor


def applied(document, change):
    edit = Editor(document)
    change(edit)
    after = jsonpatch.apply_patch(document, edit.operations)
    assert after == edit.document
    return after


@pytest.mark.parametrize("there", [{}, {"a": None}, {"a": {}}, {"a": {"b": None}}, {"a": {"b": {}}}])
def test_parents_are_made_where_they_are_missing(there):
    assert applied(there, lambda edit: edit.put(("a", "b", "c"), 1)) == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize("there", [{}, {"a": None}, {"a": []}])
def test_an_array_is_made_where_it_is_missing(there):
    assert applied(there, lambda edit: edit.append(("a",), 1)) == {"a": [1]}


def test_elements_are_added_at_the_end():
    def change(edit):
        edit.append(("a", 1, "b"), 3)
        edit.append(("a", 1, "b"), 4)

    assert applied({"a": [{}, {"b": [2]}]}, change) == {"a": [{}, {"b": [2, 3, 4]}]}


def test_names_with_slashes_and_tildes_are_one_name():
    assert applied({}, lambda edit: edit.put(("x.dev/a~b",), 1)) == {"x.dev/a~b": 1}


def test_what_is_there_already_is_no_change():
    edit = Editor({"a": {"b": 1}})
    edit.put(("a", "b"), 1)
    edit.remove(("a", "c"))
    assert edit.operations == []


def test_a_member_is_replaced_and_removed():
    def change(edit):
        edit.put(("a", "b"), 2)
        edit.remove(("a", "c"))

    assert applied({"a": {"b": 1, "c": 1}}, change) == {"a": {"b": 2}}


def test_a_value_that_is_changed_later_is_not_changed_in_the_operation_before():
    value = {"x": 1}
    edit = Editor({})
    edit.put(("a",), value)
    edit.put(("a", "y"), 2)
    assert edit.operations[0]["value"] == {"x": 1}
    assert value == {"x": 1}
