import pytest

from adapter.cluster.intent import policy_of, read_intent, split_constraints
from adapter.errors import ConfigError
from adapter.policy.node_terms import Requirement, Toleration

KNATIVE = {"serving.knative.dev/revision": "embed-00002", "serving.knative.dev/service": "embed"}
GI = 2**30


def container(name="user-container", limits=None, requests=None):
    return {"name": name, "image": "embed", "resources": {"limits": limits or {}, "requests": requests or {}}}


def pod(annotations=None, *containers, labels=KNATIVE, **spec):
    ours = {f"gpufn.dev/{key}": text for key, text in (annotations or {}).items()}
    return {
        "metadata": {"labels": labels, "annotations": ours},
        "spec": {"containers": list(containers) or [container()], **spec},
    }


def read(annotations=None, *containers, labels=KNATIVE, namespace="team-a", namespace_labels=None, **spec):
    return read_intent(
        pod(annotations, *containers, labels=labels, **spec),
        namespace=namespace,
        namespace_labels=namespace_labels or {},
    )


@pytest.mark.parametrize(
    ("labels", "function", "framework", "revision"),
    [
        (KNATIVE, "embed", "knative", "embed-00002"),
        ({"faas_function": "embed", "pod-template-hash": "5d4"}, "embed", "openfaas", "5d4"),
        ({"gpufn.dev/function": "embed"}, "embed", "plain", ""),
    ],
)
def test_functions_of_each_framework_are_known_by_their_labels(labels, function, framework, revision):
    intent = read({"gpu": "1"}, labels=labels)
    assert (intent.function, intent.framework, intent.revision) == (function, framework, revision)
    assert (intent.key, intent.need.function) == ("embed.team-a", "embed.team-a")


def test_a_template_without_its_labels_is_named_by_who_reads_it():
    intent = read_intent(
        pod({"gpu": "1"}, labels={}), namespace="n", namespace_labels={}, function="embed", framework="knative"
    )
    assert (intent.function, intent.framework) == ("embed", "knative")


@pytest.mark.parametrize(
    "foreign",
    [
        pod({"gpu": "1"}, labels={"app": "web"}),  # no function of a framework
        pod({}),  # a function that asks for nothing of ours
        pod({"patched": "abc", "placement": "{}"}),  # what we wrote ourselves asks for nothing
        pod({"gpu": "1"}, labels=None),
        {},
        {"metadata": {"labels": KNATIVE, "annotations": {"gpufn.dev/gpu": "1"}}, "spec": {"containers": []}},
    ],
)
def test_what_is_no_function_of_ours_is_left_alone(foreign):
    assert read_intent(foreign, namespace="n", namespace_labels={}) is None


@pytest.mark.parametrize(
    ("limits", "gpus", "resource", "profile"),
    [
        ({"nvidia.com/gpu": "2"}, 2, "nvidia.com/gpu", ""),
        ({"nvidia.com/gpu.shared": 1}, 1, "nvidia.com/gpu.shared", ""),
        ({"nvidia.com/mig-1g.5gb": "1"}, 1, "nvidia.com/mig-1g.5gb", "1g.5gb"),
        ({"nvidia.com/mig-1g.10gb.me": "1"}, 1, "nvidia.com/mig-1g.10gb.me", "1g.10gb.me"),
        ({"amd.com/gpu": "1"}, 1, "amd.com/gpu", ""),
        ({"gpu.intel.com/xe": "1"}, 1, "gpu.intel.com/xe", ""),
    ],
)
def test_a_plain_limit_is_enough(limits, gpus, resource, profile):
    intent = read({}, container(limits=limits))
    assert (intent.spec.gpus, intent.spec.mig_profile) == (gpus, profile)
    assert (intent.need.gpus, intent.need.resource, intent.need.units) == (gpus, resource, gpus)
    assert intent.notes == ()


def test_a_request_without_a_limit_counts_too():
    assert read({}, container(requests={"nvidia.com/gpu": "1"})).need.units == 1


def test_a_share_of_a_shared_gpu_is_what_the_annotation_says():
    intent = read({"gpu": "0.25"}, container(limits={"nvidia.com/gpu.shared": "1"}))
    assert (intent.spec.gpus, intent.need.resource, intent.need.units) == (0.25, "nvidia.com/gpu.shared", 1)


