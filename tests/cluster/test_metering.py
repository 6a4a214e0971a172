"""GPU-seconds on a real cluster: kubelets give GPUs away, agents see it, the ledger has it; whatever is killed meanwhile.

The agent and the ledger run on this computer, as their own accounts of the cluster, over what their node and PostgreSQL are.
"""

from __future__ import annotations

import datetime as dt
import http.client
import json
import signal
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from adapter.cluster import certificates
from adapter.ledger.client import RemoteLedger
from adapter.records import LeaseInterval
from tests.ports import free_port
from tests.postgres import postgres_url
from tests.testbed import functions
from tests.testbed.cluster import Cluster
from tests.testbed.components import Process
from tests.testbed.machines import TestbedFailed, wait_until
from tests.testbed.nodes import gpu_ids

__all__ = ["postgres_url"]

pytestmark = pytest.mark.timeout(600)

WAIT_S = 90
NODE = "node1"
SECOND_NS = 10**9
SLEEPER = "import time\n\n\ndef load(device):\n    return None\n\n\ndef handle(event, context):\n    time.sleep(float(event.body))\n    return 'done'\n"


@dataclass
class Metering:
    """The agent of a node, and a ledger service over PostgreSQL."""

    cluster: Cluster
    folder: Path
    database: str
    agent: Process = field(init=False)
    ledger: Process = field(init=False)
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        _install(self.cluster)
        self.shell = f"shell-{uuid.uuid4().hex[:8]}"
        pause = {"name": "main", "image": "gpufn.test/pause:1"}
        spec = {"serviceAccountName": "gpufn-agent", "nodeName": NODE, "containers": [pause]}
        metadata = {"name": self.shell, "namespace": "gpufn-agents"}
        self.cluster.apply([{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}])
        bound = ("--bound-object-kind=Pod", f"--bound-object-name={self.shell}")
        mounted = self.folder / "mounted"
        mounted.mkdir()
        (mounted / "token").write_text(self.token("gpufn-agents", "gpufn-agent", *bound))
        now = dt.datetime.now(dt.timezone.utc)
        authority = certificates.make_authority(now)
        pair = certificates.issue(authority, ["localhost"], now)
        for name, content in (("ca.crt", authority.certificate), ("tls.crt", pair.certificate), ("tls.key", pair.key)):
            (mounted / name).write_bytes(content)
        self.trust = ssl.create_default_context(cadata=authority.certificate.decode())
        self.reader = self.token("gpufn-system", "gpufn-reader")
        agent_token = self.token("gpufn-agents", "gpufn-agent", *bound, audience="")
        node = self.cluster.nodes[NODE].folder
        agent_port, ledger_port = free_port(), free_port()
        self.agent = Process(
            ["adapter.agent"],
            {
                "KUBECONFIG": str(self.cluster.kubeconfig_for(agent_token, self.folder / "agent.kubeconfig")),
                "GPUFN_NODE": NODE,
                "GPUFN_LEDGER_ADDRESS": f"https://localhost:{self.port}",
                "GPUFN_LEDGER_DIR": str(mounted),
                "GPUFN_STATE_DIR": str(self.folder / "state"),
                "GPUFN_SNAPSHOT_DIR": str(node / "var-lib/gpufn/snapshots"),
                "GPUFN_LENT_CRIU_DIR": str(node / "var-lib/gpufn/criu"),
                "GPUFN_SECCOMP_DIR": str(node / "var-lib/kubelet/seccomp"),
                "GPUFN_KUBELET_SOCKET": str(node / "var-lib/kubelet/pod-resources/kubelet.sock"),
                "GPUFN_POD_LOGS_DIR": str(node / "var-log/pods"),
                "GPUFN_STATUS_PORT": str(agent_port),
            },
            agent_port,
            self.folder / "agent.log",
        )
        ledger_token = self.token("gpufn-system", "gpufn-ledger", audience="")
        self.ledger = Process(
            ["adapter.ledger"],
            {
                "KUBECONFIG": str(self.cluster.kubeconfig_for(ledger_token, self.folder / "ledger.kubeconfig")),
                "GPUFN_LEDGER": self.database,
                "GPUFN_LEDGER_PORT": str(self.port),
                "GPUFN_STATUS_PORT": str(ledger_port),
                "GPUFN_TLS_DIR": str(mounted),
            },
            ledger_port,
            self.folder / "ledger.log",
        )

    def token(self, namespace: str, account: str, *words: str, audience: str = "gpufn-ledger") -> str:
        asked = [*words, f"--audience={audience}"] if audience else words
        return self.cluster.kubectl("-n", namespace, "create", "token", account, "--duration=2h", *asked).strip()

    def ask(self, path: str, *, body: bytes | None = None, token: str) -> tuple[int, Any]:
        request = urllib.request.Request(f"https://localhost:{self.port}{path}", data=body)
        request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=30, context=self.trust) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path: str, parameters: Any) -> Any:
        status, answer = self.ask(f"{path}?{urllib.parse.urlencode(parameters)}", token=self.reader)
        assert status == 200, answer
        return answer

    @property
    def remote(self) -> RemoteLedger:
        return RemoteLedger(self.get)

    def leases(self, function: str) -> list[LeaseInterval]:
        """Of a function so far; none while the ledger is away."""
        try:
            return self.remote.intervals(0, 2**62, function)
        except (OSError, AssertionError):
            return []

    def wait_for(self, what: str, probe: Any) -> None:
        try:
            wait_until(what, probe, WAIT_S)
        except TestbedFailed as error:
            logs = "\n".join(
                f"--- {each.log.name}\n{each.log.read_text()[-3000:]}" for each in (self.agent, self.ledger)
            )
            raise TestbedFailed(f"{error}\n{logs}") from None


