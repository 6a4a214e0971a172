"""Our template in the real faas-cli, where there is one (on the PATH, or named by FAAS_CLI): pulled, used, laid out."""

import os
import subprocess

import pytest
import yaml

from tests.contract.openfaas.scenario import faas_cli
from tests.contract.openfaas.template import listing, recorded, repository_of, write_function
from tests.images.template import shrink_wrapped

pytestmark = [pytest.mark.e2e, pytest.mark.faas_cli]


@pytest.fixture
def run(tmp_path):
    """Runs faas-cli in a user's folder, into which our template has been pulled."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "user").mkdir()

    def run(*words: str) -> str:
        binary = faas_cli()
        assert binary is not None
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OPENFAAS_CONFIG": str(home / "openfaas")}
        ended = subprocess.run(
            [binary, *words], cwd=tmp_path / "user", env=environment, text=True, capture_output=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    return run


@pytest.fixture
def pulled(run, repository, tmp_path):
    run("template", "pull", str(repository_of(repository, tmp_path / "source")))
    return tmp_path / "user" / "template" / "python3-gpu"


def test_it_is_pulled_whole_through_the_link(pulled, repository):
    ours = listing(repository / "template" / "python3-gpu")
    assert listing(pulled) == {name: size for name, size in ours.items() if not name.endswith(".whl")}


def test_a_new_function_is_one_that_gpufn_serves(run, pulled, tmp_path):
    assert "load(device)" in run("new", "fn", "--lang", "python3-gpu")
    assert listing(tmp_path / "user" / "fn") == listing(pulled / "function")
    (function,) = yaml.safe_load((tmp_path / "user" / "stack.yaml").read_text())["functions"].values()
    assert (function["lang"], function["handler"]) == ("python3-gpu", "./fn")


def test_its_context_is_the_recorded_one(run, pulled, tmp_path):
    function = write_function(tmp_path / "user" / "fn")
    stack = {
        "provider": {"name": "openfaas"},
        "functions": {"fn": {"lang": "python3-gpu", "handler": "./fn", "image": "fn"}},
    }
    (tmp_path / "user" / "stack.yaml").write_text(yaml.safe_dump(stack))
    run("build", "-f", "stack.yaml", "--shrinkwrap")
    context = listing(tmp_path / "user" / "build" / "fn")
    assert list(context) == recorded()
    assert context == listing(shrink_wrapped(pulled, function, tmp_path / "ours"))
