"""Placement over everything it may be shown."""

from dataclasses import replace

from hypothesis import given, strategies as st

from adapter.policy.fragmentation import Mix
from adapter.policy.gpu_models import matches
from adapter.policy.node_terms import NodeTerms, Requirement, Taint, Toleration
from adapter.policy.placement import Need, Node, Offer, explain, place, preferences
from adapter.spec import SPOT_WORDS

GI = 2**30
MODELS = ("NVIDIA-A100-SXM4-80GB", "Tesla-T4", "AMD_Instinct_MI300X_OAM", "")
RESOURCES = ("nvidia.com/gpu", "nvidia.com/gpu", "nvidia.com/gpu.shared", "nvidia.com/mig-1g.5gb", "amd.com/gpu")
CORES = st.integers(0, 4).map(lambda cores: cores * 1000)
MEMORY = st.integers(0, 4).map(lambda gigabytes: gigabytes * GI)
"""Few values, so that things fit exactly and fail to by one."""


@st.composite
def offers(draw):
    resource = draw(st.sampled_from(RESOURCES))
    return Offer(
        resource,
        count := draw(st.integers(1, 8)),
        draw(st.integers(0, count + 1)),
        draw(st.sampled_from(MODELS)),
        draw(st.sampled_from((0, 16, 80))) * GI,
        draw(st.sampled_from((None, (7, 5), (8, 0)))),
        "1g.5gb" if "mig" in resource else "",
        4 if "shared" in resource else 1,
    )


@st.composite
def nodes(draw, name="n"):
    return Node(
        name,
        tuple(draw(st.lists(offers(), max_size=2))),
        draw(CORES),
        draw(MEMORY),
        draw(st.booleans()),
        draw(st.sampled_from(("", "", "", "cordoned", "not-ready"))),
        draw(st.dictionaries(st.sampled_from(("zone", "disk")), st.sampled_from(("a", "b")), max_size=2)),
        draw(st.dictionaries(st.sampled_from(("t/f.ns", "t/g.ns")), st.integers(0, 2**35), max_size=2)),
        draw(st.sampled_from((0.0, 1e8, 1e9))),
        tuple(draw(st.lists(st.builds(Taint, st.sampled_from(("nvidia.com/gpu", "team"))), max_size=1))),
    )


@st.composite
def fleets(draw):
    return [draw(nodes(f"n{number}")) for number in range(draw(st.integers(0, 3)))]


REQUIREMENTS = st.builds(
    Requirement,
    st.sampled_from(("zone", "disk")),
    st.sampled_from(("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Nonsense")),
    st.lists(st.sampled_from(("a", "b", "1")), max_size=2).map(tuple),
)
TERMS = st.builds(
    NodeTerms,
    st.lists(REQUIREMENTS, max_size=1).map(tuple),
    st.lists(st.lists(REQUIREMENTS, max_size=2).map(tuple), max_size=2).map(tuple),
    st.lists(st.builds(Toleration, st.sampled_from(("", "team"))), max_size=1).map(tuple),
)


@st.composite
def needs(draw):
    resource = draw(st.sampled_from(("", "", "nvidia.com/gpu", "amd.com/gpu")))
    return Need(
        "f.ns",
        draw(st.sampled_from((0.0, 0.25, 0.5, 1.0, 1.0, 2.0, 8.0, 64.0))),
        draw(st.sampled_from(((), (), ("a100",), ("t4", "mi300x"), ("none",)))),
        draw(st.sampled_from((0, 0, 10, 16, 96))) * GI,
        draw(st.sampled_from((None, (8, 0)))),
        draw(st.sampled_from(("", "", "1g.5gb"))),
        draw(st.sampled_from(SPOT_WORDS)),
        draw(CORES),
        draw(MEMORY),
        draw(st.sampled_from(("", "t/f.ns"))),
        resource,
        draw(st.integers(1, 4)) if resource else 0,
        draw(TERMS) if draw(st.integers(0, 3)) == 3 else NodeTerms(),
        draw(st.sampled_from((0.1, 20.0))),
    )


MIXES = st.lists(needs(), max_size=3).map(Mix.of)


