"""The controller and the webhook as processes, with the rights that the manifests give them, against a real API server."""

import base64
import json
import signal
import socket
import ssl

import pytest

from adapter.keys import AGENT_NAMESPACE, SYSTEM_NAMESPACE
from tests.fakes.cluster_objects import GPU, function_pod, node
from tests.ports import free_port
from tests.testbed.components import WEBHOOK_HOST, WEBHOOK_SECRET, secret, started
from tests.testbed.installation import applied
from tests.testbed.machines import wait_until

WAIT_S = 60


@pytest.fixture(scope="module")
def installed(control_plane):
    """Everything applied; nothing of it runs, because there is no node."""
    with applied(control_plane, "knative", "knative-serving"):
        yield control_plane


@pytest.fixture
def start(installed, tmp_path):
    running = []

    def start(component, name, *words):
        running.append(started(installed, component, tmp_path / name, *words))
        return running[-1]

    yield start
    for process in running:
        process.end(signal.SIGKILL)


def holder(cluster):
    leases = cluster.get("leases", "--namespace", SYSTEM_NAMESPACE)["items"]
    return next((lease["spec"].get("holderIdentity") for lease in leases), None)


def events_on(cluster, namespace, name):
    items = cluster.get("events.v1.events.k8s.io", "--namespace", namespace)["items"]
    return [item["note"] for item in items if item["regarding"]["name"] == name]


def bundles(cluster):
    hooks = cluster.get("mutatingwebhookconfiguration", "gpufn")["webhooks"]
    return [hook["clientConfig"].get("caBundle") for hook in hooks]


def test_one_controller_leads_and_another_follows_when_it_is_killed(installed, start):
    controllers = [start("controller", name) for name in ("a", "b")]
    for controller in controllers:
        wait_until("the controller", controller.is_ready, WAIT_S)
    wait_until("certificates", lambda: secret(installed, WEBHOOK_SECRET), WAIT_S)
    wait_until("the bundle", lambda: all(bundles(installed)), WAIT_S)
    installed.get("configmap", "gpufn-ca", "--namespace", AGENT_NAMESPACE)

    installed.apply([function_pod("first", "default")])
    wait_until("an event", lambda: events_on(installed, "default", "first"), WAIT_S)
    assert "no nodes" in events_on(installed, "default", "first")[0]

    [leader] = [each for each in controllers if each.lines("leading")]
    [other] = [each for each in controllers if each is not leader]
    leader.end(signal.SIGKILL)
    installed.apply([function_pod("second", "default")])
    wait_until("another leader", lambda: other.lines("leading"), WAIT_S)
    wait_until("an event", lambda: events_on(installed, "default", "second"), WAIT_S)
    assert "gpufn_controller_leading 1.0" in other.probe("/metrics")[1]

    assert "forbidden" not in other.log.read_text()
    assert other.end() == 0
    assert holder(installed) == ""
    installed.kubectl("delete", "pod", "first", "second", "--force", "--grace-period=0")


def test_the_webhook_answers_as_long_as_it_knows_the_cluster_and_drains(installed, start, tmp_path):
    port = free_port()
    tls = tmp_path / "tls"
    tls.mkdir()
    webhook = start("webhook", "w", f"--port={port}", f"--tls={tls}")
    wait_until("its caches", lambda: webhook.probe() == (503, "certificate: there is none\n"), WAIT_S)

    start("controller", "c")
    wait_until("a certificate", lambda: secret(installed, WEBHOOK_SECRET), WAIT_S)
    for name, data in secret(installed, WEBHOOK_SECRET).items():
        (tls / name).write_bytes(data)
    wait_until("the webhook", webhook.is_ready, WAIT_S)
    installed.apply([node("gpu-1")])
    wait_until("the node", lambda: 'gpufn_cache_objects{resource="nodes"} 1.0' in webhook.probe("/metrics")[1], WAIT_S)

    answer = ask(port, tls / "ca.crt", function_pod("f", "default"))
    operations = json.loads(base64.b64decode(answer["patch"]))
    assert any(GPU in json.dumps(operation) or "affinity" in operation["path"] for operation in operations)

    webhook.send(signal.SIGTERM)
    wait_until("that it drains", lambda: "draining" in webhook.probe()[1], WAIT_S)
    assert ask(port, tls / "ca.crt", function_pod("g", "default"))["allowed"]
    assert webhook.wait() == 0
    assert "forbidden" not in webhook.log.read_text()
    installed.kubectl("delete", "node", "gpu-1")


def ask(port, ca_file, pod):
    """As the API server does: by the Service's name, and its CA."""
    request = {"uid": "u", "namespace": "default", "operation": "CREATE", "object": pod}
    body = json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}).encode()
    head = f"POST /pods HTTP/1.1\r\nHost: {WEBHOOK_HOST}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    context = ssl.create_default_context(cafile=str(ca_file))
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname=WEBHOOK_HOST) as secure,
    ):
        secure.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: secure.recv(65536), b""))
    return json.loads(answer.partition(b"\r\n\r\n")[2])["response"]
