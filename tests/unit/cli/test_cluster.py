"""Commands about a cluster, over a pretended API server."""

import csv
import io
import json
import time

import pytest

from adapter.cli.main import run
from adapter.policy.keep_alive import ENOUGH_GAPS
from tests.fakes.cluster import GI, FakeCluster, agent_pod, gpu_node, node, pod, serving

NODES, PODS = "/api/v1/nodes", "/api/v1/namespaces/default/pods"
GPU_NODES = "/apis/gpufn.dev/v1alpha1/gpunodes"
AGENTS = "/api/v1/namespaces/gpufn-agents/pods"
KNATIVE = "/apis/serving.knative.dev/v1/namespaces/default"
SNAPSHOT = "default/embed.default"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two GPU nodes, one of which has a snapshot; one without."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster = FakeCluster()
    cluster.put_now(f"{NODES}/gpu-1", node("gpu-1", 2))
    cluster.put_now(
        f"{NODES}/gpu-2", node("gpu-2", 1, "NVIDIA-A100-SXM4-40GB", **{"cloud.google.com/gke-spot": "true"})
    )
    cluster.put_now(f"{NODES}/plain", node("plain", 0))
    cluster.put_now(f"{GPU_NODES}/gpu-1", gpu_node((SNAPSHOT, 3 * GI)))
    cluster.put_now(f"{GPU_NODES}/gpu-2", gpu_node(restores=False))
    cluster.put_now(f"{AGENTS}/agent-1", agent_pod("gpu-1"))
    cluster.put_now(f"{AGENTS}/agent-2", agent_pod("gpu-2", ready=False))
    with serving(cluster, tmp_path):
        yield cluster


