"""`gpufn` about a real cluster: what it says of nodes and pods, what it may read, and as whom.

The nodes are KWOK's, the scheduler and the rights are real, and so is the ledger: it runs here, and is reached as a
user reaches it, through the API server.
"""

from __future__ import annotations

import datetime as dt
import json
import time

import pytest

from adapter.cli.main import run
from adapter.cluster.certificates import issue, make_authority
from adapter.ledger.store import Ledger
from adapter.records import LeaseInterval, LeasePhase, Phase, PhaseName, Rung, StartRecord
from tests.ports import free_port
from tests.testbed.components import Process
from tests.testbed.machines import wait_until
from tests.testbed.nodes import gpu_labels

SYSTEM = "gpufn-system"
WAIT_S = 90


def function_pod(name, namespace, gpus, **annotations):
    """Of a bare pod with our label, which KWOK's nodes pretend to run."""
    limits = {"nvidia.com/gpu": str(gpus)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"gpufn.dev/function": name},
            "annotations": {f"gpufn.dev/{key}": value for key, value in annotations.items()},
        },
        "spec": {"containers": [{"name": "fn", "image": "fn", "resources": {"limits": limits}}]},
    }


@pytest.fixture(scope="module")
def plane(control_plane, repository):
    """Two kinds of GPU nodes, and of gpufn what the command line asks: its custom resource, and who may read."""
    l4 = control_plane.add_kwok_nodes(2, gpus=4, labels=gpu_labels("NVIDIA-L4", 24576, count=4), prefix="cli-l4")
    h100 = control_plane.add_kwok_nodes(
        1, gpus=8, labels=gpu_labels("NVIDIA-H100-80GB-HBM3", 81559, count=8), prefix="cli-h100"
    )
    for name in ("gpunode.yaml", "namespaces.yaml", "people.yaml"):
        control_plane.kubectl("apply", "--server-side", "-f", str(repository / "manifests/base" / name))
    control_plane.kubectl("wait", "--for=condition=Established", "crd/gpunodes.gpufn.dev", f"--timeout={WAIT_S}s")
    control_plane.make_namespace("cli")
    yield control_plane
    control_plane.kubectl("delete", "namespace", "cli", SYSTEM, "gpufn-agents")
    control_plane.kubectl("delete", "crd", "gpunodes.gpufn.dev")
    control_plane.kubectl("delete", "nodes", *l4, *h100)


