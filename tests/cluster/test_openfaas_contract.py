"""The Kubernetes host and the provider over it keep their contracts on a real cluster, too.

They run in this process here, as the cluster's administrator; `test_openfaas_provider.py` has them in a pod of their own,
with the rights that the manifests give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapter.cluster.api import Api
from adapter.cluster.credentials import Credentials
from tests.cluster.openfaas import function_images
from tests.contract.hosts.kubernetes import KubernetesHostContract
from tests.contract.openfaas.provider import ProviderContract


@dataclass
class Real:
    """See `tests.contract.hosts.kubernetes`."""

    kubeconfig: Path
    images: dict[str, str]
    namespace: str = "openfaas-fn"
    insecure: tuple[str, ...] = field(default=())

    @asynccontextmanager
    async def running(self):
        yield

    @asynccontextmanager
    async def client(self):
        async with Api(Credentials(self.kubeconfig)) as api:
            yield api


@pytest.fixture(scope="module")
def kube(cluster, plain_base, tmp_path_factory) -> Iterator[Real]:
    images = function_images(cluster, plain_base, tmp_path_factory.mktemp("functions"))
    cluster.kubectl("create", "namespace", "openfaas-fn")
    yield Real(cluster.kubeconfig, images | {"missing": "dev.local/missing:1"})
    cluster.kubectl("delete", "namespace", "openfaas-fn")


class TestHost(KubernetesHostContract):
    """The host alone."""


class TestProvider(ProviderContract):
    """With everything above it."""
