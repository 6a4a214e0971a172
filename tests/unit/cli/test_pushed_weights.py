"""Which weights go to a registry with a process snapshot."""

import pytest

from adapter.cli.artifact import _with_needed
from adapter.errors import NotFound
from adapter.snapshot.store import Store


def publish(store, kind, **facts):
    with store.building("default", "fn.openfaas-fn", {"code": kind}, kind) as draft:
        (draft.path / "data").write_text("x")
        return draft.publish(facts)


@pytest.mark.parametrize("weights", ["", "image:0123"])
def test_weights_that_are_in_the_process_or_in_the_image_do_not(tmp_path, weights):
    store = Store(tmp_path)
    process = publish(store, "process", weights=weights)
    assert _with_needed(store, process) == [process]


def test_weights_of_the_store_do(tmp_path):
    store = Store(tmp_path)
    weights = publish(store, "weights")
    process = publish(store, "process", weights=weights.key)
    assert _with_needed(store, process) == [weights, process]
    store.remove(weights)
    with pytest.raises(NotFound):
        _with_needed(store, process)
