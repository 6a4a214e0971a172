"""The Kubernetes host and the provider over it keep their contracts on a real cluster, too.

They run in this process here, as the cluster's administrator, in a namespace that an installed provider has no rights in;
`test_openfaas_provider.py` has that one, with the rights that the manifests give it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapter.cluster.api import Api
from adapter.cluster.credentials import Credentials
from tests.cluster.openfaas import function_images
from tests.contract.hosts.kubernetes import KubernetesHostContract
from tests.contract.openfaas.provider import ProviderContract

NAMESPACE = "openfaas-contract"


@dataclass
class Real:
    """See `tests.contract.hosts.kubernetes`."""

    kubeconfig: Path
    images: dict[str, str]
    namespace: str = NAMESPACE

    @asynccontextmanager
    async def running(self):
        yield

    @asynccontextmanager
    async def client(self):
        async with Api(Credentials(self.kubeconfig)) as api:
            yield api


@pytest.fixture(scope="module")
def kube(cluster, tmp_path_factory) -> Iterator[Real]:
    images = function_images(cluster, tmp_path_factory.mktemp("functions"))
    cluster.make_namespace(NAMESPACE, {"openfaas": "1"})
    yield Real(cluster.kubeconfig, images | {"missing": "dev.local/missing:1"})
    cluster.kubectl("delete", "namespace", NAMESPACE)


class TestHost(KubernetesHostContract):
    """The host alone."""


class TestProvider(ProviderContract):
    """With everything above it."""