def _install(cluster: Cluster) -> None:
    """Of our manifests the rights, the bounds and the kind of object; no component."""
    for namespace in ("gpufn-system", "gpufn-agents"):  # another test may just have removed all of it
        found = cluster.kubectl(
            "get", "namespace", namespace, "--ignore-not-found", "--output=jsonpath={.status.phase}"
        )
        if found == "Terminating":
            cluster.kubectl("wait", f"namespace/{namespace}", "--for=delete", f"--timeout={WAIT_S}s")
    base = Path(__file__).parents[2] / "manifests/base"
    wanted = {"Namespace", "CustomResourceDefinition", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role",
              "RoleBinding", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}  # fmt: skip
    for name in ("namespaces", "gpunode", "agent", "ledger", "people", "admission"):
        documents = yaml.safe_load_all((base / f"{name}.yaml").read_text())
        cluster.apply([document for document in documents if document and document["kind"] in wanted])
    cluster.kubectl("wait", "crd/gpunodes.gpufn.dev", "--for=condition=Established", f"--timeout={WAIT_S}s")


@pytest.fixture(scope="module")
def sleeper_image(cluster: Cluster, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sleeper")
    (folder / "function").mkdir()
    (folder / "function" / "handler.py").write_text(SLEEPER)
    layout = functions.base_layout(folder / "base")
    image = functions.function_image("dev.local/sleeper:1", folder / "function", layout, folder)
    cluster.load(image)
    return str(image.name)


@pytest.fixture
def metering(cluster: Cluster, postgres_url: str, tmp_path) -> Iterator[Metering]:
    name = f"metering_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = urllib.parse.urlsplit(postgres_url)._replace(path=f"/{name}").geturl()
    metering = Metering(cluster, tmp_path, url)
    metering.ledger.start()
    metering.agent.start()
    try:
        metering.wait_for("the agent", metering.agent.is_ready)
        metering.wait_for("the ledger", metering.ledger.is_ready)
        yield metering
    finally:
        metering.agent.end()
        metering.ledger.end()
        cluster.kubectl("-n", "gpufn-agents", "delete", "pod", metering.shell, "--wait=false")


def function_pod(name: str, namespace: str, image: str, gpus: int = 1) -> dict[str, Any]:
    container = {
        "name": "main", "image": image, "imagePullPolicy": "IfNotPresent",
        "readinessProbe": {"httpGet": {"path": "/_/ready", "port": 8080}, "periodSeconds": 1},
        "env": [{"name": "GPUFN_DEVICE", "value": "cpu"}],
        "resources": {"limits": {"nvidia.com/gpu": str(gpus)}} if gpus else {},
    }  # fmt: skip
    labels, annotations = {"gpufn.dev/function": name}, {"gpufn.dev/price-class": "gold"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels, "annotations": annotations},
        "spec": {"nodeName": NODE, "terminationGracePeriodSeconds": 5, "containers": [container]},
    }


