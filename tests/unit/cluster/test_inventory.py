import pytest

from adapter.cluster.inventory import held_by_node, label_values, model_terms, pod_requests, read_node, ruled_out
from adapter.cluster.quantity import parse_quantity
from adapter.errors import ConfigError
from adapter.policy.node_terms import Requirement, Taint
from adapter.policy.placement import Node, Verdict

GI = 2**30
MI = 2**20
READY = [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": "True"}]
A100 = {
    "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB",
    "nvidia.com/gpu.memory": "40960",
    "nvidia.com/gpu.compute.major": "8",
    "nvidia.com/gpu.compute.minor": "0",
    "nvidia.com/gpu.replicas": "1",
}


def node(labels=None, resources=None, *, conditions=READY, spec=None):
    amounts = {"cpu": "8", "memory": "32Gi", **(resources or {})}
    return {
        "metadata": {"name": "n1", "labels": labels or {}},
        "spec": spec or {},
        "status": {"allocatable": amounts, "conditions": conditions},
    }


def offers(labels, resources, held=None):
    return read_node(node(labels, resources), held or {}).offers


def only(labels, resources, held=None):
    (offer,) = offers(labels, resources, held)
    return offer


# Quantities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "whole", "milli"),
    [("2", 2, 2000), ("500m", 1, 500), ("1.5", 2, 1500), ("64Gi", 64 * GI, None), ("1e3", 1000, None), (4, 4, 4000),
     ("1G", 10**9, None), ("100n", 1, 1), (".5", 1, 500), ("1E", 10**18, None), ("0", 0, 0)],
)  # fmt: skip
def test_quantities_as_kubernetes_writes_them(text, whole, milli):
    assert parse_quantity(text) == whole
    assert milli is None or parse_quantity(text, thousandths=True) == milli


@pytest.mark.parametrize("text", ["", "many", "1 Gi", "1GiB", "1e", "--1", None, {}, "1e999"])
def test_what_is_no_quantity_is_refused(text):
    with pytest.raises(ConfigError):
        parse_quantity(text)


# Pods -----------------------------------------------------------------------------------------------


def container(requests=None, limits=None, **more):
    return {"resources": {"requests": requests or {}, "limits": limits or {}}, **more}


def test_a_pod_takes_the_sum_of_its_containers_or_the_largest_init_container():
    pod = {
        "spec": {
            "initContainers": [container({"cpu": "3"}), container({"cpu": "1", "memory": "2Gi"})],
            "containers": [container({"cpu": "500m"}, {"nvidia.com/gpu": "1"}), container({"cpu": "1"})],
            "overhead": {"cpu": "100m"},
        }
    }
    assert pod_requests(pod) == {"cpu": 3100, "memory": 2 * GI, "nvidia.com/gpu": 1}


def test_a_sidecar_stays_beside_the_init_containers_after_it():
    pod = {
        "spec": {
            "initContainers": [container({"cpu": "1"}, restartPolicy="Always"), container({"cpu": "2"})],
            "containers": [container({"cpu": "500m"})],
        }
    }
    assert pod_requests(pod)["cpu"] == 3000


def test_a_pods_own_requests_count_instead_of_its_containers():
    pod = {"spec": {"containers": [container({"cpu": "1"})], "resources": {"requests": {"cpu": "3"}}}}
    assert pod_requests(pod)["cpu"] == 3000


def test_pods_that_end_hold_their_gpus_and_those_that_ended_do_not():
    def pod(name, phase="Running", on="n1", **metadata):
        spec = {"containers": [container({}, {"nvidia.com/gpu": "1"})], **({"nodeName": on} if on else {})}
        return {"metadata": {"name": name, **metadata}, "spec": spec, "status": {"phase": phase}}

    pods = [
        pod("runs"),
        pod("ends", deletionTimestamp="2026-01-01T00:00:00Z"),
        pod("over", "Succeeded"),
        pod("failed", "Failed"),
        pod("waits", "Pending", on=""),
        pod("starts", "Pending", on="n2"),
    ]
    held = held_by_node(pods)
    assert {name: amounts["nvidia.com/gpu"] for name, amounts in held.items()} == {"n1": 2, "n2": 1}
    assert held["n1"]["pods"] == 2


def test_a_pod_that_gives_way_to_any_function_takes_nothing_of_what_functions_may_have():
    one = {"spec": {"nodeName": "n1", "containers": [container({"cpu": "1"}, {"nvidia.com/gpu": "1"})]}}
    gives_way, anothers = ({**one, "metadata": {"labels": {"gpufn.dev/task": task}}} for task in ("snapshot", "x"))
    assert held_by_node([gives_way]) == {}
    assert held_by_node([gives_way, anothers])["n1"]["nvidia.com/gpu"] == 1


# Nodes ----------------------------------------------------------------------------------------------


