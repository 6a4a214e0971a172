from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from adapter.cluster.health import new_registry
from adapter.cluster.informer import Informer
from adapter.cluster.resources import GPU_NODES, PODS
from adapter.controller.metrics import AdmissionMetrics, ControllerMetrics, InformerCollector


def test_no_series_is_told_twice_and_all_have_our_prefix():
    registry = new_registry()
    AdmissionMetrics(registry)
    ControllerMetrics(registry)
    InformerCollector([Informer(None, path, str) for path in (PODS.path(), GPU_NODES.path(), PODS.path())], registry)
    samples = [
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    ]
    assert len(samples) == len(set(samples))
    assert all(name.startswith(("gpufn_", "process_")) for name, _ in samples)
    assert ("gpufn_cache_objects", (("resource", "pods"),)) in samples
