"""The pod patch over pods of any shape: applied twice it is as once, and nothing of the user's is lost or changed."""

import copy
from dataclasses import replace

import jsonpatch
from hypothesis import given, strategies as st

from adapter.cluster.intent import read_intent
from adapter.controller.pod_patch import Facts, patch_pod
from adapter.keys import PATCHED_ANNOTATION
from adapter.policy.node_terms import Requirement
from adapter.policy.placement import Verdict

WORDS = st.sampled_from(("a", "b", "c"))
RESOURCES = ("nvidia.com/gpu", "nvidia.com/mig-1g.5gb", "nvidia.com/gpu.shared", "amd.com/gpu")
EXPRESSIONS = st.builds(
    lambda key, values: {"key": key, "operator": "In", "values": values}, WORDS, st.lists(WORDS, min_size=1, max_size=2)
)
NODE_TERMS = st.sampled_from(({}, {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]})) | (
    st.builds(lambda found: {"matchExpressions": found}, st.lists(EXPRESSIONS, min_size=1, max_size=2))
)
ANNOTATIONS = {
    "gpufn.dev/gpu": ("1", "2", "0.5"),
    "gpufn.dev/in-flight": ("1", "20"),
    "gpufn.dev/exec-timeout": ("0", "90s"),
    "gpufn.dev/snapshot": ("on", "auto"),
    "gpufn.dev/mig": ("1g.10gb",),
    "example.com/tilde~and/slash": ("1",),
    "gpu-fraction": ("0.5",),
}


def maybe(strategy):
    """There, empty as the API server may send it, or not at all."""
    return st.none() | strategy


def without_nothing(value):
    return {name: item for name, item in value.items() if item is not None}


def objects(**members):
    return st.fixed_dictionaries(members).map(without_nothing)


def annotations():
    chosen = st.lists(st.sampled_from(sorted(ANNOTATIONS)), unique=True, max_size=3)
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({name: st.sampled_from(ANNOTATIONS[name]) for name in names})
    )


AFFINITY = objects(
    podAntiAffinity=maybe(st.just({})),
    nodeAffinity=maybe(
        objects(
            requiredDuringSchedulingIgnoredDuringExecution=maybe(
                st.fixed_dictionaries({"nodeSelectorTerms": st.lists(NODE_TERMS, min_size=1, max_size=3)})
            ),
            preferredDuringSchedulingIgnoredDuringExecution=maybe(
                st.lists(
                    st.builds(lambda term: {"weight": 5, "preference": {"matchExpressions": [term]}}, EXPRESSIONS),
                    max_size=2,
                )
            ),
        )
    ),
)
RIGHTS = objects(
    runAsUser=maybe(st.sampled_from((0, 1000))),
    allowPrivilegeEscalation=maybe(st.booleans()),
    capabilities=maybe(objects(add=maybe(st.just(["NET_ADMIN"])), drop=maybe(st.just(["ALL"])))),
    seccompProfile=maybe(st.just({"type": "RuntimeDefault"})),
)
CONTAINERS = objects(
    name=st.just("user-container"),
    image=st.just("registry.example/f"),
    env=maybe(
        st.lists(
            st.sampled_from(("GPUFN_TENANT", "GPUFN_CRIU", "max_inflight", "exec_timeout", "K_SERVICE", "MINE")),
            unique=True,
        ).map(lambda names: [{"name": name, "value": "7"} for name in names])
    ),
    ports=maybe(st.just([{"containerPort": 9000}])),
    readinessProbe=maybe(st.just({"tcpSocket": {"port": 1}})),
    resources=maybe(
        objects(
            limits=maybe(st.dictionaries(st.sampled_from(("cpu", "nvidia.com/gpu")), st.just("2"))),
            requests=maybe(st.just({"cpu": "1"})),
        )
    ),
    securityContext=maybe(RIGHTS),
    volumeMounts=maybe(st.lists(st.just({"name": "mine", "mountPath": "/mine"}), max_size=1)),
)
SIDECAR = {
    "name": "queue-proxy",
    "image": "q",
    "env": [{"name": "CONTAINER_CONCURRENCY", "value": "3"}],
    "resources": {},
}


@st.composite
def pods(draw):
    containers = [draw(CONTAINERS), copy.deepcopy(SIDECAR)]
    if draw(st.booleans()):
        containers.reverse()
    spec = draw(
        objects(
            affinity=maybe(AFFINITY),
            tolerations=maybe(st.lists(st.sampled_from(({"operator": "Exists"}, {"key": "a"})), max_size=1)),
            volumes=maybe(
                st.sampled_from(([], [{"name": "mine", "emptyDir": {}}], [{"name": "gpufn-criu", "emptyDir": {}}]))
            ),
            runtimeClassName=maybe(st.just("kata")),
            schedulerName=maybe(st.sampled_from(("default-scheduler", "volcano"))),
            securityContext=maybe(RIGHTS),
        )
    )
    metadata = draw(objects(annotations=maybe(annotations()), labels=maybe(st.just({"faas_function": "f"}))))
    return {"metadata": metadata, "spec": {**spec, "containers": containers}}