def test_a_limit_wins_over_the_annotation_and_says_so():
    intent = read({"gpu": "2", "models": "a100"}, container(limits={"nvidia.com/gpu": "1"}))
    assert (intent.spec.gpus, intent.need.models) == (1, ("a100",))
    assert len(intent.notes) == 1
    assert intent.notes[0].startswith("gpufn.dev/gpu = 2 has no effect")


def test_a_limit_that_says_the_same_needs_no_note():
    assert read({"gpu": "1.0"}, container(limits={"nvidia.com/gpu": "1"})).notes == ()


def test_slices_that_a_cluster_sells_as_gpus_are_asked_for_by_both():
    intent = read({"mig": "1g.5gb"}, container(limits={"nvidia.com/gpu": "1"}))
    assert (intent.need.resource, intent.need.mig_profile) == ("nvidia.com/gpu", "1g.5gb")


def test_more_gpus_than_a_replica_can_have_are_refused_by_the_limits_name():
    with pytest.raises(ConfigError, match=r"nvidia\.com/gpu = 65"):
        read({}, container(limits={"nvidia.com/gpu": "65"}))


def test_what_annotations_asked_for_is_told_apart_from_defaults():
    intent = read({"models": "t4", "idle": "auto"}, container(limits={"nvidia.com/gpu": "1"}))
    assert intent.asked == {"gpu_models", "idle_s", "gpus"}


def test_labels_of_openfaas_count_on_pods_too():
    labels = {"faas_function": "f", "com.openfaas.scale.zero-duration": "20m", "com.openfaas.scale.max": "3"}
    intent = read({"gpu": "1", "max": "2"}, labels=labels)
    assert (intent.spec.idle_s, intent.spec.max_replicas) == (1200, 2)


@pytest.mark.parametrize(
    ("annotations", "code", "says"),
    [
        ({"modles": "a100"}, "unknown-key", "gpufn.dev/models"),
        ({"gpu": "-1"}, "bad-value", "Write a whole number"),
        ({"mig": "1g.5gb", "gpu": "0.5"}, "contradiction", "contradict"),
        ({"idle-max": "-5m"}, "bad-value", "gpufn.dev/idle-max"),
        ({"weights-source": "./x"}, "built-in", "build the image anew"),
    ],
)
def test_annotations_that_cannot_be_are_refused(annotations, code, says):
    with pytest.raises(ConfigError) as caught:
        read(annotations)
    assert caught.value.code == code
    assert says in caught.value.to_text()


def test_what_only_we_write_is_no_unknown_key():
    assert read({"gpu": "1", "patched": "x", "placement": "y", "admitted-at": "1", "status": "z"}).spec.gpus == 1


# Tenants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labels", "tenant"), [({}, "team-a"), ({"gpufn.dev/tenant": "acme"}, "acme")])
def test_the_namespace_says_whose_a_function_is(labels, tenant):
    intent = read({"gpu": "1"}, namespace_labels={**labels, "gpufn.dev/snapshots": "enabled"})
    assert (intent.tenant, intent.spec.tenant) == (tenant, tenant)
    assert intent.need.snapshot == f"{tenant}/embed.team-a"


def test_an_annotation_cannot_ask_for_anothers():
    with pytest.raises(ConfigError) as caught:
        read({"gpu": "1", "tenant": "acme"})
    assert caught.value.code == "tenant"
    assert read({"gpu": "1", "tenant": "team-a"}).tenant == "team-a"


@pytest.mark.parametrize(
    ("labels", "annotations", "keeps"),
    [
        ({}, {}, False),
        ({"gpufn.dev/snapshots": "enabled"}, {}, True),
        ({"gpufn.dev/snapshots": "yes"}, {}, False),
        ({"gpufn.dev/snapshots": "enabled"}, {"snapshot": "off"}, False),
    ],
)
def test_snapshots_need_the_namespace_to_allow_them(labels, annotations, keeps):
    intent = read({"idle": "1m", **annotations}, namespace_labels=labels)
    assert (intent.snapshots, bool(intent.need.snapshot)) == (keeps, keeps)


