from pathlib import Path

import pytest

from adapter.errors import NotFound
from adapter.hosts.folders import FunctionFolders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("embed", "chat.v2"):
        (tmp_path / "functions" / name).mkdir(parents=True)
        (tmp_path / "functions" / name / "handler.py").touch()
    (tmp_path / "functions" / "notes").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "handler.py").touch()
    return tmp_path / "functions"


@pytest.mark.parametrize(
    "image",
    [
        "embed",
        "embed:latest",
        "ghcr.io/me/embed:1",
        "localhost:5000/embed",
        "embed@sha256:0123",
        "registry.example/a/b/embed:1@sha256:0123",
    ],
)
def test_image_means_the_folder_of_its_last_part(root, image):
    assert FunctionFolders([root]).resolve(image) == root / "embed"


@pytest.mark.parametrize(
    "image",
    [
        "",
        ".",
        "..",
        "../secret",
        "x/..",
        "embed/",
        "/",
        "..:1",
        "embed/../../secret/",
        "a\0b",
        "-embed",
        "notes",
        "other",
        "*",
    ],
)
def test_what_is_no_function_folder_is_not_found(root, image):
    with pytest.raises(NotFound) as caught:
        FunctionFolders([root]).resolve(image)
    assert "embed" in caught.value.why


def test_a_root_that_is_a_function_counts_as_one(root):
    assert FunctionFolders([root / "embed"]).resolve("me/embed:2") == root / "embed"


def test_the_first_root_that_has_a_name_wins(root, tmp_path):
    (tmp_path / "mine" / "embed").mkdir(parents=True)
    (tmp_path / "mine" / "embed" / "handler.py").touch()
    folders = FunctionFolders([tmp_path / "mine", root])
    assert folders.resolve("embed") == tmp_path / "mine" / "embed"
    assert folders.resolve("chat.v2:1") == root / "chat.v2"


def test_a_root_that_may_not_be_read_holds_nothing(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    assert FunctionFolders([tmp_path]).all() == {}
