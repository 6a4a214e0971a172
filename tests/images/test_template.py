"""Images of the OpenFaaS template, built and run for real, without a network."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from adapter.keys import CONTRACT_VERSION
from adapter.packaging.shim import SHIM_MODULES, SHIM_PACKAGES
from adapter.runtime.examples import load_examples
from tests.images import wheels as wheel_folder
from tests.images.conftest import CACHE
from tests.images.containers import DockerFailed
from tests.images.restores import answers_the_same_after_a_kill
from tests.images.template import shrink_wrapped

SITE = "/venv/lib/python3.13/site-packages"
# As a careful cluster runs a function: nothing can be written but /tmp, and no right is left.
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")

SEEN = """
def handle(event, context):
    return {
        "statusCode": 201,
        "headers": {"X-Own": "yes"},
        "body": {
            "body": event.body.decode(), "method": event.method, "path": event.path, "own": event.headers.get("X-Own"),
            "query": event.query.get("a"), "hostname": context.hostname,
        },
    }
"""


@pytest.fixture(scope="session")
def template(repository, tmp_path_factory) -> Path:
    """The template as pulled, with a wheel of this checkout."""
    folder = tmp_path_factory.mktemp("pulled") / "python3-gpu"
    shutil.copytree(repository / "template" / "python3-gpu", folder)
    subprocess.run([str(repository / "scripts" / "template-wheel.sh"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def shim_wheels(repository) -> Path:
    """What a function without requirements needs: the shim's packages, and pytest for its tests."""
    return wheel_folder.fetch(CACHE, "flask\ngunicorn\npytest\n", repository / "requirements-dev.lock")


@pytest.fixture(scope="session")
def build(docker, run_image, template, tmp_path_factory):
    """Builds a function's folder with wheels and build arguments, returns the image's name. Raises `DockerFailed`."""
    context = tmp_path_factory.mktemp("contexts")

    def made(name: str, function: Path, wheels: Path, **arguments: str) -> str:
        folder = shrink_wrapped(template, function, context / f"{name}-{len(list(context.iterdir()))}")
        shutil.copytree(wheels, folder / "function" / "wheels", ignore=lambda *_: ["lock.txt"])
        # faas-cli gives ADDITIONAL_PACKAGE always.
        given = {"BASE_IMAGE": run_image, "GPUFN": "gpufn[runtime]", "ADDITIONAL_PACKAGE": "", **arguments}
        words = [word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")]
        docker("build", "--network", "none", *words, "--tag", f"gpufn-test/{name}", str(folder), timeout=500)
        return f"gpufn-test/{name}"

    return made


def written(folder: Path, **files: str) -> Path:
    """A function's folder that only its owner may enter, as `faas-cli new` makes them."""
    folder.mkdir(mode=0o700)
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content)
    return folder


@pytest.fixture(scope="session")
def hello(build, template, shim_wheels) -> str:
    """The image of the function that `faas-cli new` starts with."""
    return build("hello", template / "function", shim_wheels)


def test_the_first_function_answers_with_every_right_taken_from_it(hello, start_container):
    container = start_container(hello, options=HARDENED)
    container.wait_until_ready()
    answer = container.ask("/")
    assert (answer.status, answer.body) == (200, b"Hello from gpufn!")
    assert float(answer.headers["X-Duration-Seconds"]) >= 0


def test_its_process_is_the_first_one_and_not_root(docker, hello, start_container):
    container = start_container(hello)
    container.wait_until_ready()
    assert container.execute("id", "-u", "-n") == "app"
    assert container.execute("cat", "/proc/1/cmdline").split("\0")[:3] == ["python", "-m", "adapter.runtime"]
    uid, _, gid = docker.inspect(hello)["Config"]["User"].partition(":")
    assert int(uid) > 0  # a number: a kubelet cannot see what a name means
    assert int(gid) > 0


def test_the_health_check_of_the_image_finds_the_lock_file(docker, hello, start_container):
    container = start_container(hello)
    container.wait_until_ready()
    kind, command = docker.inspect(hello)["Config"]["Healthcheck"]["Test"]
    assert kind == "CMD-SHELL"
    container.execute("sh", "-c", command)