KEEPS = {"gpufn.dev/snapshots": "enabled"}


@pytest.mark.parametrize(
    ("annotations", "limits"),
    [
        ({"gpu": "1"}, {}),
        ({"gpu": "2"}, {}),
        ({"idle": "1m"}, {"nvidia.com/gpu": "1"}),
        ({"gpu": "1", "models": "a100"}, {"cpu": "1"}),
    ],
)
def test_of_what_holds_whole_gpus_one_is_taken(annotations, limits):
    intent = read(annotations, container(limits=limits), namespace_labels=KEEPS)
    assert (intent.snapshots, intent.notes) == (True, ())


def test_of_two_kinds_of_gpus_one_counts_and_both_must_be_such_as_can_be_checkpointed():
    limits = {"nvidia.com/mig-1g.10gb": "1", "nvidia.com/gpu": "1", "nvidia.com/gpu.shared": "0"}
    intent = read({}, container(limits=limits), namespace_labels=KEEPS)
    assert (intent.need.resource, intent.snapshots) == ("nvidia.com/gpu", False)
    alone, snapshots = intent.notes
    assert alone == "nvidia.com/mig-1g.10gb is not looked at where a node is chosen: nvidia.com/gpu alone is"
    assert "MIG slice" in snapshots


@pytest.mark.parametrize(
    ("annotations", "limits", "more", "says"),
    [
        ({"mig": "1g.10gb"}, {}, {}, "MIG slice"),
        ({}, {"nvidia.com/mig-1g.10gb": "1"}, {}, "MIG slice"),
        ({"gpu": "0.5"}, {}, {}, "MPS"),
        ({"gpu": "0.5"}, {"nvidia.com/gpu": "2"}, {}, "MPS"),  # as the webhook writes that share
        ({}, {"nvidia.com/gpu.shared": "1"}, {}, "MPS"),
        ({}, {"amd.com/gpu": "1"}, {}, "amd.com/gpu"),
        ({"gpu": "1"}, {}, {"schedulerName": "volcano"}, "another scheduler"),
    ],
)
def test_of_what_no_driver_can_checkpoint_none_is_taken_and_it_is_said_why(annotations, limits, more, says):
    asked = container(limits=limits)
    intent = read(annotations, asked, namespace_labels=KEEPS, **more)
    assert intent.need.snapshot
    assert not intent.snapshots
    assert intent.notes[-1].startswith("process snapshots are not used: ")
    assert says in intent.notes[-1]
    assert says not in "".join(read(annotations, asked, **more).notes)  # where nobody would take any


@pytest.mark.parametrize(
    ("annotations", "limits"),
    [({"gpu-fraction": "0.5"}, {}), ({"gpu-memory": "4000"}, {}), ({}, {"volcano.sh/vgpu-number": "1"})],
)
def test_a_part_of_a_gpu_that_others_give_is_one_though_no_limit_counts_gpus(annotations, limits):
    made = pod({"idle": "1m"}, container(limits=limits))
    made["metadata"]["annotations"] |= annotations
    intent = read_intent(made, namespace="n", namespace_labels=KEEPS)
    assert not intent.snapshots
    assert "another scheduler" in intent.notes[-1]


def test_a_function_without_gpus_that_others_place_keeps_snapshots():
    assert read({"idle": "1m"}, namespace_labels=KEEPS, schedulerName="volcano").snapshots


def test_what_a_resource_claim_gives_no_pod_for_a_snapshot_has():
    claims = {"name": "user-container", "image": "embed", "resources": {"claims": [{"name": "gpu"}]}}
    assert not read({"idle": "1m"}, claims, namespace_labels=KEEPS).snapshots


# Containers -----------------------------------------------------------------------------------------

GPU = {"nvidia.com/gpu": "1"}


