from dataclasses import replace

import pytest

from adapter.policy.fragmentation import Mix
from adapter.policy.node_terms import NodeTerms, Requirement, Taint, Toleration
from adapter.policy.placement import (
    USUAL,
    Need,
    Node,
    Offer,
    Recent,
    default_resource,
    explain,
    may_fit_later,
    place,
    preferences,
    tolerations,
)

GI = 2**30
A100, T4 = "NVIDIA-A100-SXM4-80GB", "Tesla-T4"


def gpus(count=4, used=0, *, model=A100, memory=80, compute=(8, 0), resource="nvidia.com/gpu", **more):
    return Offer(resource, count, used, model, memory * GI, compute, **more)


def node(name="n", *offers, cpu=64_000, memory=256, **more):
    return Node(name, offers, cpu, memory * GI, **more)


def need(count=1.0, **more):
    return Need("f.ns", count, **more)


def first(asked, *nodes, **more):
    return place(asked, nodes, **more)[0]


def order(asked, *nodes, **more):
    return [verdict.node for verdict in place(asked, nodes, **more) if verdict.fits]


# Hard fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "there", "code"),
    [
        (need(), node(), "no-gpu"),
        (need(), node("n", gpus(4, 4)), "gpu-busy"),
        (need(2), node("n", gpus(4, 3)), "gpu-busy"),
        (need(8), node("n", gpus(4)), "gpu-count"),
        (need(models=("h100", "t4")), node("n", gpus()), "gpu-model"),
        (need(models=("a100",)), node("n", gpus(model="")), "gpu-model"),
        (need(memory_bytes=96 * GI), node("n", gpus()), "gpu-memory"),
        (need(memory_bytes=GI), node("n", gpus(memory=0)), "gpu-memory"),
        (need(compute_capability=(9, 0)), node("n", gpus()), "compute-capability"),
        (need(compute_capability=(7, 5)), node("n", gpus(compute=None)), "compute-capability"),
        (need(mig_profile="1g.5gb"), node("n", gpus()), "mig-profile"),
        (need(), node("n", gpus(resource="nvidia.com/mig-1g.5gb", mig_profile="1g.5gb")), "gpu-kind"),
        (need(), node("n", gpus(resource="nvidia.com/gpu.shared", shares=4)), "gpu-kind"),
        (need(), node("n", gpus(resource="amd.com/gpu", model="MI300X")), "gpu-kind"),
        (need(resource="amd.com/gpu", units=1), node("n", gpus()), "gpu-kind"),
        (need(spot="require"), node("n", gpus()), "spot"),
        (need(spot="never"), node("n", gpus(), is_spot=True), "spot"),
        (need(cpu_milli=65_000), node("n", gpus()), "cpu"),
        (need(host_memory_bytes=257 * GI), node("n", gpus()), "memory"),
        (need(), node("n", gpus(), why_not="cordoned"), "cordoned"),
        (need(), node("n", gpus(), why_not="driver-upgrade"), "driver-upgrade"),
        (need(), node("n", gpus(), taints=(Taint("team", "ml"),)), "taint"),
        (need(terms=NodeTerms((Requirement("zone", "In", ("a",)),))), node("n", gpus(), labels={"zone": "b"}), "node-selector"),
        (need(models=("T4",), terms=NodeTerms((Requirement("zone", "In", ("a",)),))), node("n", gpus()), "gpu-model"),
    ],
)  # fmt: skip
def test_a_node_that_does_not_fit_says_why(asked, there, code):
    verdict = first(asked, there)
    assert (verdict.code, verdict.fits) == (code, False)
    assert verdict.reason.endswith(".")


@pytest.mark.parametrize(
    ("asked", "there", "resource", "units"),
    [
        (need(4), node("n", gpus(4)), "nvidia.com/gpu", 4),
        (need(0.5), node("n", gpus(1)), "nvidia.com/gpu", 1),
        (need(0.5), node("n", gpus(8, resource="nvidia.com/gpu.shared", shares=4)), "nvidia.com/gpu.shared", 2),
        (need(0.3), node("n", gpus(8, resource="nvidia.com/gpu.shared", shares=4)), "nvidia.com/gpu.shared", 2),
        (need(mig_profile="1g.10gb+me"), node("n", gpus(2, resource="nvidia.com/mig-1g.10gb.me", mig_profile="1g.10gb.me")), "nvidia.com/mig-1g.10gb.me", 1),
        (need(mig_profile="1g.5gb"), node("n", gpus(7, mig_profile="1g.5gb")), "nvidia.com/gpu", 1),
        (need(resource="nvidia.com/gpu", units=2), node("n", gpus(4, shares=4)), "nvidia.com/gpu", 2),
        (need(models=("mi300x",)), node("n", gpus(resource="amd.com/gpu", model="AMD_Instinct_MI300X_OAM")), "amd.com/gpu", 1),
        (need(0), node("n"), "", 0),
        (need(), node("n", gpus(), taints=(Taint("nvidia.com/gpu", "present"),)), "nvidia.com/gpu", 1),
    ],
)  # fmt: skip
def test_a_node_that_fits_says_what_to_ask_for(asked, there, resource, units):
    verdict = first(asked, there)
    assert (verdict.fits, verdict.resource, verdict.units) == (True, resource, units)


