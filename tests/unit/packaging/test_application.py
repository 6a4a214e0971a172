"""What of a folder is in an image, and what never is."""

import os
from pathlib import Path, PurePosixPath

import pytest

from adapter.errors import ConfigError
from adapter.packaging.application import entries, read_ignore, remove_ignored


def held(app: Path) -> list[str]:
    return [str(path.relative_to(app)) for path, _ in entries(app, read_ignore(app))]


@pytest.fixture
def app(tmp_path: Path) -> Path:
    for name in (
        "handler.py",
        ".git/config",
        "__pycache__/x.pyc",
        "data/wheels/a.txt",
        "wheels/a.whl",
        ".env",
        "a/id_rsa",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_what_tools_leave_behind_and_what_holds_secrets_stays_out(app):
    assert held(app) == ["a", "data", "data/wheels", "data/wheels/a.txt", "handler.py"]


def test_lines_of_the_ignore_file_take_out_and_bring_back(app):
    (app / ".gpufnignore").write_text("# mine\ndata/\n\n!.env\n")
    assert held(app) == [".env", "a", "handler.py"]


def test_what_is_removed_is_what_is_not_held(app):
    before = set(held(app))
    removed = remove_ignored(app, read_ignore(app))
    left = {str(path.relative_to(app)) for path in app.rglob("*")}
    assert left == before
    assert removed == [".env", ".git", "__pycache__", "a/id_rsa", "wheels"]


def test_links_within_the_folder_stay_links(app):
    (app / "link").symlink_to("data")
    assert "link" in held(app)


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "data/../../outside"])
def test_links_that_lead_out_are_refused(app, target):
    (app / "link").symlink_to(target)
    with pytest.raises(ConfigError, match="leads out"):
        held(app)


def test_a_link_that_stays_out_harms_nobody(app):
    (app / ".venv").symlink_to("/usr")
    assert ".venv" not in held(app)


def test_a_pipe_is_refused(app):
    os.mkfifo(app / "pipe")
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        held(app)


def test_a_pattern_with_a_slash_counts_from_the_top(app):
    ignore = read_ignore(app)
    assert ignore(PurePosixPath("wheels"))
    assert not ignore(PurePosixPath("data/wheels"))
