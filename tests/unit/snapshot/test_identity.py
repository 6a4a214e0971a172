"""The identity of a function: what changes it, and what folders may look like."""

import os
import sys

import pytest

from adapter.snapshot.identity import differing_fields, identity_of, key_of, tree_digest


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "fn"
    (folder / "data").mkdir(parents=True)
    (folder / "handler.py").write_text("def handle(event, context): ...\n")
    (folder / "data" / "words").write_text("one")
    return folder


def identity(folder, **variables):
    return identity_of(folder, sys.executable, variables, "cpu")


def test_the_same_function_has_the_same_key(folder):
    assert key_of(identity(folder)) == key_of(identity(folder))


def test_code_and_variables_count_and_are_named(folder):
    before = identity(folder, MODE="a")
    (folder / "data" / "words").write_text("two")
    assert differing_fields(before, identity(folder, MODE="b")) == ["code", "variables"]


def test_values_of_variables_are_not_in_it(folder):
    assert "hunter2" not in str(identity(folder, TOKEN="hunter2"))


def test_byte_code_does_not_count(folder):
    before = tree_digest(folder)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "handler.pyc").write_bytes(b"x")
    assert tree_digest(folder) == before


def test_links_that_lead_nowhere_or_back_do_no_harm(folder):
    (folder / "gone").symlink_to("nowhere")
    (folder / "data" / "up").symlink_to("..")
    before = tree_digest(folder)
    (folder / "gone").unlink()
    (folder / "gone").symlink_to("elsewhere")
    assert tree_digest(folder) != before


def test_what_a_link_leads_to_counts(folder, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "module.py").write_text("a = 1")
    os.symlink(shared, folder / "lib")
    before = tree_digest(folder)
    (shared / "module.py").write_text("a = 2")
    assert tree_digest(folder) != before