def test_sigterm_ends_it_well(hello, start_container):
    container = start_container(hello)
    container.wait_until_ready()
    container.kill("TERM")
    assert container.wait_until_ended() == 0


def test_it_says_its_contract(docker, hello):
    assert docker.inspect(hello)["Config"]["Labels"]["dev.gpufn.contract"] == str(CONTRACT_VERSION)


def test_in_it_are_the_shim_and_nothing_that_only_a_build_or_a_control_plane_needs(docker, hello):
    def listed(folder: str) -> set[str]:
        return set(docker("run", "--rm", "--network", "none", "--entrypoint", "ls", hello, folder).split())

    assert {Path(name).stem for name in listed(f"{SITE}/adapter")} - {"__pycache__", "py"} == {
        *SHIM_MODULES,
        *SHIM_PACKAGES,
    }
    assert not {"pip", "pytest", "_pytest"} & listed(SITE)
    assert not {"pip", "pytest", "gpufn"} & listed("/venv/bin")
    assert not {"wheels", ".pytest_cache", "__pycache__", "__init__.py"} & listed("/function")
    assert not {"build", "pip"} & listed("/")


def test_a_handler_sees_what_openfaas_templates_show_and_answers_as_there(
    build, shim_wheels, start_container, tmp_path
):
    container = start_container(build("seen", written(tmp_path / "fn", handler=SEEN), shim_wheels))
    container.wait_until_ready()
    answer = container.ask("/some/where?a=1", b"text", method="PUT", headers={"X-Own": "mine"})
    assert (answer.status, answer.headers["X-Own"]) == (201, "yes")
    seen = answer.json()
    assert seen.pop("hostname")
    assert seen == {"body": "text", "method": "PUT", "path": "/some/where", "own": "mine", "query": "1"}


def test_a_test_that_fails_fails_the_build(build, shim_wheels, tmp_path):
    failing = "from .handler import handle\n\ndef test_handle():\n    assert handle(None, None) == 'right'\n"
    fn = written(tmp_path / "fn", handler="def handle(event, context):\n    return 'wrong'\n", handler_test=failing)
    with pytest.raises(DockerFailed) as caught:
        build("failing", fn, shim_wheels)
    assert "assert 'wrong' == 'right'" in str(caught.value)
    build("failing", fn, shim_wheels, TEST_ENABLED="false")


def test_the_users_own_test_command_is_run_in_the_function(build, shim_wheels, tmp_path):
    fn = written(tmp_path / "fn", handler="def handle(event, context): ...\n")
    with pytest.raises(DockerFailed) as caught:
        build("commanded", fn, shim_wheels, TEST_COMMAND="echo in $(basename $PWD) && false")
    assert "in function" in str(caught.value)
    build("commanded", fn, shim_wheels, TEST_COMMAND="python -c 'import function.handler, flask'")


def test_a_package_that_is_not_to_be_had_is_named(build, shim_wheels, tmp_path):
    fn = written(tmp_path / "fn", handler="def handle(event, context): ...\n")
    (fn / "requirements.txt").write_text("no-such-package==1.0\n")
    with pytest.raises(DockerFailed) as caught:
        build("lacking", fn, shim_wheels)
    assert "No matching distribution found for no-such-package==1.0" in str(caught.value)
    assert "gpufn: the function's packages cannot be installed." in str(caught.value)


def test_embed_answers_its_examples_and_its_torch_is_the_base_images(
    docker, build, wheels, repository, start_container, tmp_path
):
    folder = tmp_path / "embed"
    shutil.copytree(repository / "functions" / "embed", folder)
    image = build("embed", folder, wheels, FROM_BASE="torch", TEST_ENABLED="false")
    container = start_container(image)
    container.wait_until_ready()
    for example in load_examples(folder):
        answer = container.ask(example.path, example.body, method=example.method, headers=example.headers)
        assert example.check(answer.status, dict(answer.headers), answer.body) == ""
    where = container.execute("python", "-c", "import torch; print(torch.__file__)")
    assert where.startswith("/usr/lib/python3/")
    assert json.loads(container.logs().splitlines()[0])["event"] == "listening"
    [example] = load_examples(folder)
    answer = answers_the_same_after_a_kill(docker, image, example.body, tmp_path / "state")
    assert example.check(200, {"Content-Type": "application/json"}, answer) == ""
