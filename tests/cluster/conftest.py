"""A real Kubernetes: what tests with the marker `cluster` ask for. See tests/testbed/README.md.

All tests share two clusters, one with nodes and Knative, one that is a control plane only; each test has a namespace of
its own in them. When a test fails, the ends of all components' logs are in its report.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed import functions
from tests.testbed.cluster import Cluster
from tests.testbed.installation import Installation, installed
from tests.testbed.nodes import two_nodes

HERE = Path(__file__).parent
TIMEOUT_S = 600
"""The first test starts the cluster, and makes the images that all share where the cache has none."""

CLUSTERS: list[Cluster] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("cluster")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TIMEOUT_S))
    items.sort(key=_comes_late)


def _comes_late(item: pytest.Item) -> int:
    """What wants a cluster without gpufn goes first, what takes gpufn away last."""
    return 2 if item.get_closest_marker("removes_gpufn") else int("gpufn" in getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.failed and HERE in item.path.parents:
        report.sections += [(f"cluster {cluster.addresses.number}", cluster.report()) for cluster in CLUSTERS]
    return report


def _started(cluster: Cluster) -> Iterator[Cluster]:
    with cluster:
        CLUSTERS.append(cluster)
        yield cluster
        CLUSTERS.remove(cluster)


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """An API server with its controllers and scheduler, without any node; KWOK nodes can be added."""
    yield from _started(Cluster())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with pretended GPUs, Knative Serving, and an ingress."""
    yield from _started(Cluster(two_nodes(), knative=True))


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """One of the test's own, in `cluster`; its end is not waited for."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.make_namespace(name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def echo_image(cluster: Cluster, repository: Path, tmp_path_factory) -> str:
    """The name of the image of functions/echo, which every node has."""
    folder = tmp_path_factory.mktemp("echo-image")
    layout = functions.base_layout(folder / "base")
    image = functions.function_image("dev.local/echo:1", repository / "functions" / "echo", layout, folder)
    cluster.load(image)
    return image.name


@pytest.fixture(scope="session")
def gpufn(cluster: Cluster) -> Iterator[Installation]:
    """All of gpufn on `cluster`, under Knative and OpenFaaS, from the image that manifests/image/Dockerfile makes."""
    with installed(cluster, "both") as installation:
        yield installation