def test_what_is_free_is_what_pods_do_not_hold_and_what_cannot_be_read_is_not_there():
    made = read_node(node(A100, {"nvidia.com/gpu": "what?"}), {"cpu": 3000, "memory": 2 * GI, "nvidia.com/gpu": 1})
    assert (made.free_cpu_milli, made.free_memory_bytes, made.offers) == (5000, 30 * GI, ())
    offer = only(A100, {"nvidia.com/gpu": "4"}, {"nvidia.com/gpu": 1})
    assert (offer.allocatable, offer.used, offer.free) == (4, 1, 3)


def test_labels_of_feature_discovery():
    offer = only(A100, {"nvidia.com/gpu": "2"})
    assert (offer.model, offer.memory_bytes) == ("NVIDIA-A100-SXM4-40GB", 40960 * MI)
    assert (offer.compute_capability, offer.mig_profile, offer.shares) == ((8, 0), "", 1)


@pytest.mark.parametrize(
    ("product", "resource"),
    [("NVIDIA-A100-SXM4-40GB-SHARED", "nvidia.com/gpu"), ("NVIDIA-A100-SXM4-40GB", "nvidia.com/gpu.shared")],
)
def test_shared_gpus_are_sold_in_parts(product, resource):
    labels = {**A100, "nvidia.com/gpu.product": product, "nvidia.com/gpu.replicas": "4"}
    offer = only(labels, {resource: "8"})
    assert (offer.model, offer.shares, offer.memory_bytes) == ("NVIDIA-A100-SXM4-40GB", 4, 10240 * MI)


def test_slices_that_are_all_alike_are_sold_as_gpus():
    labels = {
        **A100,
        "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb",
        "nvidia.com/gpu.memory": "4864",
        "nvidia.com/mig.strategy": "single",
    }
    offer = only(labels, {"nvidia.com/gpu": "7"})
    assert (offer.model, offer.mig_profile, offer.memory_bytes) == ("NVIDIA-A100-SXM4-40GB", "1g.5gb", 4864 * MI)


