"""The image of the components of a cluster, as `scripts/adapter_image.py` builds it: no rights, no network, nothing to install."""

import pytest

from adapter import __version__
from scripts import adapter_image

HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none")
COMPONENTS = ("adapter.controller", "adapter.agent", "adapter.ledger", "adapter.openfaas")


@pytest.fixture(scope="module")
def image(docker) -> str:
    docker("load", "--input", str(adapter_image.archive()))
    return adapter_image.NAME


@pytest.fixture(scope="module")
def run(docker, image):
    def run(*command: str, entrypoint: str = "python", options: tuple[str, ...] = HARDENED) -> str:
        words = (docker("run", "--rm", *options, "--entrypoint", entrypoint, image, *command)).splitlines()
        return "\n".join(words)

    return run


def test_it_runs_as_nobody(docker, image, run):
    assert docker.inspect(image)["Config"]["User"] == "65532:65532"
    assert run("-c", "import os; print(os.getuid(), os.getgid())") == "65532 65532"


@pytest.mark.parametrize("component", COMPONENTS)
def test_it_has_all_that_a_component_imports(run, component):
    assert run("-c", f"import {component}.__main__; print('whole')") == "whole"


def test_all_of_it_is_compiled(run):
    """A container with a read-only root compiles anew at each start what is not."""
    program = "import adapter.cluster.api as m, pathlib; print(pathlib.Path(m.__cached__).exists())"
    assert run("-c", program) == "True"


def test_it_has_a_criu_to_lend(docker, image, run):
    [variable] = [text for text in docker.inspect(image)["Config"]["Env"] if text.startswith("GPUFN_CRIU=")]
    assert run("--version", entrypoint=variable.removeprefix("GPUFN_CRIU=")).startswith("Version: 4")


def test_nothing_in_it_installs_or_becomes_another_user(run):
    program = """
import os, stat, sys
for folder, _, files in os.walk("/"):
    if not folder.startswith(("/proc", "/sys")):
        for name in files:
            path = os.path.join(folder, name)
            if os.lstat(path).st_mode & (stat.S_ISUID | stat.S_ISGID):
                print(path)
print(os.path.exists("/venv/bin/pip"), "pip" in sys.modules)
"""
    assert run("-c", program) == "False False"


def test_it_says_its_version(docker, image):
    assert docker.inspect(image)["Config"]["Labels"]["org.opencontainers.image.version"] == __version__
