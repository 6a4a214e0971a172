"""`gpufn doctor --cluster`: what is found, what it means, and what to do about it."""

import base64
import datetime as dt
import json

import pytest

from adapter.cli.main import run
from adapter.cluster.certificates import make_authority
from tests.fakes.cluster import FakeCluster, agent_pod, gpu_node, node, serving

SYSTEM = "/api/v1/namespaces/gpufn-system"
DEPLOYMENTS = "/apis/apps/v1/namespaces/gpufn-system/deployments"
AGENT_SET = "/apis/apps/v1/namespaces/gpufn-agents/daemonsets/gpufn-agent"
WEBHOOK = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/gpufn"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/gpufn-system/leases/gpufn-controller"
AGENTS = "/api/v1/namespaces/gpufn-agents/pods"


def now(**ago):
    return dt.datetime.now(dt.timezone.utc) - dt.timedelta(**ago)


def deployment(component, ready=2, wanted=2):
    labels = {"app.kubernetes.io/name": "gpufn", "app.kubernetes.io/component": component}
    template = {"spec": {"containers": [{"image": "gpufn:1"}]}}
    return {
        "metadata": {"labels": labels},
        "spec": {"replicas": wanted, "template": template},
        "status": {"readyReplicas": ready},
    }


def webhook(**made):
    bundle = base64.b64encode(make_authority(now(**made)).certificate).decode()
    names = ("knative.pods.gpufn.dev", "services.knative.gpufn.dev")
    return {"webhooks": [{"name": name, "clientConfig": {"caBundle": bundle}} for name in names]}


@pytest.fixture
def cluster(tmp_path):
    """All is well."""
    cluster = FakeCluster()
    put = cluster.put_now
    put(SYSTEM, {"metadata": {"name": "gpufn-system"}})
    for component in ("webhook", "controller", "ledger"):
        put(f"{DEPLOYMENTS}/gpufn-{component}", deployment(component))
    put(LEASE, {"spec": {"holderIdentity": "controller-1", "renewTime": now(seconds=3).isoformat()}})
    put(WEBHOOK, webhook(days=1))
    put(AGENT_SET, {"status": {"desiredNumberScheduled": 1, "numberReady": 1}})
    put("/api/v1/nodes/gpu-1", node("gpu-1", 2))
    put("/apis/gpufn.dev/v1alpha1/gpunodes/gpu-1", gpu_node(("default/embed.default", 1)))
    put(f"{AGENTS}/agent-1", agent_pod("gpu-1"))
    put("/apis/node.k8s.io/v1/runtimeclasses/nvidia", {"metadata": {"name": "nvidia"}})
    put("/api/v1/namespaces/team", {"metadata": {"labels": {"gpufn.dev/snapshots": "enabled"}}})
    put("/api/v1/namespaces/knative-serving", {"metadata": {"labels": {"app.kubernetes.io/version": "1.15"}}})
    cluster.ledger = {"/v1/starts": {"starts": []}}
    with serving(cluster, tmp_path):
        yield cluster


@pytest.fixture
def findings(cluster, capsys):
    """Each finding by its name, and the exit code."""

    def findings():
        code = run(["doctor", "--kubeconfig", str(cluster.kubeconfig), "-o", "json"])
        found = json.loads(capsys.readouterr().out)
        assert len({finding["name"] for finding in found}) == len(found)
        return {finding["name"]: finding for finding in found}, code

    return findings


def test_where_all_is_well_every_line_is_ok(findings):
    found, code = findings()
    assert {name for name, finding in found.items() if finding["verdict"] != "ok"} == set()
    assert code == 0
    assert list(found) == [
        "api", "rights", "installed", "webhook", "controller", "ledger", "leader", "admission", "usage", "agents",
        "snapshots", "namespace team", "gpus", "runtime", "knative",
    ]  # fmt: skip


def _old(cluster):
    cluster.put_now("/version", {"major": "1", "minor": "28+", "gitVersion": "v1.28.1"})


def _down(cluster):
    cluster.put_now(f"{DEPLOYMENTS}/gpufn-webhook", deployment("webhook", ready=0))


def _half(cluster):
    cluster.put_now(f"{DEPLOYMENTS}/gpufn-controller", deployment("controller", ready=1))


def _silent(cluster):
    cluster.put_now(LEASE, {"spec": {"holderIdentity": "controller-1", "renewTime": now(minutes=9).isoformat()}})


def _untrusted(cluster):
    cluster.put_now(WEBHOOK, {"webhooks": [{"clientConfig": {}}]})


def _half_trusted(cluster):
    half = webhook(days=1)
    half["webhooks"][1]["clientConfig"] = {}
    cluster.put_now(WEBHOOK, half)


def _without_knative(cluster):
    without = webhook(days=1)
    del without["webhooks"][1]
    cluster.put_now(WEBHOOK, without)


def _ended(cluster):
    cluster.put_now(WEBHOOK, webhook(days=400))


def _ending(cluster):
    cluster.put_now(WEBHOOK, webhook(days=355))


def _unasked(cluster):
    del cluster.objects[WEBHOOK]


def _alone(cluster):
    cluster.put_now(f"{AGENTS}/agent-1", agent_pod("gpu-1", ready=False))


def _nameless(cluster):
    cluster.put_now("/api/v1/nodes/gpu-1", node("gpu-1", 2, ""))


def _gpuless(cluster):
    cluster.put_now("/api/v1/nodes/gpu-1", node("gpu-1", 0))


