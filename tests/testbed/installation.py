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


class Installation:
    """One overlay of `manifests/overlays` on a cluster that has its framework. `database`: its URL as pods reach it."""

    def __init__(self, cluster: Cluster, overlay: str, database: str) -> None:
        self.cluster, self.database = cluster, database
        self._folder = f"--kustomize={REPOSITORY / 'manifests' / 'overlays' / overlay}"

    def apply(self) -> None:
        """Returns when all components are ready. $GPUFN_TEST_IMAGE: an archive to take for the image of this tree."""
        kubectl = self.cluster.kubectl
        self.cluster.load_archive(Path(os.environ.get("GPUFN_TEST_IMAGE") or adapter_image.archive()))
        self.cluster.make_namespace(FUNCTIONS)
        kubectl("apply", self._folder)
        self._secret("gpufn-ledger", url=self.database)
        self._secret("gpufn-basic-auth", **{"basic-auth-user": LOGIN[0], "basic-auth-password": LOGIN[1]})
        for namespace, kind in ((SYSTEM_NAMESPACE, "deployments"), (AGENT_NAMESPACE, "daemonsets")):
            for name in kubectl("-n", namespace, "get", kind, "-o", "name").split():
                kubectl("-n", namespace, "rollout", "status", name, f"--timeout={READY_S}s", timeout_s=READY_S + 20)

    def _secret(self, name: str, **values: str) -> None:
        metadata = {"name": name, "namespace": SYSTEM_NAMESPACE}
        self.cluster.apply([{"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values}])

    def delete(self) -> None:
        self.cluster.kubectl("delete", "--ignore-not-found", self._folder, timeout_s=300)

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
    with postgres.server(cluster.addresses.host, "198.18.0.0/15") as database:
        installation = Installation(cluster, overlay, database)
        try:
            installation.apply()
            yield installation
        finally:
            installation.delete()
            cluster.kubectl("delete", "namespace", FUNCTIONS, "--ignore-not-found")
