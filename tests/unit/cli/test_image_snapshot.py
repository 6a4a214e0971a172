"""`gpufn snapshot create IMAGE`: what is an image, and what goes wrong before one runs."""

import pytest

from adapter.cli.image_snapshot import function_name
from adapter.cli.main import run


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("embed", "embed"),
        ("embed:1", "embed"),
        ("ghcr.io/me/embed:1", "embed"),
        ("127.0.0.1:5000/me/embed", "embed"),
        ("ghcr.io/me/embed@sha256:abc", "embed"),
    ],
)
def test_an_image_is_deployed_by_its_own_name(image, name):
    assert function_name(image) == name


def said(capsys, *words):
    code = run(["snapshot", "create", *words])
    return code, capsys.readouterr().err


def test_no_engine_is_said_in_three_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    code, error = said(capsys, "me/embed:1", "--state", str(tmp_path / "s"))
    assert code == 6
    assert "No container engine answers" in error
    assert len([line for line in error.splitlines() if line]) == 3


def test_a_name_that_is_none_is_refused_before_anything_runs(tmp_path, capsys):
    code, error = said(capsys, "me/embed:1", "--name", "../up", "--state", str(tmp_path / "s"))
    assert code == 3
    assert "'../up'" in error
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_not_there_is_no_image(tmp_path, capsys):
    code, error = said(capsys, str(tmp_path / "none"))
    assert code == 2
    assert "is no folder" in error


def test_only_an_image_s_snapshot_is_pushed(tmp_path, capsys):
    code, error = said(capsys, str(tmp_path), "--push")
    assert code == 2
    assert "Only the snapshot of an image" in error