def _without_criu(cluster):
    cluster.put_now("/apis/gpufn.dev/v1alpha1/gpunodes/gpu-1", gpu_node(restores=False))


def _refusing(cluster):
    labels = {"gpufn.dev/snapshots": "enabled", "pod-security.kubernetes.io/enforce": "baseline"}
    cluster.put_now("/api/v1/namespaces/team", {"metadata": {"labels": labels}})


def _mistyped(cluster):
    cluster.put_now("/api/v1/namespaces/team", {"metadata": {"labels": {"gpufn.dev/snapshots": "true"}}})


def _never_zero(cluster):
    path = "/api/v1/namespaces/knative-serving/configmaps/config-autoscaler"
    cluster.put_now(path, {"data": {"enable-scale-to-zero": "false"}})


def _dumb(cluster):
    cluster.ledger = {}


def _unread(cluster):
    cluster.denied.add("create serviceaccounts")


@pytest.mark.parametrize(
    ("change", "name", "verdict", "said"),
    [
        (_old, "api", "failed", "its admission lacks"),
        (_down, "webhook", "failed", "none of 2 replicas is ready: pods are made as if gpufn were not there"),
        (_half, "controller", "warning", "1 of 2 replicas are ready"),
        (_silent, "leader", "failed", "last heard of 9m00s ago"),
        (_untrusted, "admission", "failed", "no authority to trust"),
        (_ended, "admission", "failed", "ended"),
        (_ending, "admission", "warning", "ends in"),
        (_half_trusted, "admission", "failed", "services.knative.gpufn.dev has no authority to be trusted by"),
        (_without_knative, "knative services", "warning", "no webhook of gpufn's looks at Services"),
        (_unasked, "admission", "failed", "has no webhook gpufn"),
        (_alone, "agents", "failed", "none is ready on gpu-1: GPUs there are not metered"),
        (_nameless, "gpu labels", "warning", "which GPU model gpu-1 has"),
        (_gpuless, "gpus", "warning", "none of 1 nodes offers a GPU"),
        (_without_criu, "snapshots", "warning", "CRIU does not work on gpu-1, functions load there: no CRIU"),
        (_refusing, "namespace team", "failed", "Pod Security level baseline refuses their pods"),
        (_mistyped, "namespace team", "warning", "'true', which says nothing"),
        (_never_zero, "zero", "failed", "no function goes to zero"),
        (_dumb, "usage", "failed", "the ledger does not answer"),
        (_unread, "usage", "warning", "you may not read the ledger"),
        (_unread, "rights", "warning", "make tokens of gpufn-reader (for usage, starts)"),
    ],
)
def test_what_is_wrong_is_one_line_with_what_it_means(cluster, findings, change, name, verdict, said):
    change(cluster)
    found, code = findings()
    assert found[name]["verdict"] == verdict
    assert said in found[name]["reason"]
    assert code == (verdict == "failed")
    others = {other for other, finding in found.items() if finding["verdict"] == "failed"} - {name}
    assert not others


def component_pod(component, **state):
    labels = {"app.kubernetes.io/name": "gpufn", "app.kubernetes.io/component": component}
    return {"metadata": {"labels": labels}, "status": {"containerStatuses": [{"ready": False, "state": state}]}}


@pytest.mark.parametrize(
    ("state", "why", "fix"),
    [
        (
            {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "gpufn-ledger" not found'}},
            '(secret "gpufn-ledger" not found)',
            "describe pods -l app.kubernetes.io/component=ledger",
        ),
        (
            {"waiting": {"reason": "ContainerCreating"}},
            "(ContainerCreating)",
            "describe pods -l app.kubernetes.io/component=ledger",
        ),
        (
            {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}},
            "(back-off 10s)",
            "logs -l app.kubernetes.io/component=ledger --previous",
        ),
        ({"running": {}}, "is ready: agents keep", "logs -l app.kubernetes.io/component=ledger"),
    ],
)
def test_a_component_that_is_down_says_what_its_container_waits_for(cluster, findings, state, why, fix):
    cluster.put_now(f"{DEPLOYMENTS}/gpufn-ledger", deployment("ledger", ready=0, wanted=1))
    cluster.put_now(f"{SYSTEM}/pods/gpufn-ledger-1", component_pod("ledger", **state))
    cluster.put_now(f"{SYSTEM}/pods/gpufn-webhook-1", component_pod("webhook", waiting={"reason": "of another"}))
    found, _ = findings()
    assert why in found["ledger"]["reason"]
    assert found["ledger"]["fix"].endswith(fix)


def test_the_doctor_sends_nobody_to_the_doctor(cluster, findings):
    _dumb(cluster)
    found, _ = findings()
    assert "logs deployment/gpufn-ledger" in found["usage"]["fix"]


def test_a_cluster_without_gpufn_is_told_once(cluster, findings):
    del cluster.objects[SYSTEM]
    found, code = findings()
    assert code == 1
    assert [name for name, finding in found.items() if finding["verdict"] == "failed"] == ["installed"]
    assert "kubectl apply -k" in found["installed"]["fix"]
    assert "gpus" in found


def test_what_the_caller_may_not_see_is_no_failure(cluster, findings):
    cluster.denied |= {"list nodes", "list deployments"}
    found, code = findings()
    assert code == 0
    assert found["components"]["verdict"] == "warning"
    assert "you may not look" in found["gpus"]["reason"]
    assert "list nodes (for nodes, explain)" in found["rights"]["reason"]