@contextmanager
def asked(cluster: Cluster, name: str, namespace: str, seconds: float) -> Iterator[http.client.HTTPConnection]:
    """A function works on it for so long; its answer has not been read yet."""
    address = cluster.get("pod", name, "-n", namespace)["status"]["podIP"]
    with closing(http.client.HTTPConnection(address, 8080, timeout=WAIT_S)) as connection:
        connection.request("POST", "/", str(seconds).encode())
        yield connection


def call(cluster: Cluster, name: str, namespace: str, seconds: float) -> None:
    with asked(cluster, name, namespace, seconds) as connection:
        assert connection.getresponse().read() == b"done"


def ready(cluster: Cluster, name: str, namespace: str) -> None:
    cluster.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=condition=Ready", f"--timeout={WAIT_S}s")


def seconds_by_phase(leases: list[LeaseInterval]) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    for lease in leases:
        totals[lease.phase.value] += (lease.ended_at_ns - lease.started_at_ns) / SECOND_NS
    return totals


def test_what_a_function_held_is_in_the_ledger_to_the_second(cluster, metering, namespace, sleeper_image):
    cluster.kubectl("label", "namespace", namespace, "gpufn.dev/tenant=acme")
    cluster.apply([function_pod("sleeper", namespace, sleeper_image)])
    ready(cluster, "sleeper", namespace)
    [container] = cluster.get("pod", "sleeper", "-n", namespace)["status"]["containerStatuses"]
    started = dt.datetime.fromisoformat(container["state"]["running"]["startedAt"].replace("Z", "+00:00"))
    device = cluster.kubectl("exec", "sleeper", "-n", namespace, "--", "printenv", "NVIDIA_VISIBLE_DEVICES").strip()
    for _ in range(2):
        call(cluster, "sleeper", namespace, 1.5)
    metering.wait_for("busy time", lambda: seconds_by_phase(metering.leases("sleeper"))["running"] > 2.9)
    with asked(cluster, "sleeper", namespace, 3) as last:
        cluster.kubectl("delete", "pod", "sleeper", "-n", namespace)
        assert last.getresponse().read() == b"done"
    metering.wait_for("its end", lambda: "draining" in seconds_by_phase(metering.leases("sleeper")))
    leases = metering.leases("sleeper")
    assert {(i.device, i.share, i.node, i.tenant, i.price_class, i.gpu_model, i.namespace) for i in leases} == {
        (device, 1.0, NODE, "acme", "gold", "NVIDIA-L4", namespace)
    }
    assert device in gpu_ids(NODE, 2)
    assert all(first.ended_at_ns == second.started_at_ns for first, second in pairwise(leases))
    assert leases[0].started_at_ns / SECOND_NS == pytest.approx(started.timestamp(), abs=1.0)
    assert 3.0 <= seconds_by_phase(leases)["running"] < 7.0
    assert seconds_by_phase(leases)["restoring"] > 0
    [start] = metering.remote.starts("sleeper")
    names = [phase.name.value for phase in start.phases]
    assert names[:3] == ["schedule", "pull", "boot"]
    assert start.replica == leases[0].replica
    [active] = [each for each in metering.remote.activity(0) if each.function == "sleeper"]
    assert sum(end - begin for begin, end in active.busy) >= 3 * SECOND_NS


