"""gpufn's own components as processes on this computer, beside a cluster that need not have nodes."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter.keys import SYSTEM_NAMESPACE
from tests.ports import free_port
from tests.testbed.cluster import Cluster
from tests.testbed.programs import PYTHON

WEBHOOK_HOST = f"gpufn-webhook.{SYSTEM_NAMESPACE}.svc"
WEBHOOK_SECRET = "gpufn-webhook-tls"
_END_S = 60


class Process:
    """`command` is what follows ``python -m``, `port` that of its probes and metrics, `log` a file that may be there.

    It can be killed and started again."""

    _child: subprocess.Popen[bytes]

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], port: int, log: Path) -> None:
        self.port, self.log = port, log
        self._command = [sys.executable, "-m", *command]
        self._environment = {"PATH": os.environ["PATH"], **PYTHON, **environment}

    def start(self) -> Process:
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(self._command, env=self._environment, stderr=log, stdout=log)
        return self

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
        """Also of one that has ended."""
        self.send(number)
        return self.wait()


def started(cluster: Cluster, component: str, folder: Path, *words: str) -> Process:
    """The webhook or the controller, as the ServiceAccount that the manifests give it. `words` are further options."""
    folder.mkdir(exist_ok=True)
    token = cluster.kubectl("--namespace", SYSTEM_NAMESPACE, "create", "token", f"gpufn-{component}").strip()
    environment = {"KUBECONFIG": str(cluster.kubeconfig_for(token, folder / "kubeconfig"))}
    port = free_port()
    command = ["adapter.controller", component, f"--probes-port={port}", *words]
    return Process(command, environment, port, folder / "log").start()


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