@pytest.fixture
def ask(plane, capsys):
    """Runs a command as the administrator, or by another kubeconfig; returns its exit code, output and errors."""

    def ask(*words, kubeconfig=None):
        code = run([*words, "--kubeconfig", str(kubeconfig or plane.kubeconfig)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return ask


def test_a_pod_that_the_scheduler_placed_holds_its_gpus(plane, ask):
    plane.apply([function_pod("embed", "cli", 2, models="l4")])
    plane.kubectl("wait", "pod/embed", "-n", "cli", "--for=condition=Ready", f"--timeout={WAIT_S}s")
    node = plane.get("pod", "embed", "-n", "cli")["spec"]["nodeName"]
    rows = {row["node"]: row for row in json.loads(ask("nodes", "-o", "json")[1])}
    assert {"cli-l4-0", "cli-l4-1", "cli-h100-0"} <= rows.keys()
    assert (rows[node]["total"], rows[node]["used"]) in [(4, 2), (8, 2)]
    assert rows[node]["holders"] == [
        {"pod": "embed", "namespace": "cli", "function": "embed", "units": 2, "takes_snapshot": ""}
    ]
    code, out, _ = ask("explain", "embed", "-n", "cli", "-o", "json")
    found = json.loads(out)
    verdicts = {verdict["node"]: verdict for verdict in found["verdicts"]}
    assert code == 0
    assert (found["node"], found["asked"]) == (node, ["gpu = 2", "models = l4"])
    assert verdicts["cli-l4-0"]["fits"]
    assert verdicts["cli-h100-0"]["code"] == "gpu-model"


def test_a_pod_that_nothing_fits_says_what_the_scheduler_says(plane, ask):
    plane.apply([function_pod("huge", "cli", 16)])
    unscheduled = '--for=jsonpath={.status.conditions[?(@.type=="PodScheduled")].reason}=Unschedulable'
    plane.kubectl("wait", "pod/huge", "-n", "cli", unscheduled, f"--timeout={WAIT_S}s")
    code, out, err = ask("explain", "pod/huge", "-n", "cli")
    assert code == 8
    assert "Insufficient nvidia.com/gpu" in out
    assert "[no-fitting-node]" in err


def test_a_deployment_at_zero_is_explained_by_its_template(plane, ask):
    template = function_pod("sleeper", "cli", 1)
    labels = {"gpufn.dev/function": "sleeper"}
    spec = {"replicas": 0, "selector": {"matchLabels": labels}}
    spec["template"] = {
        "metadata": {"labels": labels, "annotations": {"gpufn.dev/models": "h100"}},
        "spec": template["spec"],
    }
    metadata = {"name": "sleeper", "namespace": "cli"}
    plane.apply([{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}])
    code, out, _ = ask("explain", "sleeper.cli")
    assert code == 0
    assert "cli-h100-0    100" in out
    verdicts = {each["node"]: each for each in json.loads(ask("explain", "sleeper.cli", "-o", "json")[1])["verdicts"]}
    assert verdicts["cli-h100-0"]["fits"]
    assert {verdicts[f"cli-l4-{n}"]["code"] for n in range(2)} == {"gpu-model"}


# As whom --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def person(plane, tmp_path_factory):
    """Makes a kubeconfig of somebody who has the given roles in the system's namespace, and may view the cluster."""

    def person(name, *roles):
        plane.kubectl("create", "serviceaccount", name, "-n", "cli")
        account = f"--serviceaccount=cli:{name}"
        plane.kubectl("create", "clusterrolebinding", f"cli-{name}", "--clusterrole=view", account)
        for role in roles:
            plane.kubectl("create", "rolebinding", f"cli-{name}-{role}", "-n", SYSTEM, f"--role={role}", account)
        token = plane.kubectl("create", "token", name, "-n", "cli").strip()
        return plane.kubeconfig_for(token, tmp_path_factory.mktemp(name) / "kubeconfig")

    return person


@pytest.fixture(scope="module")
def ledger(plane, tmp_path_factory):
    """A ledger with one start and one lease of this minute, behind a Service of the cluster's."""
    folder = tmp_path_factory.mktemp("ledger")
    url, now_ns = f"sqlite:///{folder}/ledger.sqlite", time.time_ns()
    fill(url, now_ns)
    authority = make_authority(dt.datetime.now(dt.timezone.utc))
    pair = issue(authority, [f"gpufn-ledger.{SYSTEM}.svc"], dt.datetime.now(dt.timezone.utc))
    (folder / "tls.crt").write_bytes(pair.certificate)
    (folder / "tls.key").write_bytes(pair.key)
    port, status_port = free_port(), free_port()
    settings = {
        "GPUFN_LEDGER": url, "GPUFN_TLS_DIR": str(folder), "KUBECONFIG": str(plane.kubeconfig),
        "GPUFN_LEDGER_PORT": str(port), "GPUFN_STATUS_PORT": str(status_port),
    }  # fmt: skip
    process = Process(["adapter.ledger"], settings, status_port, folder / "log").start()
    try:
        wait_until("ledger", process.is_ready, WAIT_S)
        publish(plane, port)
        yield
    finally:
        process.end()
    plane.kubectl("delete", "service,pod", "gpufn-ledger", "-n", SYSTEM)


def publish(plane, port):
    """The API server leads to addresses of pods only: so there is one, which has ours."""
    metadata = {"name": "gpufn-ledger", "namespace": SYSTEM}
    rights = {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]}}
    rights["seccompProfile"] = {"type": "RuntimeDefault"}
    container = {"name": "ledger", "image": "gpufn", "securityContext": rights}
    plane.apply([{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}}])
    plane.kubectl("wait", "pod/gpufn-ledger", "-n", SYSTEM, "--for=condition=Ready", f"--timeout={WAIT_S}s")
    address = plane.addresses.host
    moved = json.dumps({"status": {"podIP": address, "podIPs": [{"ip": address}]}})
    plane.kubectl("patch", "pod", "gpufn-ledger", "-n", SYSTEM, "--subresource=status", "--type=merge", "-p", moved)
    target = {"ip": address, "targetRef": {"kind": "Pod", **metadata}}
    subsets = [{"addresses": [target], "ports": [{"name": "ledger", "port": port}]}]
    ports = [{"name": "ledger", "port": 8443, "targetPort": port}]
    plane.apply(
        [
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": ports}},
            {"apiVersion": "v1", "kind": "Endpoints", "metadata": metadata, "subsets": subsets},
        ]
    )


