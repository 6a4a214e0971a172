"""Real images on a real daemon: what tests of images ask for.

Everything is made by the scripts of the repository and kept in `$GPUFN_CACHE` (default ~/.cache/gpufn): the first run
takes two minutes, the next ones seconds. With DOCKER_HOST set, that daemon is used and no other is started.
"""

from __future__ import annotations

import os
import socket
import subprocess
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from tests.images import machine, wheels as wheel_folder
from tests.images.containers import Container, Docker, DockerFailed, run_words

HERE = Path(__file__).parent
CACHE = Path(
    os.environ.get("GPUFN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gpufn"
)
DOCKER_HOST = os.environ.get("DOCKER_HOST", "")
BASE_PACKAGES = ("python3-torch",)
"""What `functions/embed` finds in the base image, so that its own layers need no torch."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("images")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))  # the first test makes what all of them share


# The daemon and the registry: pytest-docker starts and ends the services of compose.yaml.


@pytest.fixture(scope="session")
def docker(repository: Path) -> Iterator[Docker]:
    """The daemon that images are built and run with."""
    if DOCKER_HOST:
        yield Docker(DOCKER_HOST)
        return
    machine.run_script(repository, "install-docker.sh", str(CACHE / "docker"))
    with machine.daemon(CACHE / "docker") as docker:
        yield docker


@pytest.fixture(scope="session")
def registry_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return f"127.0.0.1:{port}"


@pytest.fixture(scope="session")
def docker_compose_command(docker: Docker, registry_address: str) -> str:
    machine.import_registry(docker)
    return f"env DOCKER_HOST={docker.host} REGISTRY_ADDRESS={registry_address} docker-compose"


@pytest.fixture(scope="session")
def docker_compose_file() -> str:
    return str(HERE / "compose.yaml")


@pytest.fixture(scope="session")
def docker_setup() -> str:
    return "up -d"  # Compose 1 has no `--wait`; `registry` waits


@pytest.fixture(scope="session")
def registry(docker_services, registry_address: str) -> str:
    """The address (host:port) of a registry without passwords, over plain HTTP on loopback."""

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://{registry_address}/v2/", timeout=2):
                return True
        except OSError:
            return False

    docker_services.wait_until_responsive(answers, timeout=30, pause=0.1)
    return registry_address


# Images and what goes into them.


@pytest.fixture(scope="session")
def lifecycle(repository) -> Path:
    """The folder with the programs of the CNB lifecycle."""
    folder = CACHE / "lifecycle"
    machine.run_script(repository, "install-lifecycle.sh", str(folder))
    return folder


@pytest.fixture(scope="session")
def base_layout(repository, lifecycle, tmp_path_factory) -> Path:
    """An OCI layout with the base images `run` and `build`."""
    layout: Path = tmp_path_factory.mktemp("base") / "layout"
    packages = [word for package in BASE_PACKAGES for word in ("--with", package)]
    machine.run_script(repository, "base-image.sh", *packages, "--lifecycle", str(lifecycle), str(layout))
    return layout


def _pushed(layout: Path, image: str, registry: str) -> str:
    name = f"{registry}/gpufn/{image}:trixie"
    copy = ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:{image}", f"docker://{name}"]
    subprocess.run(copy, check=True)
    return name


@pytest.fixture(scope="session")
def run_image(base_layout, registry) -> str:
    """The run image's name in the registry; `docker run` and lifecycle pull it from there."""
    return _pushed(base_layout, "run", registry)


@pytest.fixture(scope="session")
def build_image(base_layout, registry) -> str:
    """The build image's name in the registry."""
    return _pushed(base_layout, "build", registry)


@pytest.fixture(scope="session")
def wheels(repository) -> Path:
    """Wheels of `functions/embed` and of the shim for the base image's Python; torch is the base image's own."""
    requirements = (repository / "functions" / "embed" / "requirements.txt").read_text()
    return wheel_folder.fetch(CACHE, f"{requirements}\nflask\ngunicorn\n", repository / "requirements-dev.lock")


# Containers.


class StartContainer(Protocol):
    def __call__(
        self,
        image: str,
        *command: str,
        environment: Mapping[str, str] = ...,
        mounts: Mapping[Path | str, str] = ...,
        capabilities: Sequence[str] = ...,
        security: Sequence[str] = ...,
        user: str = ...,
        options: Sequence[str] = ...,
    ) -> Container: ...


def _two_free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@pytest.fixture
def start_container(docker: Docker) -> Iterator[StartContainer]:
    """Starts containers on the host's network, PORT and GPUFN_METRICS_PORT set to free ones; none is left after the test.

    `mounts` are outside → inside, with ``:ro`` after it or not; `options` go to `docker run` as they are."""
    names: list[str] = []

    def start(
        image: str,
        *command: str,
        environment: Mapping[str, str] = {},
        mounts: Mapping[Path | str, str] = {},
        capabilities: Sequence[str] = (),
        security: Sequence[str] = (),
        user: str = "",
        options: Sequence[str] = (),
    ) -> Container:
        port, metrics_port = _two_free_ports()
        ports = {"PORT": str(port), "GPUFN_METRICS_PORT": str(metrics_port)}
        names.append(f"gpufn-test-{uuid.uuid4().hex[:12]}")
        words = run_words({**ports, **environment}, mounts, capabilities, security, user)
        docker("run", "--detach", "--network", "host", "--name", names[-1], *words, *options, image, *command)
        return Container(docker, names[-1], port, metrics_port)

    yield start
    for name in names:
        try:
            docker("rm", "--force", "--volumes", name)
        except DockerFailed as error:
            print(error)  # it had not been made


@pytest.fixture
def run_once(docker: Docker) -> Callable[..., str]:
    """Runs a command in a container of an image to its end, without any network; returns what it printed."""

    def run(
        image: str, *command: str, mounts: Mapping[Path | str, str] = {}, user: str = "", **environment: str
    ) -> str:
        words = run_words(environment, mounts, (), (), user)
        return docker("run", "--rm", "--network", "none", *words, image, *command)

    return run
