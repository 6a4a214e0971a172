"""The template's way through faas-cli: what it is pulled from, and what a build's context holds."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

RECORDED = Path(__file__).with_name("template-context.json")
WRITTEN_BY_FAAS_CLI = "meta.json"


def listing(folder: Path) -> dict[str, int]:
    """Each file with its size, but for what faas-cli writes on its own."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.stat().st_size for path in sorted(files) if path.name != WRITTEN_BY_FAAS_CLI
    }


def recorded() -> list[str]:
    """Files of the context of a function that has a handler, requirements and a test of its own."""
    names: list[str] = json.loads(RECORDED.read_text())
    return names


def repository_of(source: Path, folder: Path) -> Path:
    """A git repository with what of `source` matters to faas-cli, the link `template` as a link."""
    folder.mkdir()
    (folder / "template").symlink_to((source / "template").readlink())
    target = folder / (source / "template").readlink()
    shutil.copytree(source / "template", target, ignore=shutil.ignore_patterns("*.whl", "__pycache__"))
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "--all"], [*who, "commit", "--quiet", "--message", "the template"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def write_function(folder: Path) -> Path:
    folder.mkdir()
    (folder / "handler.py").write_text("def handle(event, context):\n    return 'mine'\n")
    (folder / "requirements.txt").write_text("numpy\n")
    (folder / "mine_test.py").write_text("def test_it(): ...\n")
    (folder / "build").mkdir()
    (folder / "build" / "left-out").write_text("")
    return folder
