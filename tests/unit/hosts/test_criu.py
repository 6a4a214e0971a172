"""The CRIU that is lent to containers of ordinary users."""

import os
import struct

import pytest

from adapter.hosts.criu import lend


@pytest.fixture
def private(tmp_path):
    folder = tmp_path / "data" / "gpufn" / "criu"
    (folder / "usr/lib/x86_64-linux-gnu").mkdir(parents=True)
    (folder / "criu").write_text("#!/bin/sh\n")
    (folder / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2").write_text("loader")
    (folder / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2").chmod(0o700)
    return {"XDG_DATA_HOME": str(tmp_path / "data")}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files capabilities")
def test_its_loader_carries_one_capability_and_everybody_may_run_it(tmp_path, private):
    assert lend(tmp_path / "lent", private) == ""
    loader = tmp_path / "lent/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    _, low, _, high, _ = struct.unpack("<5I", os.getxattr(loader, "security.capability"))
    assert (low, high) == (0, 1 << (40 - 32))
    assert loader.stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files capabilities")
def test_one_that_is_lent_already_is_left_alone_and_another_takes_its_place(tmp_path, private):
    assert lend(tmp_path / "lent", private) == ""
    there = (tmp_path / "lent").stat().st_ino
    assert lend(tmp_path / "lent", private) == ""
    assert (tmp_path / "lent").stat().st_ino == there
    (tmp_path / "data/gpufn/criu/criu").write_text("#!/bin/sh\n# newer\n")
    assert lend(tmp_path / "lent", private) == ""
    assert "newer" in (tmp_path / "lent/criu").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "lent"]


def test_an_ordinary_user_lends_none_and_is_told_why(tmp_path, private, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root" in lend(tmp_path / "lent", private)
    assert not (tmp_path / "lent").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files capabilities")
def test_where_there_is_none_to_lend_the_way_to_one_is_said(tmp_path):
    said = lend(tmp_path / "lent", {"XDG_DATA_HOME": str(tmp_path / "none")})
    assert "make criu" in said
    assert not (tmp_path / "lent").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files capabilities")
def test_a_file_system_without_capabilities_leaves_nothing_half_made(tmp_path, private, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refused)
    assert "not supported" in lend(tmp_path / "lent", private)
    assert not (tmp_path / "lent").exists()
