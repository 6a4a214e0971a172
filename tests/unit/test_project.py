"""What the README promises, what CI runs and what the project file says are the same thing."""

import re
import subprocess
from pathlib import Path

import pytest

import adapter

REPOSITORY = Path(__file__).parents[2]
MAKEFILE = (REPOSITORY / "Makefile").read_text()
README = (REPOSITORY / "README.md").read_text()
CI = (REPOSITORY / ".ci" / "run").read_text()


def make_commands(text: str) -> set[str]:
    return set(re.findall(r"^(?:\$ )?(make [a-z]+)$", text, re.MULTILINE))


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readme_has_the_two_commands(command):
    assert command in make_commands(README)


def test_ci_runs_the_readmes_test_command():
    assert "make test" in make_commands(CI)
    assert make_commands(CI) <= {"make test", "make criu", "make images", "make kubernetes"}


def test_every_make_command_in_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for path in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]:
        for command in re.findall(r"`(make [a-z]+)`", path.read_text()) + sorted(make_commands(path.read_text())):
            assert command.split()[1] in targets, (path, command)


def test_make_help_lists_what_users_need():
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "check", "bench", "help"):
        assert f"make {target} " in listed


def test_ci_is_executable_and_stops_at_the_first_failure():
    assert (REPOSITORY / ".ci" / "run").stat().st_mode & 0o111
    assert "set -euo pipefail" in CI


def test_the_version_is_in_the_changelog():
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{adapter.__version__}]" in text


def test_every_ignored_lint_rule_has_its_reason():
    """A rule alone on its line needs a comment; a run of codes shares the one that follows it."""
    block = re.search(r"^ignore = \[\n(.*?)^\]", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    explained = False
    for line in reversed(block[1].splitlines()):
        if "#" in line:
            explained = True
        assert explained, line


def test_scripts_are_valid_shell():
    for path in [REPOSITORY / ".ci" / "run", *(REPOSITORY / "scripts").glob("*.sh")]:
        shell = path.read_text().splitlines()[0].split("/")[-1].split()[-1]
        assert subprocess.run([shell, "-n", path]).returncode == 0