@given(needs(), fleets(), MIXES)
def test_where_it_fits_there_is_enough_of_everything(need, fleet, mix):
    by_name = {node.name: node for node in fleet}
    for verdict in place(need, fleet, mix):
        node = by_name[verdict.node]
        if not verdict.fits:
            assert verdict.reason
            continue
        assert need.cpu_milli <= node.free_cpu_milli
        assert need.host_memory_bytes <= node.free_memory_bytes
        assert not node.why_not
        assert not (need.spot == "require" and not node.is_spot)
        assert not (need.spot == "never" and node.is_spot)
        assert not need.terms.missing(node.labels)
        if need.gpus:
            able = [
                o for o in node.offers if o.resource == verdict.resource and o.allocatable - o.used >= verdict.units
            ]
            assert verdict.units >= 1
            assert any(not need.models or any(matches(m, o.model, o.memory_bytes) for m in need.models) for o in able)
            assert not need.resource or (verdict.resource, verdict.units) == (need.resource, need.units)


@given(needs(), fleets(), MIXES)
def test_each_node_has_one_verdict_and_the_best_come_first(need, fleet, mix):
    verdicts = place(need, fleet, mix)
    assert sorted(verdict.node for verdict in verdicts) == sorted(node.name for node in fleet)
    fitting = [verdict for verdict in verdicts if verdict.fits]
    assert verdicts[: len(fitting)] == fitting
    assert fitting == sorted(fitting, key=lambda verdict: (verdict.cost_gpu_s, verdict.node))
    assert [v.score for v in fitting] == sorted((v.score for v in fitting), reverse=True)
    assert all(0 <= verdict.score <= 100 for verdict in verdicts)
    assert not fitting or fitting[0].score == 100


@given(needs(), fleets(), st.lists(needs(), max_size=3), st.randoms())
def test_no_order_of_what_it_is_given_matters(need, fleet, usual, random):
    shuffled = random.sample(fleet, len(fleet))
    assert place(need, shuffled, Mix.of(usual)) == place(need, fleet, Mix.of(usual))


@given(needs(), nodes(), CORES, MEMORY, st.integers(0, 3))
def test_more_free_room_never_makes_a_node_unfit(need, node, cpu_milli, memory_bytes, units):
    roomier = replace(
        node,
        offers=tuple(replace(offer, used=max(0, offer.used - units)) for offer in node.offers),
        free_cpu_milli=node.free_cpu_milli + cpu_milli,
        free_memory_bytes=node.free_memory_bytes + memory_bytes,
    )
    if place(need, [node])[0].fits:
        assert place(need, [roomier])[0].fits


@given(needs(), fleets(), nodes("other"))
def test_another_node_changes_no_nodes_fit(need, fleet, other):
    alone = {verdict.node: verdict.code for verdict in place(need, fleet)}
    together = {verdict.node: verdict.code for verdict in place(need, [*fleet, other])}
    assert {name: together[name] for name in alone} == alone


@given(needs(), fleets(), st.lists(needs(), min_size=1, max_size=3))
def test_no_more_gpus_can_become_useless_than_are_free(need, fleet, usual):
    mix = Mix.of(usual)
    for node in fleet:
        for offer in node.offers:
            for free in range(offer.free + 1):
                assert 0 <= mix.unusable(offer, free, node.free_cpu_milli) <= free


@given(needs(), fleets())
def test_terms_name_fitting_nodes_once_with_falling_weights(need, fleet):
    verdicts = place(need, fleet)
    terms = preferences(verdicts)
    named = [name for term in terms for name in term.nodes]
    assert len(named) == len(set(named))
    assert set(named) <= {verdict.node for verdict in verdicts if verdict.fits}
    weights = [term.weight for term in terms]
    assert weights == sorted(set(weights), reverse=True)
    assert all(1 <= weight <= 100 for weight in weights)
    assert bool(terms) == any(verdict.fits for verdict in verdicts)


@given(needs(), fleets())
def test_every_answer_can_be_said_in_one_line(need, fleet):
    said = explain(place(need, fleet))
    assert said.endswith(".")
    assert "\n" not in said


# Names of models ------------------------------------------------------------------------------------

NAMES = st.lists(
    st.sampled_from(("a100", "h100", "t4", "sxm4", "80gb", "40gb", "pcie")), min_size=1, max_size=4, unique=True
)


@given(NAMES, st.randoms(), st.sampled_from("- _"), st.booleans(), st.booleans())
def test_a_name_means_itself_however_it_is_written(words, random, separator, is_upper, has_maker):
    written = separator.join(random.sample(words, len(words)))
    wanted = f"NVIDIA{separator}{written}" if has_maker else written
    assert matches(wanted.upper() if is_upper else wanted, "-".join(words))


@given(NAMES, NAMES, NAMES, st.sampled_from((0, 40, 80)))
def test_saying_more_never_means_more(wanted, more, model, gigabytes):
    if matches(" ".join([*wanted, *more]), " ".join(model), gigabytes * GI):
        assert matches(" ".join(wanted), " ".join(model), gigabytes * GI)
