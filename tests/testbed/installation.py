"""gpufn on a cluster, put there as its users do: the image loaded, an overlay applied, a database named."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapter.keys import AGENT_NAMESPACE, SYSTEM_NAMESPACE
from scripts import adapter_image
from tests import postgres
from tests.testbed.cluster import Cluster
from tests.testbed.machines import TestbedFailed
from tests.testbed.programs import REPOSITORY

FUNCTIONS = "openfaas-fn"
LOGIN = ("admin", "a password")
READY_S = 300


def kustomize(overlay: str) -> str:
    """kubectl's word for one of `manifests/overlays`."""
    return f"--kustomize={REPOSITORY / 'manifests' / 'overlays' / overlay}"


@contextlib.contextmanager
def applied(cluster: Cluster, overlay: str, *namespaces: str) -> Iterator[None]:
    """An overlay's objects, and before them `namespaces`, which its frameworks would bring, or its user."""
    for name in namespaces:
        cluster.make_namespace(name)
    try:
        cluster.kubectl("apply", kustomize(overlay))
        yield
    finally:
        cluster.kubectl("delete", "--ignore-not-found", kustomize(overlay), timeout_s=300)
        cluster.kubectl("delete", "--ignore-not-found", "namespace", *namespaces)


class Installation:
    """All of gpufn at work on `cluster`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def make_ready(self, database: str) -> None:
        """Gives it what it waits for, and returns when all components are ready. `database`: its URL as pods reach it."""
        kubectl = self.cluster.kubectl
        self._secret("gpufn-ledger", url=database)
        self._secret("gpufn-basic-auth", **{"basic-auth-user": LOGIN[0], "basic-auth-password": LOGIN[1]})
        for namespace, kind in ((SYSTEM_NAMESPACE, "deployments"), (AGENT_NAMESPACE, "daemonsets")):
            for name in kubectl("-n", namespace, "get", kind, "-o", "name").split():
                kubectl("-n", namespace, "rollout", "status", name, f"--timeout={READY_S}s", timeout_s=READY_S + 20)

    def _secret(self, name: str, **values: str) -> None:
        metadata = {"name": name, "namespace": SYSTEM_NAMESPACE}
        self.cluster.apply([{"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values}])

    def ledger(self, path: str) -> Any:
        """What the ledger answers to a reader, through the API server as the command line asks it."""
        service = f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/services/https:gpufn-ledger:8443/proxy/v1/{path}"
        audience = ("--audience=gpufn-ledger", "--duration=10m")
        token = self.cluster.kubectl("-n", SYSTEM_NAMESPACE, "create", "token", "gpufn-reader", *audience).strip()
        with self.cluster.session() as session:
            answer = session.get(f"{self.cluster.site.server}{service}", headers={"X-Gpufn-Token": token}, timeout=30)
        if not answer.ok:
            raise TestbedFailed(f"{path}: {answer.status_code} {answer.text}")
        return json.loads(answer.text)

    def kill(self, component: str) -> None:
        """Every pod of a component at once, without a word to it."""
        namespace = AGENT_NAMESPACE if component == "agent" else SYSTEM_NAMESPACE
        label = f"app.kubernetes.io/component={component}"
        self.cluster.kubectl("-n", namespace, "delete", "pod", "-l", label, "--grace-period=0", "--force")


@contextlib.contextmanager
def installed(cluster: Cluster, overlay: str) -> Iterator[Installation]:
    """On a cluster that has its framework. $GPUFN_TEST_IMAGE: an archive to take for the image of this tree."""
    cluster.load_archive(Path(os.environ.get("GPUFN_TEST_IMAGE") or adapter_image.archive()))
    database = postgres.server(cluster.addresses.host, "198.18.0.0/15")
    with database as url, applied(cluster, overlay, FUNCTIONS):
        installation = Installation(cluster)
        installation.make_ready(url)
        yield installation