def test_slices_and_whole_gpus_of_one_node_are_told_apart():
    labels = {
        **A100,
        "nvidia.com/gpu.replicas": "0",
        "nvidia.com/mig-1g.5gb.product": "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb",
        "nvidia.com/mig-1g.5gb.memory": "4864",
        "nvidia.com/mig-3g.20gb.memory": "20096",
    }
    found = offers(
        labels,
        {
            "nvidia.com/gpu": "1",
            "nvidia.com/mig-1g.5gb": "2",
            "nvidia.com/mig-3g.20gb": "1",
            "nvidia.com/mig-7g.40gb": "0",
        },
    )
    assert [(o.resource, o.mig_profile, o.memory_bytes // MI) for o in found] == [
        ("nvidia.com/gpu", "", 40960),
        ("nvidia.com/mig-1g.5gb", "1g.5gb", 4864),
        ("nvidia.com/mig-3g.20gb", "3g.20gb", 20096),
    ]
    assert {o.model for o in found} == {"NVIDIA-A100-SXM4-40GB"}


@pytest.mark.parametrize(
    ("labels", "resource", "model", "memory_bytes"),
    [
        ({"cloud.google.com/gke-accelerator": "nvidia-tesla-t4"}, "nvidia.com/gpu", "nvidia-tesla-t4", 0),
        ({"k8s.amazonaws.com/accelerator": "nvidia-tesla-v100"}, "nvidia.com/gpu", "nvidia-tesla-v100", 0),
        (
            {"karpenter.k8s.aws/instance-gpu-name": "a10g", "karpenter.k8s.aws/instance-gpu-memory": "24576"},
            "nvidia.com/gpu", "a10g", 24576 * MI,
        ),
        ({"karpenter.azure.com/sku-gpu-name": "A100"}, "nvidia.com/gpu", "A100", 0),
        ({"amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM", "amd.com/gpu.vram": "192G"}, "amd.com/gpu", "AMD_Instinct_MI300X_OAM", 192 * GI),
        ({"beta.amd.com/gpu.vram.64G": "1", "beta.amd.com/gpu.product-name.MI250": "1"}, "amd.com/gpu", "MI250", 64 * GI),
        ({"gpu.intel.com/product": "Max_1550", "gpu.intel.com/memory.max": "48000000000"}, "gpu.intel.com/xe", "Max_1550", 48 * 10**9),
        ({}, "nvidia.com/gpu", "", 0),
        ({"nvidia.com/gpu.memory": "lots", "nvidia.com/gpu.replicas": "-3"}, "nvidia.com/gpu", "", 0),
    ],
)  # fmt: skip
def test_labels_of_other_vendors_and_clouds(labels, resource, model, memory_bytes):
    offer = only(labels, {resource: "1"})
    assert (offer.model, offer.memory_bytes, offer.shares) == (model, memory_bytes, 1)


def test_google_sells_slices_and_shares_as_gpus():
    slices = only({"cloud.google.com/gke-gpu-partition-size": "1g.5gb"}, {"nvidia.com/gpu": "7"})
    shares = only({"cloud.google.com/gke-max-shared-clients-per-gpu": "3"}, {"nvidia.com/gpu": "3"})
    assert (slices.mig_profile, shares.shares) == ("1g.5gb", 3)


def test_what_looked_at_the_hardware_is_believed_before_what_a_provider_calls_it():
    labels = {**A100, "cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}
    assert only(labels, {"nvidia.com/gpu": "1"}).model == "NVIDIA-A100-SXM4-40GB"


def test_the_agent_speaks_where_labels_are_silent():
    gpus = [{"uuid": "GPU-1", "model": "NVIDIA L4", "memoryBytes": 24 * GI, "slice": False}] * 2
    gpu_node = {"status": {"gpus": gpus}}
    made = read_node(node({}, {"nvidia.com/gpu": "2"}), {}, gpu_node)
    assert (made.offers[0].model, made.offers[0].memory_bytes) == ("NVIDIA L4", 24 * GI)
    gpus.append({"model": "NVIDIA T4", "memoryBytes": 16 * GI})
    assert read_node(node({}, {"nvidia.com/gpu": "3"}), {}, gpu_node).offers[0].model == ""


def test_snapshots_and_the_disk_come_from_the_agent():
    status = {"snapshots": [{"name": "t/a.n", "bytes": 5}, {"bytes": 1}, "nonsense"], "diskBytesPerSecond": 1e9}
    made = read_node(node(), {}, {"status": status})
    assert (dict(made.snapshots), made.disk_bytes_per_s) == ({"t/a.n": 5}, 1e9)
    status["restore"] = {"works": False, "whyNot": "no CRIU"}
    assert read_node(node(), {}, {"status": status}).snapshots == {}


@pytest.mark.parametrize(
    ("labels", "is_spot"),
    [
        ({"karpenter.sh/capacity-type": "spot"}, True),
        ({"karpenter.sh/capacity-type": "on-demand"}, False),
        ({"eks.amazonaws.com/capacityType": "SPOT"}, True),
        ({"cloud.google.com/gke-spot": "true"}, True),
        ({"cloud.google.com/gke-preemptible": "true"}, True),
        ({"kubernetes.azure.com/scalesetpriority": "spot"}, True),
        ({}, False),
    ],
)
def test_spot_machines_of_each_cloud(labels, is_spot):
    assert read_node(node(labels), {}).is_spot is is_spot


@pytest.mark.parametrize(
    ("made", "why_not"),
    [
        (node(), ""),
        (node(spec={"unschedulable": True}), "cordoned"),
        (node(conditions=[{"type": "Ready", "status": "Unknown"}]), "not-ready"),
        (node(conditions=[]), "not-ready"),
        (node({"nvidia.com/gpu-driver-upgrade-state": "drain-required"}), "driver-upgrade"),
        (node({"nvidia.com/gpu-driver-upgrade-state": "upgrade-required"}), ""),
        (node({"nvidia.com/mig.config.state": "pending"}), "mig-config"),
        (node({"nvidia.com/mig.config.state": "success"}), ""),
    ],
)
def test_nodes_to_which_nothing_new_goes(made, why_not):
    assert read_node(made, {}).why_not == why_not


def test_taints_that_keep_pods_out():
    taints = [
        {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},
        {"key": "team", "effect": "NoExecute"},
        {"key": "soft", "effect": "PreferNoSchedule"},
        {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"},
    ]
    assert read_node(node(spec={"taints": taints}), {}).taints == (
        Taint("nvidia.com/gpu", "present", "NoSchedule"),
        Taint("team", "", "NoExecute"),
    )


# Terms ----------------------------------------------------------------------------------------------


def test_a_model_is_required_by_each_label_that_names_it_here():
    nodes = [
        Node("a", labels={"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}),
        Node("b", labels={"nvidia.com/gpu.product": "Tesla-T4", "karpenter.k8s.aws/instance-gpu-name": "t4"}),
    ]
    assert model_terms(("a100", "h100"), label_values(nodes)) == (
        (Requirement("nvidia.com/gpu.product", "In", ("NVIDIA-A100-SXM4-80GB",)),),
        (Requirement("karpenter.k8s.aws/instance-gpu-name", "In", ("a100", "h100")),),
    )


def test_a_model_that_no_label_names_cannot_be_required():
    nodes = [Node("a", labels={"nvidia.com/gpu.product": "Tesla-T4"}), Node("b", labels={"zone": "a"})]
    assert model_terms(("quantum9000",), label_values(nodes)) == ()
    assert model_terms(("t4",), {}) == ()


def test_products_all_of_whose_gpus_can_never_do_are_ruled_out():
    def said(product):
        return {"nvidia.com/gpu.product": product, "cloud.google.com/gke-accelerator": "any"}

    nodes = [Node("t4", labels=said("T4")), Node("l4-a", labels=said("L4")), Node("l4-b", labels=said("L4")), Node("x")]
    verdicts = [
        Verdict("t4", code="gpu-memory"),
        Verdict("l4-a", code="gpu-memory"),
        Verdict("l4-b", code="gpu-busy"),  # of the same product, with more memory
        Verdict("x", code="gpu-model"),
    ]
    assert ruled_out(verdicts, nodes) == (Requirement("nvidia.com/gpu.product", "NotIn", ("T4",)),)
    assert ruled_out([Verdict("t4", code="gpu-busy")], nodes) == ()