def test_a_share_with_a_memory_need_gets_as_much_of_a_gpu_as_its_share_is():
    shared = node("n", gpus(8, resource="nvidia.com/gpu.shared", shares=4, memory=20))
    assert first(need(0.5, memory_bytes=40 * GI), shared).fits
    assert first(need(0.25, memory_bytes=40 * GI), shared).code == "gpu-memory"


def test_of_two_offers_the_nearest_miss_is_told():
    both = node("n", gpus(model=T4), gpus(2, 2, resource="nvidia.com/gpu.shared", shares=2))
    assert first(need(0.5, models=("a100",)), both).code == "gpu-busy"


def test_whole_machines_that_are_closed_say_so_before_their_gpus_do():
    assert first(need(), node("n", gpus(4, 4), why_not="not-ready")).code == "not-ready"


def test_spot_machines_with_a_taint_take_who_likes_spot():
    spot = node("n", gpus(), is_spot=True, taints=(Taint("kubernetes.azure.com/scalesetpriority", "spot"),))
    assert first(need(spot="prefer"), spot).fits
    assert first(need(), spot).code == "taint"
    assert Toleration("cloud.google.com/gke-spot") in tolerations(need(spot="require"))


def test_what_no_node_has_now_is_asked_for_by_the_usual_name():
    assert default_resource(need(0.5)) == ("nvidia.com/gpu", 1)
    assert default_resource(need(2, mig_profile="1g.10gb+me")) == ("nvidia.com/mig-1g.10gb.me", 2)
    assert default_resource(need(1, resource="amd.com/gpu", units=3)) == ("amd.com/gpu", 3)


# Order ----------------------------------------------------------------------------------------------


def test_a_node_with_the_snapshot_is_better_than_one_without():
    asked = need(snapshot="t/f.ns", load_s=20)
    here = node("b", gpus(4, 1), snapshots={"t/f.ns": 2 * GI}, disk_bytes_per_s=1e9)
    best, other = place(asked, [node("a", gpus(4, 1)), here])
    assert (best.node, other.node) == ("b", "a")
    assert best.wake_s == pytest.approx(0.5 + 2 * GI / 1e9)
    assert (other.wake_s, best.score) == (20, 100)
    assert other.score < 50


def test_a_restore_that_takes_longer_than_a_start_is_none():
    slow = node("n", gpus(), snapshots={"t/f.ns": 100 * GI}, disk_bytes_per_s=1e8)
    assert first(need(snapshot="t/f.ns", load_s=20), slow).wake_s == 20


def test_anothers_snapshot_is_of_no_use():
    theirs = node("b", gpus(4, 1), snapshots={"other/f.ns": GI})
    assert first(need(snapshot="t/f.ns"), node("a", gpus(4, 1)), theirs).wake_s == 20


def test_partly_used_nodes_are_filled_before_empty_ones():
    assert order(need(), node("empty", gpus(4)), node("partly", gpus(4, 1))) == ["partly", "empty"]


def test_where_it_fits_exactly_is_best():
    assert order(need(2), node("a", gpus(8, 1)), node("b", gpus(8, 6)), node("c", gpus(8, 4)))[0] == "b"


def test_cpu_that_the_rest_of_a_node_needs_is_left_alone():
    mix = Mix.of([Need("", 1.0, cpu_milli=8000)])
    tight, roomy = node("a", gpus(2, 1), gpus(2), cpu=12_000), node("b", gpus(2, 1), gpus(2), cpu=64_000)
    assert order(need(cpu_milli=6000), tight, roomy, mix=mix) == ["b", "a"]


def test_a_model_that_others_cannot_do_without_is_left_to_them():
    mix = Mix.of([Need("", 1.0, models=("a100",)), Need("", 1.0, models=("a100",)), Need("", 1.0)])
    assert order(need(), node("a", gpus(2)), node("b", gpus(2, model=T4)), mix=mix) == ["b", "a"]


