"""Documents say what the code does: generated pages are current, links lead somewhere, commands exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from adapter.cli.main import COMMANDS, gpufn
from scripts.reference import FOLDER, pages

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "functions/*/README.md", "benchmarks/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
NAMES = [str(path.relative_to(REPOSITORY)) for path in DOCUMENTS]


def commands_in(text: str):
    """Lines of code blocks that run gpufn, without a prompt and what follows a pipe or an ampersand."""
    for block in re.findall(r"^```(?:sh|console|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"^\s*\$\s*", "", line), comments=True)
            if words[:1] == ["gpufn"]:
                yield words[1 : next((i for i, word in enumerate(words) if word in ("|", "&", "&&", ">", "<")), None)]


@pytest.mark.parametrize("name", sorted(pages()))
def test_generated_reference_is_current(name):
    assert (FOLDER / name).read_text(encoding="utf-8") == pages()[name], "run: make docs"


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), target


def command_of(words):
    """The command that `words` name, and the words that are left for it."""
    command = gpufn
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        below = command.get_command(click.Context(command), words[0])
        assert below is not None, words
        command, words = below, words[1:]
    return command, words


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_commands_in_documents_exist_with_their_options(path):
    for line in commands_in(path.read_text(encoding="utf-8")):
        command, words = command_of(line)
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help", "--version"}
        unknown = [word for word in words if word.startswith("-") and word.split("=")[0] not in known]
        assert not unknown, line


def test_every_command_is_in_the_reference():
    page = (FOLDER / "cli.md").read_text(encoding="utf-8")
    assert all(f"## gpufn {name}\n" in page for name in COMMANDS)


def test_every_decision_is_listed_and_follows_the_template():
    folder = REPOSITORY / "docs" / "adr"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    for path in sorted(folder.glob("[0-9]*.md")):
        if not path.name.startswith("0000"):
            assert f"({path.name})" in listed, path.name
            headings = re.findall(r"^## (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert headings[:3] == ["Context", "Decision", "Consequences"], path.name