def fill(url, now_ns):
    ledger = Ledger.open(url)
    lease = LeaseInterval(
        "n/1", "embed", "cli", "1", "embed-1", "acme", "standard", "GPU-1", 1.0, LeasePhase.RUNNING,
        now_ns - 60 * 10**9, now_ns - 10**9, gpu_model="NVIDIA L4",
    )  # fmt: skip
    phases = (
        Phase(PhaseName.SCHEDULE, 0, 10**9),
        Phase(PhaseName.PULL, 10**9, 3 * 10**9),
        Phase(PhaseName.RESTORE, 3 * 10**9, 4 * 10**9),
    )
    start = StartRecord("embed", "cli", "1", "embed-1", Rung.RESTORE, now_ns - 60 * 10**9, 4 * 10**9, phases)
    ledger.add_intervals([lease])
    ledger.add_start(start)
    ledger.close()


def test_a_ledger_that_nobody_serves_is_said_to_be_down(plane, ask):
    metadata = {"name": "gpufn-ledger", "namespace": SYSTEM}
    spec = {"ports": [{"port": 8443}], "selector": {"app": "nobody"}}
    plane.apply([{"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}])
    plane.kubectl("wait", "endpoints/gpufn-ledger", "-n", SYSTEM, "--for=create", f"--timeout={WAIT_S}s")
    code, _, err = ask("usage", "report")
    plane.kubectl("delete", "service", "gpufn-ledger", "-n", SYSTEM)
    assert code == 6
    assert "[ledger-down]" in err


@pytest.mark.usefixtures("ledger")
def test_who_was_given_the_role_reads_the_ledger_through_the_api_server(person, ask):
    finance = person("finance", "gpufn-ledger-reader")
    code, out, err = ask("usage", "report", "--for", "1h", "--by", "tenant", kubeconfig=finance)
    assert (code, err.count("✗")) == (0, 0)
    assert out.splitlines()[1].split()[:5] == ["acme", "NVIDIA", "L4", "GPU-seconds", "59.00"]
    code, out, _ = ask("starts", "embed.cli", kubeconfig=finance)
    assert code == 0
    assert out.splitlines()[1].split()[2:] == ["restore", "4.00s", "1.00s", "2.00s", "1.00s"]
    code, out, _ = ask("usage", "leases", "-n", "cli", "--for", "1h", kubeconfig=finance)
    assert (code, len(out.splitlines())) == (0, 2)


@pytest.mark.usefixtures("ledger")
def test_who_was_not_is_told_what_to_ask_for(person, ask):
    code, out, err = ask("usage", "report", kubeconfig=person("visitor"))
    assert (code, out) == (6, "")
    assert "You may not read the ledger" in err
    assert "--role=gpufn-ledger-reader" in err


def test_the_doctor_knows_what_a_visitor_may_do_and_what_is_missing(person, ask):
    code, out, _ = ask("doctor", "-o", "json", kubeconfig=person("patient"))
    found = {finding["name"]: finding for finding in json.loads(out)}
    assert code == 1
    assert found["api"]["verdict"] == "ok"
    assert "list nodes" in found["rights"]["reason"]
    assert "list gpunodes" not in found["rights"]["reason"]  # our role is part of `view`
    assert found["webhook"]["reason"].startswith("it is not there")
    assert found["gpus"]["verdict"] == "warning"
