"""The files of docs/how-to/ci, which users copy: right by their tools' schemas, and their scripts are shell."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "docs/how-to/ci"
SCHEMAS = {
    "github-actions.yml": ["--builtin-schema", "vendor.github-workflows"],
    "gitlab-ci.yml": ["--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
}
NAMES = sorted(path.name for path in FOLDER.iterdir())


def documents(name):
    return [document for document in yaml.safe_load_all((FOLDER / name).read_text()) if document]


def scripts(name):
    """Every shell script of a file, as its runner would see it; expressions of the runner replaced by a word."""
    found = []

    def visit(value, key=""):
        if isinstance(value, dict):
            for inner, item in value.items():
                visit(item, inner)
        elif isinstance(value, list):
            if key in ("script", "before_script"):
                found.append("\n".join(value))
            else:
                for item in value:
                    visit(item)
        elif key in ("run", "script"):
            found.append(value)

    visit(documents(name))
    return [re.sub(r"\$\{\{.*?\}\}|\$\((params|workspaces|results)\.[^)]*\)", "word", text) for text in found]


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_it_follows_the_schema_of_its_tool(name):
    command = [sys.executable, "-m", "check_jsonschema", *SCHEMAS[name], str(FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_its_scripts_are_shell_and_run_the_lifecycle(name):
    texts = scripts(name)
    assert any("/cnb/lifecycle/creator" in text for text in texts)
    for text in texts:
        done = subprocess.run(["sh", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_tekton_task_declares_all_that_it_uses_and_the_run_gives_it():
    task, run = documents("tekton.yaml")
    spec = task["spec"]
    declared = {kind: {item["name"]: item for item in spec[kind]} for kind in ("params", "workspaces", "results")}
    for kind, name in re.findall(r"\$\((params|workspaces|results)\.([\w-]+)", (FOLDER / "tekton.yaml").read_text()):
        assert name in declared[kind], name
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for step in spec["steps"] for mount in step["volumeMounts"]} == volumes
    for kind, optional in (("params", "default"), ("workspaces", "optional")):
        given = {item["name"] for item in run["spec"][kind]}
        assert given <= declared[kind].keys()
        assert {name for name, item in declared[kind].items() if optional not in item} <= given
    assert run["spec"]["taskRef"]["name"] == task["metadata"]["name"]