@pytest.fixture
def ask(cluster, capsys):
    """Runs a command on it; returns its exit code, output and errors."""

    def ask(*words):
        code = run([*words, "--kubeconfig", str(cluster.kubeconfig)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return ask


# Which cluster --------------------------------------------------------------------------------------------------------


def test_a_context_is_chosen_by_name_and_its_namespace_counts(cluster, ask):
    cluster.put_now("/api/v1/namespaces/elsewhere/pods/lonely", pod("lonely", "gpu-1", gpus=1))
    cluster.put_now("/api/v1/namespaces/elsewhere", {"metadata": {}})
    assert ask("explain", "lonely")[0] == 4
    code, out, _ = ask("explain", "lonely", "--context", "other")
    assert code == 0
    assert "lonely in elsewhere" in out


def test_what_is_no_cluster_is_bad_configuration(cluster, ask):
    code, _, err = ask("nodes", "--context", "nowhere")
    assert code == 3
    assert "gives no access to a cluster" in err


def test_a_cluster_that_is_away_is_a_peer_that_does_not_answer(cluster, ask):
    cluster.kubeconfig.write_text(cluster.kubeconfig.read_text().replace(cluster.url, "http://127.0.0.1:1"))
    code, _, err = ask("doctor")
    assert code == 6
    assert "cannot be reached" in err


def test_the_gateway_is_asked_where_no_cluster_is_named(cluster, monkeypatch, capsys, state_dir):
    monkeypatch.setenv("GPUFN_KUBECONFIG", str(cluster.kubeconfig))
    assert run(["nodes"]) == 0
    assert "gpu-1" in capsys.readouterr().out
    assert run(["nodes", "--no-cluster", "-g", "http://127.0.0.1:1", "--state", str(state_dir)]) == 6
    assert "No gateway answers" in capsys.readouterr().err


# nodes ----------------------------------------------------------------------------------------------------------------


def test_each_gpu_resource_of_a_node_is_a_line_with_its_holders(cluster, ask):
    cluster.put_now(f"{PODS}/embed-1", pod("embed", "gpu-1", gpus=1))
    cluster.put_now(f"{PODS}/trainer-0", pod("", "gpu-1", gpus=1))
    code, out, _ = ask("nodes")
    header, first, second = out.splitlines()
    assert code == 0
    assert header.split() == [
        "NODE", "MODEL", "MEMORY", "TOTAL", "USED", "FREE", "HELD", "BY", "SNAPSHOTS", "SPOT", "AGENT", "PROBLEM",
    ]  # fmt: skip
    assert first.split() == [
        "gpu-1", "NVIDIA-L4", "24.0Gi", "2", "2", "0", "embed,", "default/trainer-0", "1", "–", "ready", "–",
    ]  # fmt: skip
    assert second.split()[-7:] == ["spot", "not", "ready", "no", "snapshots:", "No", "CRIU"]


def test_a_pod_that_takes_a_snapshot_is_named_and_its_gpu_is_free(cluster, ask):
    taking = snapshot_pod("Running", node_name="gpu-2")
    taking["spec"]["containers"] = [{"name": "s", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]
    cluster.put_now(f"{PODS}/taking", taking)
    line = ask("nodes")[1].splitlines()[2].split()
    assert line[3:6] == ["1", "0", "1"]
    assert line[6:9] == ["snapshot", "of", SNAPSHOT]


def test_programs_get_all_of_it(cluster, ask):
    cluster.put_now(f"{PODS}/embed-1", pod("embed", "gpu-1", gpus=2))
    _, out, _ = ask("nodes", "-o", "json")
    first, second = json.loads(out)
    assert (first["node"], first["total"], first["used"], first["free"]) == ("gpu-1", 2, 2, 0)
    assert first["holders"] == [
        {"pod": "embed-1", "namespace": "default", "function": "embed", "units": 2, "takes_snapshot": ""}
    ]
    assert first["snapshots"] == [{"name": SNAPSHOT, "bytes": 3 * GI}]
    assert (second["spot"], second["problems"]) == (True, ["no snapshots: No CRIU"])
    rows = list(csv.DictReader(io.StringIO(ask("nodes", "-o", "csv")[1])))
    assert [row["node"] for row in rows] == ["gpu-1", "gpu-2"]
    assert ask("nodes", "-o", "name")[1].split() == ["gpu-1", "gpu-2"]


def test_a_node_that_takes_nothing_says_why(cluster, ask):
    cluster.put_now(f"{NODES}/gpu-1", node("gpu-1", 1, cordoned=True))
    assert "cordoned" in ask("nodes")[1].splitlines()[1]


def test_gpus_of_a_cluster_without_gpufn_are_listed_too(cluster, ask):
    for path in [path for path in cluster.objects if path.startswith((GPU_NODES, AGENTS))]:
        del cluster.objects[path]
    code, out, _ = ask("nodes")
    assert code == 0
    assert out.splitlines()[1].split()[-2:] == ["none", "–"]


# explain a pod --------------------------------------------------------------------------------------------------------


def admitted(**note):
    return {
        "gpufn.dev/patched": "1",
        "gpufn.dev/placement": json.dumps(note),
        "gpufn.dev/admitted-at": str(1_700_000_000 * 10**9),
    }


def test_a_pod_is_explained_by_what_was_decided_and_how_it_is_now(cluster, ask):
    note = admitted(resource="nvidia.com/gpu", units=1, prefer=[["gpu-1", 100.0, 0.9], ["gpu-2", 40.0, 20.0]])
    annotations = {"gpufn.dev/gpu": "1", "gpufn.dev/models": "l4", **note}
    cluster.put_now(f"{PODS}/embed-1", pod("embed", "gpu-1", gpus=1, annotations=annotations))
    code, out, _ = ask("explain", "embed-1")
    facts, _, table = out.partition("\n\n")
    lines = dict(line.split("  ", 1) for line in facts.splitlines())
    assert code == 0
    assert lines["NODE"].strip() == "gpu-1"
    assert lines["FUNCTION"].strip() == "embed.default (knative, revision embed-00001, tenant default)"
    assert lines["ASKED"].strip() == "gpu = 1; models = l4"
    assert (
        "2023-11-14T22:13:20Z: nvidia.com/gpu ×1, preferred gpu-1 (100, 900ms), gpu-2 (40, 20.00s)"
        in lines["WHEN MADE"]
    )
    first, second, third = table.splitlines()[1:]
    assert first.split() == ["gpu-1", "100", "20.00s", "nvidia.com/gpu", "×1", "fits"]
    assert "not l4" in second
    assert "no GPU" in third


def test_a_pod_does_not_stand_in_its_own_way(cluster, ask):
    """The GPU that it holds counts as free: it is asked where it could be, not where another one could."""
    cluster.put_now(f"{PODS}/embed-1", pod("embed", "gpu-2", gpus=1))
    _, out, _ = ask("explain", "pod/embed-1", "-o", "json")
    verdicts = {verdict["node"]: verdict for verdict in json.loads(out)["verdicts"]}
    assert verdicts["gpu-2"]["fits"]
    assert verdicts["plain"]["code"] == "no-gpu"


def test_a_pod_without_a_node_says_what_the_scheduler_says_and_exits_8_where_nothing_fits(cluster, ask):
    waiting = pod("huge", gpus=8)
    condition = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient gpu."}
    waiting["status"]["conditions"] = [condition]
    cluster.put_now(f"{PODS}/huge-1", waiting)
    code, out, err = ask("explain", "huge-1")
    assert code == 8
    assert "0/3 nodes are available" in out
    assert '✗ No node can run "huge-1" now.  [no-fitting-node]' in err
    assert "too few GPUs" in err
    assert "Only another node can help" in err


def test_what_only_time_can_help_is_said_so(cluster, ask):
    cluster.put_now(f"{PODS}/full", pod("", "gpu-1", gpus=2))
    cluster.put_now(f"{PODS}/full-2", pod("", "gpu-2", gpus=1))
    cluster.put_now(f"{PODS}/waits", pod("waits", gpus=1))
    code, _, err = ask("explain", "waits")
    assert code == 8
    assert "It waits until one is free" in err


def test_a_resource_that_the_webhook_chose_is_not_the_users(cluster, ask):
    annotations = {"gpufn.dev/gpu": "0.5", **admitted(resource="nvidia.com/gpu", units=1, prefer=[])}
    cluster.put_now(f"{PODS}/half", pod("half", "gpu-1", gpus=1, annotations=annotations))
    _, out, _ = ask("explain", "half", "-o", "json")
    assert json.loads(out)["notes"] == ["gpu = 0.5 takes a whole GPU, as none is shared there"]
    assert json.loads(out)["asked"] == ["gpu = 0.5"]


def test_a_share_that_is_there_is_what_it_takes(cluster, ask):
    cluster.objects[f"{NODES}/gpu-1"]["metadata"]["labels"] |= {
        "nvidia.com/gpu.replicas": "4",
        "nvidia.com/gpu.count": "1",
    }
    for share, notes in (("0.5", []), ("0.3", ["gpu = 0.3 takes 2 of 4 shares of one"])):
        cluster.put_now(f"{PODS}/part", pod("part", "gpu-1", annotations={"gpufn.dev/gpu": share}))
        assert json.loads(ask("explain", "part", "-o", "json")[1])["notes"][1:] == notes


def test_a_pod_that_met_no_webhook_says_so(cluster, ask):
    cluster.put_now(f"{PODS}/early", pod("early", "gpu-1", gpus=1))
    assert "did not see this pod" in ask("explain", "early")[1]


def test_a_strangers_pod_is_none_of_ours(cluster, ask):
    cluster.put_now(f"{PODS}/web", pod("", "plain"))
    code, _, err = ask("explain", "web")
    assert code == 4
    assert "[not-ours]" in err


def test_a_pod_that_takes_a_snapshot_says_of_what_and_that_it_waits(cluster, ask):
    taking = pod("", gpus=1, annotations={"gpufn.dev/snapshot-of": "acme/embed.acme"})
    taking["metadata"]["labels"] = {"gpufn.dev/task": "snapshot"}
    cluster.put_now(f"{PODS}/gpufn-snapshot-1", taking)
    code, _, err = ask("explain", "gpufn-snapshot-1")
    assert code == 4
    assert "takes the snapshot acme/embed.acme, and waits for room on its node" in err
    assert "[not-a-replica]" in err


def test_a_hundred_nodes_that_do_not_fit_are_told_by_reason(cluster, ask):
    for number in range(100):
        cluster.put_now(f"{NODES}/cpu-{number}", node(f"cpu-{number}", 0))
    cluster.put_now(f"{PODS}/embed-1", pod("embed", "gpu-1", gpus=1))
    _, out, _ = ask("explain", "embed-1")
    assert "101 nodes" in out
    assert len(ask("explain", "embed-1", "-o", "wide")[1].splitlines()) > 100


# explain a function ---------------------------------------------------------------------------------------------------


def service(annotations=None, on_service=None):
    template = {
        "metadata": {"annotations": annotations or {}},
        "spec": {"containers": [{"image": "embed", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]},
    }
    return {
        "metadata": {"annotations": on_service or {}},
        "spec": {"template": template},
        "status": {"latestReadyRevisionName": "embed-00001"},
    }


def revision(**annotations):
    labels = {"serving.knative.dev/service": "embed", "serving.knative.dev/routingState": "active"}
    owned = {f"f:{key}": {} for key in annotations}
    managed = {"manager": "gpufn", "operation": "Apply", "fieldsV1": {"f:metadata": {"f:annotations": owned}}}
    metadata = {"labels": labels, "annotations": annotations, "managedFields": [managed]}
    return {"metadata": metadata, "spec": service()["spec"]["template"]["spec"]}


@pytest.fixture
def embed(cluster):
    cluster.put_now(f"{KNATIVE}/services/embed", service({"gpufn.dev/gpu": "2", "gpufn.dev/max": "3"}))
    retention = "autoscaling.knative.dev/scale-to-zero-pod-retention-period"
    cluster.put_now(f"{KNATIVE}/revisions/embed-00001", revision(**{retention: "30s"}))
    cluster.put_now("/api/v1/namespaces/default", {"metadata": {"labels": {"gpufn.dev/snapshots": "enabled"}}})
    return cluster


def test_a_function_is_explained_by_what_was_understood_and_which_setting_wins(embed, ask):
    code, out, _ = ask("explain", "embed")
    assert code == 0
    assert out.startswith("FUNCTION   embed.default (knative, tenant default)")
    assert "gpu = 1; max = 3" in out
    assert "gpufn.dev/gpu = 2 has no effect: the container's limits ask for 1" in out
    assert "SNAPSHOTS  gpu-1" in out
    assert out.splitlines()[-3].split()[:2] == ["gpu-1", "100"]


def snapshot_pod(phase, message="", of=SNAPSHOT, node_name=""):
    """One that the controller made for node gpu-2."""
    term = {"key": "metadata.name", "operator": "In", "values": ["gpu-2"]}
    terms = {"nodeSelectorTerms": [{"matchFields": [term]}]}
    metadata = {
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "labels": {"gpufn.dev/task": "snapshot"},
        "annotations": {"gpufn.dev/snapshot-of": of},
    }
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    return {
        "metadata": metadata,
        "spec": {"containers": [], "affinity": affinity, "nodeName": node_name},
        "status": {"phase": phase, "message": message},
    }


@pytest.mark.parametrize(
    ("taking", "said"),
    [
        (snapshot_pod("Pending"), "gpu-1; pod taking waits for room on gpu-2, to take it there"),
        (snapshot_pod("Running", node_name="gpu-2"), "gpu-1; pod taking takes it on gpu-2"),
        (
            snapshot_pod("Failed", '{"reason": "The disk is full", "code": "disk-full"}'),
            f"gpu-1; No snapshot {SNAPSHOT} on gpu-2, replicas there load as before: The disk is full [disk-full]",
        ),
        (snapshot_pod("Succeeded"), "gpu-1"),
        (snapshot_pod("Pending", of="default/another.default"), "gpu-1"),
    ],
)
def test_what_is_done_for_a_functions_snapshots_is_told(embed, ask, taking, said):
    embed.put_now(f"{PODS}/taking", taking)
    lines = dict(line.split("  ", 1) for line in ask("explain", "embed")[1].splitlines() if "  " in line)
    assert lines["SNAPSHOTS"].strip() == said


def test_a_wake_that_rests_on_no_measurement_says_so(embed, ask):
    assert "no load of it was measured yet: WAKE takes 20.00s for one" in ask("explain", "embed")[1]
    known = {"function": "embed", "namespace": "default", "busy": [], "wakes_s": {"load": [1.5]}}
    embed.ledger["/v1/activity"] = {"functions": [known]}
    assert "WAKE takes" not in ask("explain", "embed")[1]


def test_what_it_asks_is_said_in_the_words_of_annotations(cluster, ask):
    asked = {
        "memory": "80Gi", "compute": "8.0", "models": "a100,l4", "idle": "1h30m", "cold-price": "0.5", "exec-timeout": "90s",
        "body": "1500Ki", "start-timeout": "7.5s", "budget": "36h",
    }  # fmt: skip
    cluster.put_now(f"{KNATIVE}/services/embed", service({f"gpufn.dev/{key}": text for key, text in asked.items()}))
    _, out, _ = ask("explain", "embed", "-o", "json")
    said = dict(each.split(" = ") for each in json.loads(out)["asked"])
    assert said == {**asked, "gpu": "1", "exec-timeout": "1m30s"}


@pytest.mark.parametrize("idle", ["auto", "0s", "45s"])
def test_what_says_never_or_by_itself_is_said_so(cluster, ask, idle):
    cluster.put_now(f"{KNATIVE}/services/embed", service({"gpufn.dev/idle": idle}))
    assert f"idle = {idle}" in ask("explain", "embed")[1]


def test_a_functions_wake_is_what_its_starts_took(embed, ask):
    known = {"function": "embed", "namespace": "default", "busy": [], "wakes_s": {"load": [1.5, 1.4, 1.3]}}
    embed.ledger["/v1/activity"] = {"functions": [known]}
    verdicts = {each["node"]: each for each in json.loads(ask("explain", "embed", "-o", "json")[1])["verdicts"]}
    assert verdicts["gpu-2"]["wake_s"] == 1.4


def test_a_functions_keep_alive_is_shown_with_its_reason(embed, ask):
    now_ns = time.time_ns()
    busy = [(now_ns - n * 60 * 10**9, now_ns - n * 60 * 10**9 + 10**9) for n in reversed(range(1, ENOUGH_GAPS + 3))]
    activity = {"function": "embed", "namespace": "default", "busy": busy, "wakes_s": {"restore": [2.4]}}
    embed.ledger["/v1/activity"] = {"functions": [activity]}
    _, out, _ = ask("explain", "embed", "-o", "json")
    kept = json.loads(out)["kept"]
    assert kept.startswith("1m30s idle, soon 7.00s idle: a cold start takes 2.40s, which is worth 26.40s of a held GPU")
    assert "of the latest 11 idle gaps" in kept


@pytest.mark.parametrize(
    ("held_gpu_s", "said"),
    [
        ({"embed.default": 12.5}, "BUDGET     12.5 of 100.0 GPU-seconds held in this UTC day"),
        ({"embed.default": 81.0}, "The budget of embed.default is nearly spent."),
        ({"embed.default": 100.0}, "The budget of embed.default is spent."),
        ({"embed.other": 100.0}, "BUDGET     0.0 of 100.0 GPU-seconds"),
    ],
)
def test_a_budget_is_explained_by_what_was_held_of_it(embed, ask, held_gpu_s, said):
    embed.put_now(f"{KNATIVE}/services/embed", service({"gpufn.dev/budget": "100"}))
    embed.ledger = {"/v1/held": {"gpu_seconds": held_gpu_s}, "/v1/activity": {"functions": []}}
    assert said in ask("explain", "embed")[1]


def test_a_budget_that_nobody_counts_says_so(embed, ask):
    embed.put_now(f"{KNATIVE}/services/embed", service({"gpufn.dev/budget": "100"}))
    assert "BUDGET     100.0 GPU-seconds in a UTC day; the ledger does not answer." in ask("explain", "embed")[1]


def test_a_function_without_a_budget_says_nothing_of_one(embed, ask):
    assert "BUDGET" not in ask("explain", "embed")[1]


def test_without_the_ledger_it_says_what_it_does_not_know(embed, ask):
    _, out, _ = ask("explain", "embed")
    assert "its traffic is not known: the ledger does not answer" in out


def test_annotations_that_never_reached_the_template_are_named(cluster, ask):
    cluster.put_now(f"{KNATIVE}/services/embed", service(on_service={"gpufn.dev/models": "a100"}))
    assert "gpufn.dev/models is on the Service only" in ask("explain", "function/embed")[1]


def test_a_function_of_openfaas_at_zero_is_known_by_its_record(cluster, ask):
    wanted = {
        "service": "chat",
        "image": "chat:1",
        "labels": {"com.openfaas.scale.max": "4"},
        "limits": {"nvidia.com/gpu": "1"},
    }
    cluster.put_now("/api/v1/namespaces/default/configmaps/function-chat", {"data": {"deployment": json.dumps(wanted)}})
    code, out, _ = ask("explain", "chat")
    assert code == 0
    assert "openfaas" in out
    assert "gpu = 1; max = 4" in out


def test_a_deployment_with_our_label_is_a_function_too(cluster, ask):
    template = pod("own", gpus=1, framework="plain")
    deployment = {"spec": {"template": {key: template[key] for key in ("metadata", "spec")}}}
    cluster.put_now("/apis/apps/v1/namespaces/default/deployments/any-name", deployment)
    code, out, _ = ask("explain", "own.default")
    assert code == 0
    assert "own.default (plain, tenant default)" in out
    assert "KEPT" not in out  # nobody but its owner scales it


def test_impossible_annotations_are_told_as_the_webhook_would(cluster, ask):
    cluster.put_now(f"{KNATIVE}/services/embed", service({"gpufn.dev/modles": "a100"}))
    code, _, err = ask("explain", "embed")
    assert code == 3
    assert "Did you mean gpufn.dev/models?" in err


def test_a_kind_that_is_neither_is_refused(cluster, ask):
    assert ask("explain", "deployment/embed")[0] == 3
    assert ask("explain", "pod/nothing")[0] == 4


# usage and starts -----------------------------------------------------------------------------------------------------


def test_a_clusters_ledger_is_read_through_its_api_server(cluster, ask):
    now_ns = time.time_ns()
    lease = {
        "id": "n/1", "function": "embed", "namespace": "default", "revision": "r", "replica": "embed-1", "tenant": "acme",
        "price_class": "standard", "device": "GPU-1", "share": 1.0, "phase": "running",
        "started_at_ns": now_ns - 10**10, "ended_at_ns": now_ns - 10**9, "gpu_model": "NVIDIA L4",
    }  # fmt: skip
    cluster.ledger = {"/v1/leases": {"leases": [lease]}, "/v1/starts": {"starts": []}}
    code, out, _ = ask("usage", "report", "--for", "1h", "--by", "tenant")
    assert code == 0
    assert out.splitlines()[1].split()[:4] == ["acme", "NVIDIA", "L4", "GPU-seconds"]
    assert cluster.asked[0]["summary"] == "true"
    code, out, _ = ask("usage", "leases", "--for", "1h")
    assert (code, out.splitlines()[1].split()[0]) == (0, "n/1")
    assert ask("usage", "leases", "--for", "1h", "-n", "other")[1] == ""


def test_starts_of_a_cluster_have_the_phases_that_come_before_a_container(cluster, ask):
    phases = [
        {"name": n, "start_ns": s * 10**8, "end_ns": e * 10**8}
        for n, s, e in (("schedule", 0, 8), ("pull", 8, 20), ("restore", 20, 30))
    ]
    record = {
        "function": "embed", "namespace": "default", "revision": "r", "replica": "embed-1", "rung": "restore",
        "started_at_ns": time.time_ns(), "total_ns": 3 * 10**9, "phases": phases, "skipped": [], "held_requests": 1,
        "error": "", "version": 1,
    }  # fmt: skip
    cluster.ledger = {"/v1/starts": {"starts": [record]}}
    code, out, _ = ask("starts", "embed")
    header, row = out.splitlines()
    assert code == 0
    assert header.split() == ["STARTED", "FUNCTION", "RUNG", "TOTAL", "SCHEDULE", "PULL", "RESTORE"]
    assert row.split()[2:] == ["restore", "3.00s", "800ms", "1.20s", "1.00s"]
    assert cluster.asked[0] == {"since_ns": "0", "function": "embed", "namespace": "default", "limit": "20"}
    assert "|" in ask("starts", "embed", "--timeline")[1]


def test_no_starts_of_a_cluster_send_nobody_to_a_gateway(cluster, ask):
    cluster.ledger = {"/v1/starts": {"starts": []}}
    code, _, err = ask("starts", "embed")
    assert code == 0
    assert (
        err
        == "No starts of embed.default. Agents tell of one some seconds after its pod is ready. Of other namespaces: -A\n"
    )


def test_who_may_not_read_the_ledger_is_told_what_to_ask_for(cluster, ask):
    cluster.denied.add("create serviceaccounts")
    code, _, err = ask("starts")
    assert code == 6
    assert "create rolebinding NAME --role=gpufn-ledger-reader" in err


def test_a_ledger_that_is_down_is_said_to_be(cluster, ask):
    code, _, err = ask("usage", "report")
    assert code == 6
    assert "✗ The ledger does not answer.  [ledger-down]" in err
