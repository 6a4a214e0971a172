"""What is read from a cluster's objects, over everything they may hold."""

import contextlib

from hypothesis import given, strategies as st

from adapter.cluster.intent import policy_of, read_intent, trimmed
from adapter.cluster.inventory import label_values, model_terms, read_node
from adapter.errors import ConfigError
from adapter.keys import DOMAIN
from adapter.policy.placement import Need, Node, Offer, place
from adapter.spec import FIELDS

GI = 2**30
# What users write -----------------------------------------------------------------------------------

TEXT = st.text(max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ANNOTATIONS = st.dictionaries(
    st.sampled_from([f"{DOMAIN}/{item.annotation}" for item in FIELDS])
    | TEXT.map(lambda key: f"{DOMAIN}/{key}")
    | st.sampled_from(("gpu-fraction", "kubectl.kubernetes.io/default-container")),
    TEXT
    | st.sampled_from(("1", "0.5", "auto", "1g.5gb", ">= 8.0", "a100,t4", "require", "never", "16Gi", "-1", "nan")),
    max_size=5,
)
LIMITS = st.dictionaries(
    st.sampled_from(
        ("nvidia.com/gpu", "nvidia.com/mig-1g.5gb", "nvidia.com/gpu.shared", "cpu", "memory", "nvidia.com/mig-x")
    ),
    TEXT | st.sampled_from(("1", "2", "1k", "0", "500m", "4Gi")) | st.integers(0, 99),
    max_size=3,
)
LABELS = {"serving.knative.dev/revision": "f-1", "serving.knative.dev/service": "f"}


def read(pod, **labels):
    return read_intent(pod, namespace="team", namespace_labels={"gpufn.dev/snapshots": "enabled", **labels})


@given(ANNOTATIONS, LIMITS)
def test_any_annotations_and_limits_are_an_intent_or_a_configuration_error(annotations, limits):
    pod = {
        "metadata": {"labels": LABELS, "annotations": annotations},
        "spec": {"containers": [{"name": "user-container", "resources": {"limits": limits}}]},
    }
    with contextlib.suppress(ConfigError):
        intent = read(pod)
        assert intent is None or intent == read(pod)
        if intent is not None:
            assert intent.tenant == "team"
            place(intent.need, [Node("n", (Offer("nvidia.com/gpu", 8),), 64_000, 64 * GI)])


def _parts(inner):
    return st.fixed_dictionaries(
        {},
        optional={
            "metadata": st.fixed_dictionaries({"labels": st.just(LABELS)}, optional={"annotations": ANNOTATIONS | inner}) | inner,
            "spec": st.fixed_dictionaries(
                {"containers": st.lists(st.fixed_dictionaries({}, optional={"name": inner, "resources": inner}), max_size=2) | inner},
                optional={
                    "affinity": inner, "nodeSelector": inner, "tolerations": inner | st.lists(inner, max_size=2),
                    "initContainers": inner, "schedulerName": inner, "overhead": inner, "resources": inner,
                },
            ) | inner,
        },
    )  # fmt: skip


@given(_parts(JSON))
def test_a_trimmed_pod_is_read_as_the_whole_one(pod):
    def outcome(value):
        try:
            return read(value)
        except ConfigError as exc:
            return exc.to_json()

    assert outcome(trimmed(pod)) == outcome(pod)
    assert trimmed(trimmed(pod)) == trimmed(pod)


@given(_parts(JSON))
def test_any_json_in_place_of_a_pod_is_an_intent_or_a_configuration_error(pod):
    with contextlib.suppress(ConfigError):
        read(pod)


@given(
    st.dictionaries(st.sampled_from(("com.openfaas.scale.min", "com.openfaas.scale.zero")), TEXT, max_size=2),
    ANNOTATIONS,
    LIMITS.map(lambda limits: {name: str(value) for name, value in limits.items()}),
    st.lists(TEXT, max_size=3),
)
def test_whatever_wins_is_said_once(labels, annotations, limits, constraints):
    with contextlib.suppress(ConfigError):
        policy, notes = policy_of(labels=labels, annotations=annotations, limits=limits, constraints=constraints)
        assert len(notes) <= 2
        assert policy_of(labels=labels, annotations=policy, limits=limits, constraints=constraints) == (policy, [])


# What a cluster says --------------------------------------------------------------------------------

NODES = st.fixed_dictionaries(
    {},
    optional={
        "metadata": st.fixed_dictionaries({}, optional={"name": JSON, "labels": JSON | st.dictionaries(TEXT, TEXT)}) | JSON,
        "spec": st.fixed_dictionaries({}, optional={"unschedulable": JSON, "taints": JSON}) | JSON,
        "status": st.fixed_dictionaries(
            {},
            optional={
                "conditions": JSON,
                "allocatable": JSON | st.dictionaries(st.sampled_from(("nvidia.com/gpu", "cpu", "amd.com/gpu")), TEXT | st.integers(0, 9)),
            },
        ) | JSON,
    },
)  # fmt: skip
GPU_NODES = st.none() | st.fixed_dictionaries(
    {},
    optional={"status": JSON | st.fixed_dictionaries({}, optional={"gpus": JSON, "snapshots": JSON, "restore": JSON})},
)


@given(NODES, GPU_NODES)
def test_any_json_in_place_of_a_node_is_a_node(node, gpu_node):
    made = read_node(node, {}, gpu_node)
    place(Need("f.ns", 1.0), [made])
    model_terms(("a100",), label_values([made]))
