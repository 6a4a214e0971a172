import pytest

from adapter.errors import ConfigError
from benchmarks.openb import TraceNode, TracePod, read_nodes, read_pods
from benchmarks.scheduler_model import Fleet, OurTerms, Scheduler


def node(name="n", gpus=8, cores=96, model="G2"):
    return TraceNode(name, cores * 1000, 384 * 1024, gpus, model)


def pod(gpus=1, cores=12, models=()):
    return TracePod("p", cores * 1000, 16 * 1024, gpus, models)


def places(scheduler, count, **kind):
    return [scheduler.schedule(pod(**kind)) for _ in range(count)]


def test_by_default_pods_are_spread():
    fleet = Fleet([node(), node(), node()])
    assert sorted(places(Scheduler(fleet, packs=False), 3)) == [0, 1, 2]
    assert fleet.stranded == 21


@pytest.mark.parametrize("kind", [{"packs": True}, {"packs": False, "terms": OurTerms()}])
def test_packing_and_our_terms_fill_one_node_first(kind):
    fleet = Fleet([node(), node(), node()])
    assert len(set(places(Scheduler(fleet, **kind), 8))) == 1
    assert (fleet.stranded, fleet.used) == (0, 8)


def test_what_fits_nowhere_is_told():
    scheduler = Scheduler(Fleet([node(gpus=2), node(model="T4")]), packs=True)
    assert places(scheduler, 1, gpus=4, models=("G2",)) == [None]
    assert places(scheduler, 1, cores=97) == [None]
    assert places(scheduler, 1, gpus=4) == [1]


def test_a_trace_that_is_not_here_says_where_it_is_to_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("GPUFN_TRACES", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        read_pods()
    assert "alibaba/clusterdata" in caught.value.hint


def test_a_trace_is_read_in_its_order(monkeypatch, tmp_path):
    monkeypatch.setenv("GPUFN_TRACES", str(tmp_path))
    (tmp_path / "openb_node_list_gpu_node.csv").write_text("sn,cpu_milli,memory_mib,gpu,model\nn1,64000,1024,2,P100\n")
    (tmp_path / "openb_pod_list_gpuspec33.csv").write_text(
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\np1,12000,16,1,460,T4|G2\np0,1,2,0,0,\n"
    )
    assert read_nodes(1) == [TraceNode("n1", 64000, 1024, 2, "P100")]
    assert read_pods() == [TracePod("p1", 12000, 16, 1, ("G2", "T4")), TracePod("p0", 1, 2, 0, ())]