def test_a_function_without_a_gpu_goes_where_its_cpu_is_not_missed():
    mix = Mix.of([Need("", 1.0, cpu_milli=8000)])
    assert order(need(0, cpu_milli=4000), node("a", gpus(1), cpu=9000), node("b", gpus(1), cpu=16_000), mix=mix) == [
        "b",
        "a",
    ]


def test_the_order_of_models_is_kept_before_all_else():
    near = node("a", gpus(2, 1, model=T4), snapshots={"t/f.ns": GI})
    asked = need(models=("a100", "t4"), snapshot="t/f.ns")
    assert order(asked, near, node("b", gpus(8))) == ["b", "a"]


@pytest.mark.parametrize(("spot", "best"), [("prefer", "spot"), ("avoid", "sure"), ("any", "spot")])
def test_spot_is_weighed(spot, best):
    nodes = [node("spot", gpus(4, 1), is_spot=True), node("sure", gpus(4, 1))]
    assert order(need(spot=spot), *nodes)[0] == best


def test_what_is_equally_good_goes_by_name():
    nodes = [node(name, gpus(4, 1)) for name in ("c", "a", "b")]
    assert order(need(), *nodes) == ["a", "b", "c"]


# Terms and sentences --------------------------------------------------------------------------------


def test_each_next_cost_has_half_the_weight():
    nodes = [node("a", gpus(8, 7)), node("b", gpus(8, 7)), node("c", gpus(8, 4)), node("d", gpus(8))]
    terms = preferences(place(need(), nodes))
    assert [term.weight for term in terms] == [100, 50, 25]
    assert [term.nodes for term in terms] == [("a", "b"), ("c",), ("d",)]


def test_terms_name_nodes_of_one_resource_only():
    shared = gpus(8, 1, resource="nvidia.com/gpu.shared", shares=4)
    verdicts = place(need(0.25), [node("a", gpus(4)), node("b", shared)])
    named = {name for term in preferences(verdicts) for name in term.nodes}
    assert named == {verdict.node for verdict in verdicts if verdict.resource == verdicts[0].resource} == {"b"}


def test_no_more_nodes_are_named_than_an_object_can_bear():
    verdicts = place(need(), [node(f"n{i:04}", gpus(8, i % 8)) for i in range(1000)])
    assert sum(len(term.nodes) for term in preferences(verdicts)) <= 64


def test_nothing_that_fits_gives_no_terms():
    assert preferences(place(need(), [node("a")])) == []


def test_a_summary_for_people():
    nodes = [node("a", gpus(4)), node("b", gpus(4, 4)), node("c", gpus(4, 4)), node("d", gpus(model=T4))]
    assert explain(place(need(models=("a100",)), nodes)) == "1 of 4 nodes fit; 2: no free GPU; 1: another GPU model."
    busy = place(need(models=("a100",)), nodes[1:])
    assert explain(busy) == "None of 3 nodes fits; 2: no free GPU; 1: another GPU model."
    assert may_fit_later(busy)


def test_what_can_never_be_is_said_differently():
    verdicts = place(need(16), [node("a", gpus(8)), node("b", gpus(4))])
    assert explain(verdicts) == "It needs more GPUs than any node has. None of 2 nodes fits; 2: too few GPUs."
    assert not may_fit_later(verdicts)
    assert explain(place(need(models=("h100",)), [node("a", gpus())])).startswith("No node here can ever fit.")
    assert explain([]) == "The cluster has no nodes."


def test_a_mix_of_nothing_weighs_nothing_up():
    nodes = [node("a", gpus(4, 1)), node("b", gpus(4, 3))]
    assert (
        len(order(need(), *nodes, mix=Mix.of([]))) == len(order(replace(need(), gpus=0), *nodes, mix=Mix.of([]))) == 2
    )


def test_what_came_lately_counts_instead_of_what_usually_comes():
    recent = Recent(at_most=4, fewest=2)
    recent.add(need(0))
    assert recent.mix is USUAL
    for asked in [need(models=("a100",))] * 2:
        recent.add(asked)
    assert recent.mix.unusable(gpus(4, model=T4), 4, 0) == 4
    for asked in [need(models=("t4",))] * 4:
        recent.add(asked)
    assert recent.mix.unusable(gpus(4, model=T4), 4, 0) == 0
    assert recent.mix.unusable(gpus(4), 4, 0) == 4
