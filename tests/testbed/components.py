"""gpufn's own components on a cluster without nodes: everything applied, and what a test asks for run as processes here."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from adapter.keys import SYSTEM_NAMESPACE
from tests.testbed.cluster import Cluster

REPOSITORY = Path(__file__).parents[2]
OVERLAY = REPOSITORY / "manifests" / "overlays" / "knative"
WEBHOOK_HOST = f"gpufn-webhook.{SYSTEM_NAMESPACE}.svc"
WEBHOOK_SECRET = "gpufn-webhook-tls"
_END_S = 60


def install(cluster: Cluster) -> None:
    cluster.make_namespace("knative-serving")
    cluster.kubectl("apply", f"--kustomize={OVERLAY}")


def uninstall(cluster: Cluster) -> None:
    cluster.kubectl("delete", "--ignore-not-found", f"--kustomize={OVERLAY}", timeout_s=180)
    cluster.kubectl("delete", "namespace", "knative-serving")


class Process:
    """A component of ours, as the ServiceAccount that the manifests give it. `words` are further options."""

    def __init__(self, cluster: Cluster, component: str, folder: Path, *words: str) -> None:
        folder.mkdir(exist_ok=True)
        self.port = free_port()
        """Of its probes and metrics."""
        self.log = folder / "log"
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "KUBECONFIG": str(_kubeconfig(cluster, f"gpufn-{component}", folder)),
        }
        command = [sys.executable, "-m", "adapter.controller", component, f"--probes-port={self.port}", *words]
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(command, env=environment, stderr=log, stdout=log)

    def probe(self, path: str = "/readyz") -> tuple[int, str]:
        """Status and text; 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    @property
    def is_running(self) -> bool:
        return self._child.poll() is None

    def is_ready(self) -> bool:
        assert self.is_running, self.log.read_text()
        return self.probe()[0] == 200

    def lines(self, event: str) -> list[dict[str, Any]]:
        """What it logged of one kind."""
        return [line for line in map(json.loads, self.log.read_text().splitlines()) if line.get("event") == event]

    def peak_bytes(self) -> int:
        """The most memory that it had resident so far."""
        status = Path(f"/proc/{self._child.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024

    def send(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        return self._child.wait(_END_S)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.send(number)
        return self.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _kubeconfig(cluster: Cluster, account: str, folder: Path) -> Path:
    token = cluster.kubectl("--namespace", SYSTEM_NAMESPACE, "create", "token", account).strip()
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"] = [{"name": account, "user": {"token": token}}]
    for context in config["contexts"]:
        context["context"]["user"] = account
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def secret(cluster: Cluster, name: str) -> dict[str, bytes]:
    """What a Secret of our system's has; nothing where there is none."""
    found = cluster.get("secrets", "--namespace", SYSTEM_NAMESPACE, f"--field-selector=metadata.name={name}")["items"]
    return {key: base64.b64decode(value) for key, value in found[0]["data"].items()} if found else {}


def lead(cluster: Cluster, service: str, port: int) -> None:
    """The API server finds a Service of ours at a port of this computer, as kube-proxy would lead it to a pod."""
    address = cluster.get("service", service, "--namespace", SYSTEM_NAMESPACE)["spec"]["clusterIP"]
    cluster.components["kube-apiserver"].machine.script(
        "nft add table ip lead",
        "nft 'add chain ip lead output { type nat hook output priority -100; }'",
        f"nft add rule ip lead output ip daddr {address} tcp dport 8443 dnat to {cluster.addresses.host}:{port}",
    )