@pytest.mark.parametrize(
    ("containers", "annotations", "index"),
    [
        ([container("queue-proxy"), container("user-container", GPU)], {}, 1),
        ([container("istio-proxy"), container("main"), container("metrics", GPU)], {}, 2),
        ([container("main"), container("other")], {"kubectl.kubernetes.io/default-container": "other"}, 1),
        ([container("main"), container("queue-proxy")], {"kubectl.kubernetes.io/default-container": "queue-proxy"}, 0),
        ([container("first"), container("second")], {}, 0),
    ],
)
def test_which_container_is_the_users(containers, annotations, index):
    made = pod({"max": "2"}, *containers)
    made["metadata"]["annotations"] |= annotations
    assert read_intent(made, namespace="n", namespace_labels={}).container == index


def test_it_needs_what_all_its_containers_take():
    intent = read(
        {},
        container(limits={"nvidia.com/gpu": "1", "cpu": "2", "memory": "4Gi"}, requests={"cpu": "1500m"}),
        container("queue-proxy", requests={"cpu": "25m", "memory": "64Mi"}),
    )
    assert (intent.need.cpu_milli, intent.need.host_memory_bytes) == (1525, 4 * GI + 64 * 2**20)


# Others who decide ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotations", "spec", "limits"),
    [
        ({}, {"schedulerName": "volcano"}, {}),
        ({"gpu-fraction": "0.5"}, {}, {}),
        ({"hami.io/gpu-scheduler-policy": "binpack"}, {}, {}),
        ({}, {}, {"nvidia.com/gpumem": "4000"}),
    ],
)
def test_pods_of_other_schedulers_get_hints_only(annotations, spec, limits):
    made = pod({"models": "a100"}, container(limits={**GPU, **limits}), **spec)
    made["metadata"]["annotations"] |= annotations
    assert read_intent(made, namespace="n", namespace_labels={}).hints_only


def test_the_default_scheduler_is_nobody_else():
    assert not read({"gpu": "1"}, schedulerName="default-scheduler").hints_only


def test_what_the_pod_asks_of_nodes_itself_is_part_of_the_need():
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}]
            }
        }
    }
    tolerations = [{"key": "team", "operator": "Equal", "value": "ml"}, {"operator": "Exists"}]
    terms = read({"gpu": "1"}, nodeSelector={"disk": "ssd"}, affinity=affinity, tolerations=tolerations).need.terms
    assert terms.all_of == (Requirement("disk", "In", ("ssd",)),)
    assert terms.any_of == ((Requirement("zone", "In", ("a", "b")),),)
    assert terms.tolerations == (Toleration("team", "ml"), Toleration())


@pytest.mark.parametrize(
    ("spot", "capacity", "refused"),
    [("require", "on-demand", True), ("never", "spot", True), ("require", "spot", False), ("any", "spot", False)],
)
def test_spot_and_a_selector_that_contradicts_it_are_refused(spot, capacity, refused):
    ask = {"gpu": "1", "spot": spot}
    if refused:
        with pytest.raises(ConfigError, match="contradict"):
            read(ask, nodeSelector={"karpenter.sh/capacity-type": capacity})
    else:
        read(ask, nodeSelector={"karpenter.sh/capacity-type": capacity})


def test_what_does_nothing_is_said():
    notes = read({"models": "a100"}, labels={**KNATIVE, "gpufn.dev/memory": "4Gi"}).notes
    assert [note.partition(" has no effect")[0] for note in notes] == ["gpufn.dev/models", "Label gpufn.dev/memory"]


# OpenFaaS's constraints -----------------------------------------------------------------------------


def test_constraints_are_node_selectors_except_where_they_name_a_key_of_ours():
    ours, selector = split_constraints(["gpufn.dev/models=a100", "zone == a", "disk=ssd", "nonsense", "=x"])
    assert ours == {"gpufn.dev/models": "a100"}
    assert selector == {"zone": "a", "disk": "ssd"}


def test_an_annotation_wins_over_a_constraint_and_both_over_a_label():
    policy, notes = policy_of(
        labels={"com.openfaas.scale.max": "9", "com.openfaas.scale.zero": "false"},
        annotations={"gpufn.dev/models": "h100", "other": "x"},
        limits={},
        constraints=["gpufn.dev/models=a100", "gpufn.dev/max=3"],
    )
    assert policy == {"gpufn.dev/models": "h100", "gpufn.dev/max": "3", "gpufn.dev/idle": "0"}
    assert notes == []