def test_a_node_says_what_it_has_and_only_its_own_agent_does(cluster, metering):
    def found() -> dict[str, Any]:
        try:
            return dict(cluster.get("gpunode", NODE))
        except TestbedFailed:
            return {}

    metering.wait_for("GPUs of the node", lambda: found().get("status", {}).get("gpus"))
    node = found()
    assert sorted(gpu["uuid"] for gpu in node["status"]["gpus"]) == sorted(gpu_ids(NODE, 2))
    assert {gpu["model"] for gpu in node["status"]["gpus"]} == {"NVIDIA-L4"}
    assert node["metadata"]["ownerReferences"][0]["uid"] == cluster.get("node", NODE)["metadata"]["uid"]
    assert (cluster.nodes[NODE].folder / "var-lib/kubelet/seccomp/gpufn.json").exists()
    other = {"apiVersion": "gpufn.dev/v1alpha1", "kind": "GpuNode", "metadata": {"name": "node2"}}
    with pytest.raises(TestbedFailed, match="own node"):
        cluster.kubectl(
            "--kubeconfig", str(metering.folder / "agent.kubeconfig"), "apply", "--server-side", "-f", "-", stdin=json.dumps(other)
        )  # fmt: skip


def test_who_may_write_and_read_says_the_clusters_api_server(metering, cluster, namespace):
    agent = (metering.folder / "mounted/token").read_text()
    stranger = metering.token(namespace, "default")
    unbound = metering.token("gpufn-agents", "gpufn-agent")
    other_audience = metering.token("gpufn-system", "gpufn-reader", audience="")
    record = b'{"seq": 1, "kind": "lease", "node": "node2"}\n'
    status, answer = metering.ask("/v1/records", body=record, token=agent)
    assert (status, [refused["code"] for refused in answer["rejected"]]) == (200, ["other-node"])
    for token, expected in (
        (stranger, 403),
        (unbound, 403),
        (metering.reader, 403),
        ("garbage", 401),
        (other_audience, 401),
    ):
        assert metering.ask("/v1/records", body=record, token=token)[0] == expected
    assert metering.ask("/v1/starts", token=metering.reader)[0] == 200
    assert metering.ask("/v1/starts", token=stranger)[0] == 403


def test_whatever_is_killed_nothing_is_lost_and_nothing_counts_twice(cluster, metering, namespace, sleeper_image):
    """Agent, ledger and the database's connections, again and again, while functions come, work, and go."""
    cluster.apply([function_pod("steady", namespace, sleeper_image)])
    ready(cluster, "steady", namespace)
    metering.wait_for("the first heartbeat", lambda: metering.leases("steady"))
    stop = threading.Event()

    def cut_connections() -> None:
        with psycopg.connect(metering.database, autocommit=True) as connection:
            while not stop.wait(0.7):
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )

    cutter = threading.Thread(target=cut_connections)
    cutter.start()
    try:
        for n in range(3):
            name = f"guest-{n}"
            cluster.apply([function_pod(name, namespace, sleeper_image)])
            metering.agent.end(signal.SIGKILL)
            ready(cluster, name, namespace)
            metering.ledger.end(signal.SIGKILL)
            metering.agent.start()
            call(cluster, name, namespace, 0.5)
            metering.ledger.start()
            # A slow agent would find nobody who knows which GPU it had: the kubelet forgets who has ended.
            metering.wait_for(name, lambda name=name: metering.leases(name))
            if n == 1:  # it ends while no agent sees it
                metering.agent.end(signal.SIGKILL)
            cluster.kubectl("delete", "pod", name, "-n", namespace)
            if n == 1:
                metering.agent.start()
    finally:
        stop.set()
        cutter.join()
    now_ns = time.time_ns()
    metering.wait_for(
        "all of it",
        lambda: (metering.leases("steady") or [None])[-1] and metering.leases("steady")[-1].ended_at_ns > now_ns,
    )
    steady = metering.leases("steady")
    assert all(first.ended_at_ns == second.started_at_ns for first, second in pairwise(steady))
    for n in range(3):
        guest = metering.leases(f"guest-{n}")
        assert all(first.ended_at_ns <= second.started_at_ns for first, second in pairwise(guest))
    found = metering.remote.capacity(steady[0].started_at_ns, steady[-1].ended_at_ns)
    assert not found.findings
    assert found.residual_ns < 10**6
    assert {hour.device for hour in found.hours} == set(gpu_ids(NODE, 2))
