"""The buildpack as a folder: whole, ours, and with what it brings."""

import os

import pytest

from adapter.errors import ConfigError, Conflict
from adapter.packaging.assemble import assemble
from tests.fakes.builds import wheel


def test_it_holds_what_a_build_runs_and_not_the_control_side(tmp_path):
    assemble(tmp_path / "pack")
    library = tmp_path / "pack" / "lib" / "adapter"
    assert {"packaging", "runtime", "snapshot", "gpu"} <= {path.name for path in library.iterdir()}
    assert not {"cli", "hosts", "ledger", "openfaas", "policy"} & {path.name for path in library.iterdir()}
    assert os.access(tmp_path / "pack" / "bin" / "build", os.X_OK)


def test_it_brings_wheels_and_criu(tmp_path):
    wheel(tmp_path / "wheels", "needed")
    (tmp_path / "criu").mkdir()
    (tmp_path / "criu" / "criu").write_text("#!/bin/sh\n")
    assemble(tmp_path / "pack", wheels=tmp_path / "wheels", criu=tmp_path / "criu")
    assert (tmp_path / "pack" / "wheels" / "needed-1.0-py3-none-any.whl").is_file()
    assert (tmp_path / "pack" / "criu" / "criu").is_file()


def test_an_older_one_is_replaced_whole(tmp_path):
    assemble(tmp_path / "pack")
    (tmp_path / "pack" / "lib" / "stale.py").write_text("")
    assemble(tmp_path / "pack")
    assert not (tmp_path / "pack" / "lib" / "stale.py").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(Conflict):
        assemble(tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "x"


def test_a_folder_without_wheels_leaves_nothing_behind(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no wheels"):
        assemble(tmp_path / "pack", wheels=tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