def intent_of(pod, framework, snapshots):
    """As the webhook reads it, each time anew; a share and a MIG profile, which contradict each other, never meet."""
    pod = copy.deepcopy(pod)
    said = pod["metadata"].setdefault("annotations", {})
    if "gpufn.dev/mig" in said:
        said.pop("gpufn.dev/gpu", None)
    said.setdefault("gpufn.dev/park", "0")  # something of ours
    opts_in = {"gpufn.dev/snapshots": "enabled"} if snapshots else {}
    intent = read_intent(pod, namespace="ns", namespace_labels=opts_in, function="f", framework=framework)
    assert intent is not None
    return intent


FRAMEWORKS = st.sampled_from(("knative", "openfaas", "plain"))
VERDICTS = st.lists(
    st.builds(
        lambda n, fits, resource, score: Verdict(f"n{n}", "" if fits else "busy", "", resource, 1, 0.1, score, 100 - score),
        st.integers(0, 30), st.booleans(), st.sampled_from(RESOURCES), st.floats(0, 100),
    ),
    max_size=30,
)  # fmt: skip
TERMS = st.lists(
    st.builds(lambda k: Requirement(k, "In", ("x",)), st.sampled_from(("gke", "eks"))), min_size=1, max_size=2
)
FACTS = st.builds(
    lambda hard, classes, restores: Facts(5, tuple(tuple(term) for term in hard), frozenset(classes), {}, restores),
    st.lists(TERMS, max_size=2), st.sets(st.just("nvidia")), st.booleans(),
)  # fmt: skip


def apply(pod, answer):
    return jsonpatch.apply_patch(pod, list(answer.operations))


@given(pods(), FRAMEWORKS, st.booleans(), VERDICTS, FACTS)
def test_a_pod_is_patched_once_and_never_again(pod, framework, snapshots, verdicts, facts):
    once = apply(pod, patch_pod(pod, intent_of(pod, framework, snapshots), verdicts, facts))
    again = patch_pod(once, intent_of(once, framework, snapshots), [], replace(facts, now_ns=9))
    assert again.operations == ()


@given(pods(), FRAMEWORKS, st.booleans(), VERDICTS, FACTS)
def test_the_pod_that_was_given_is_not_changed(pod, framework, snapshots, verdicts, facts):
    before = copy.deepcopy(pod)
    patch_pod(pod, intent_of(pod, framework, snapshots), verdicts, facts)
    assert pod == before


def assert_kept(before, after, where=""):
    """All of `before` is in `after`; arrays have only become longer."""
    if isinstance(before, dict):
        for name, value in before.items():
            assert isinstance(after, dict), where
            assert name in after, f"{where}/{name}"
            assert_kept(value, after[name], f"{where}/{name}")
    elif isinstance(before, list):
        assert len(after) >= len(before), where
        for at, value in enumerate(before):
            assert_kept(value, after[at], f"{where}/{at}")
    else:
        assert after == before, where


@given(pods(), FRAMEWORKS, st.booleans(), VERDICTS, FACTS)
def test_nothing_that_a_user_wrote_is_lost_or_changed(pod, framework, snapshots, verdicts, facts):
    after = apply(pod, patch_pod(pod, intent_of(pod, framework, snapshots), verdicts, facts))
    assert_kept(pod, after)


@given(pods(), FRAMEWORKS, st.booleans(), VERDICTS, FACTS)
def test_containers_of_others_are_not_touched(pod, framework, snapshots, verdicts, facts):
    after = apply(pod, patch_pod(pod, intent_of(pod, framework, snapshots), verdicts, facts))
    assert SIDECAR in after["spec"]["containers"]
    assert len(after["spec"]["containers"]) == 2


@given(pods(), FRAMEWORKS, st.booleans(), VERDICTS, FACTS)
def test_names_stay_unique_where_kubernetes_wants_them_so(pod, framework, snapshots, verdicts, facts):
    intent = intent_of(pod, framework, snapshots)
    after = apply(pod, patch_pod(pod, intent, verdicts, facts))
    container = after["spec"]["containers"][intent.container]
    for array, key in (
        (container.get("env"), "name"),
        (container.get("volumeMounts"), "mountPath"),
        (after["spec"].get("volumes"), "name"),
    ):
        names = [item[key] for item in array or ()]
        assert len(names) == len(set(names))


@given(pods(), FRAMEWORKS, st.booleans(), VERDICTS, FACTS)
def test_without_its_marker_a_second_pass_adds_terms_for_nodes_and_nothing_else(
    pod, framework, snapshots, verdicts, facts
):
    once = apply(pod, patch_pod(pod, intent_of(pod, framework, snapshots), verdicts, facts))
    del once["metadata"]["annotations"][PATCHED_ANNOTATION]
    again = patch_pod(once, intent_of(once, framework, snapshots), verdicts, facts)
    changed = {operation["path"] for operation in again.operations}
    assert all(p.startswith(("/spec/affinity/", "/metadata/annotations/gpufn.dev~1")) for p in changed), changed


@given(pods(), FRAMEWORKS, VERDICTS, FACTS)
def test_soft_terms_are_within_what_kubernetes_takes(pod, framework, verdicts, facts):
    after = apply(pod, patch_pod(pod, intent_of(pod, framework, snapshots=False), verdicts, facts))
    affinity = (after["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    terms = affinity.get("preferredDuringSchedulingIgnoredDuringExecution") or []
    assert all(1 <= term["weight"] <= 100 for term in terms)
    assert len(terms) <= 20
