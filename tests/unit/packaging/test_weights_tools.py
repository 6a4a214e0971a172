"""What fetching needs is there for the time of the fetch, and an installer that fails is heard."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from adapter.errors import ConfigError
from adapter.packaging import weights_tools
from adapter.packaging.weights_tools import missing_for, tools_for

SOURCE = "hf://org/net@v1"


@pytest.fixture
def lacking(monkeypatch):
    """A builder without the client, whose name is one that nobody has."""
    monkeypatch.setattr(weights_tools, "_NEEDS", {"hf": ("client_of_a_hub", "client-of-a-hub>=1")})
    monkeypatch.setattr(sys, "path", [*sys.path])


def install(folder: Path, requirement: str) -> None:
    assert requirement == "client-of-a-hub>=1"
    (folder / "client_of_a_hub.py").write_text("X = 1\n")


def never(*_: object) -> None:
    raise AssertionError("nothing is missing")


def test_what_is_missing_can_be_imported_meanwhile_and_not_after(lacking):
    with tools_for(SOURCE, install):
        assert importlib.util.find_spec("client_of_a_hub") is not None
        folder = sys.path[-1]
    assert folder not in sys.path
    assert not Path(folder).exists()


@pytest.mark.parametrize("source", ["./net", SOURCE, "https://example.com/x", "oci://h/r@sha256:x"])
def test_a_builder_that_has_it_installs_nothing(source):
    assert missing_for(source) == ""
    with tools_for(source, never):
        pass


def test_weights_in_the_folder_need_nothing_anywhere(lacking):
    with tools_for("./net", never):
        pass


def test_an_installer_that_fails_says_what_it_could_not_install(lacking):
    def fail(*_: object) -> None:
        raise ConfigError("no", why="ERROR: No matching distribution found.", hint="Mend requirements.txt.")

    with pytest.raises(ConfigError) as caught, tools_for(SOURCE, fail):
        raise AssertionError("unreachable")
    assert (caught.value.code, caught.value.why) == ("build-extra", "ERROR: No matching distribution found.")
    assert "client-of-a-hub>=1" in caught.value.hint


def test_a_fetch_that_fails_leaves_the_path_as_it_was(lacking):
    before = [*sys.path]
    with pytest.raises(KeyError), tools_for(SOURCE, install):
        raise KeyError
    assert sys.path == before
