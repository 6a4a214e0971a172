"""What the tuner writes, in which order, and when it looks again. tests/cluster has a real Knative."""

import asyncio
from types import SimpleNamespace

import pytest

from adapter.errors import Conflict, Unavailable
from adapter.knative.autoscaling import MIN_SCALE, RETENTION, WINDOW, Defaults
from adapter.knative.tuner import Tuner, has_spare
from adapter.ledger.traffic import LedgerTraffic
from adapter.policy.activity import Activity
from adapter.policy.placement import Need, Node, Offer
from adapter.records import Rung
from tests.fakes.revisions import autoscaler, revision

S = 10**9
NOW_NS = 10**6 * S
KEY = "team/embed-00001"


class Cluster:
    """A Knative of one `version`, with one Revision and its autoscaler; `fails` is raised by the next write."""

    def __init__(self, found=None, scaler=None, version="devel", fails=None):
        self.revisions = {KEY: found} if found else {}
        self.autoscalers = {KEY: scaler} if scaler else {}
        self.written, self._version, self._fails = [], version, fails

    async def list(self, path, project, *, field_selector):
        assert (path, field_selector) == (
            "/api/v1/namespaces/knative-serving/configmaps",
            "metadata.name=config-autoscaler",
        )
        if self._version is None:
            raise Unavailable("Nobody may ask.")
        labels = {"app.kubernetes.io/version": self._version}
        return SimpleNamespace(items=[project({"metadata": {"labels": labels}})])

    async def apply(self, path, body):
        if self._fails is not None:
            error, self._fails = self._fails, None
            raise error
        kind = path.split("/")[-2]
        self.written.append((kind, body["metadata"]["uid"], body["metadata"]["annotations"]))
        return {"metadata": {"resourceVersion": "7"}}


def busy(*spans, wake_s=5.0):
    return Activity(
        "embed", "team", tuple((NOW_NS + a * S, NOW_NS + b * S) for a, b in spans), {Rung.LOAD: (wake_s,) * 3}
    )


EVERY_40_S = busy(*((-1000 + 50 * n, -990 + 50 * n) for n in range(20)))


def tuner(cluster, answer=(EVERY_40_S,), nodes=(), is_spent=False):
    async def ask(_since_ns):
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    def cache(found):
        return SimpleNamespace(get=found.get, snapshot=lambda: found, on_change=lambda _: None)

    async def spent(_revision):
        return is_spent

    traffic = LedgerTraffic(ask, clock_ns=lambda: NOW_NS)
    return Tuner(
        cluster, cache(cluster.revisions), cache(cluster.autoscalers), traffic,
        defaults=Defaults, nodes=lambda: nodes, is_spent=spent, clock_ns=lambda: NOW_NS,
    )  # fmt: skip


def reconciled(cluster, **more):
    return asyncio.run(tuner(cluster, **more).reconcile(KEY))


@pytest.mark.parametrize(
    ("version", "kind", "uid"),
    [
        ("1.21.0", "revisions", "u-1"),
        ("v1.22.1", "revisions", "u-1"),
        ("2.0", "revisions", "u-1"),
        ("1.20.3", "podautoscalers", "u-2"),
        ("devel", "podautoscalers", "u-2"),
        (None, "podautoscalers", "u-2"),
    ],
)
def test_a_knative_is_told_where_it_listens_and_rolls_nothing_out(version, kind, uid):
    cluster = Cluster(revision(), autoscaler(), version)
    assert reconciled(cluster) == 60.0
    ((written, of, annotations),) = cluster.written
    assert (written, of) == (kind, uid)
    assert set(annotations) == {WINDOW}


def test_a_knative_of_unknown_age_that_takes_it_away_again_is_told_on_revisions():
    cluster = Cluster(revision(), autoscaler(version=5))
    tuned = tuner(cluster)
    asyncio.run(tuned.reconcile(KEY))
    asyncio.run(tuned.reconcile(KEY))  # the cache does not know of it yet
    assert [kind for kind, _, _ in cluster.written] == ["podautoscalers", "podautoscalers"]
    cluster.autoscalers[KEY] = autoscaler(version=8)
    asyncio.run(tuned.reconcile(KEY))
    assert [kind for kind, _, _ in cluster.written] == ["podautoscalers", "podautoscalers", "revisions"]


def test_a_knative_that_is_known_to_be_old_is_never_told_on_revisions():
    cluster = Cluster(revision(), autoscaler(version=5), "1.15.2")
    tuned = tuner(cluster)
    asyncio.run(tuned.reconcile(KEY))
    cluster.autoscalers[KEY] = autoscaler(version=8)
    asyncio.run(tuned.reconcile(KEY))
    assert {kind for kind, _, _ in cluster.written} == {"podautoscalers"}


def test_a_user_who_writes_over_ours_has_not_taken_it_away():
    cluster = Cluster(revision(), autoscaler(version=5))
    tuned = tuner(cluster)
    asyncio.run(tuned.reconcile(KEY))
    cluster.autoscalers[KEY] = autoscaler({WINDOW: "33s", RETENTION: "5s"}, version=8)
    asyncio.run(tuned.reconcile(KEY))
    assert [kind for kind, _, _ in cluster.written] == ["podautoscalers"]


@pytest.mark.parametrize("version", ["1.15.2", "1.21.0"])
def test_what_is_as_it_should_be_is_not_written_again(version):
    first = Cluster(revision(), autoscaler(), version)
    reconciled(first)
    ours = first.written[-1][2]
    again = Cluster(revision(ours=ours if version == "1.21.0" else None), autoscaler(ours=ours), version)
    reconciled(again)
    assert again.written == []


@pytest.mark.parametrize("version", ["1.15.2", "1.21.0"])
def test_what_the_user_set_is_not_even_named(version):
    cluster = Cluster(revision({WINDOW: "10s"}), autoscaler({WINDOW: "10s"}), version)
    reconciled(cluster)
    assert WINDOW not in str(cluster.written)


def test_an_autoscaler_that_is_not_made_yet_is_waited_for():
    cluster = Cluster(revision())
    assert reconciled(cluster) is None
    assert cluster.written == []


def test_what_failed_is_done_the_next_time():
    cluster = Cluster(revision(), autoscaler(), fails=Conflict("not now"))
    tuned = tuner(cluster)
    with pytest.raises(Conflict):
        asyncio.run(tuned.reconcile(KEY))
    asyncio.run(tuned.reconcile(KEY))
    assert len(cluster.written) == 1


def test_a_revision_that_is_not_there_any_more_is_nothing_to_do():
    assert reconciled(Cluster()) is None


def test_a_revision_that_lost_its_traffic_is_let_go_once_and_looked_at_no_more():
    ours = {WINDOW: "20s"}
    cluster = Cluster(revision(state="reserve"), autoscaler(ours=ours))
    assert reconciled(cluster) is None
    assert cluster.written[-1][2] == {}


@pytest.mark.parametrize("ours", [{}, {RETENTION: "33s"}])
def test_while_the_ledger_is_down_nothing_is_written(ours):
    cluster = Cluster(revision(), autoscaler(ours=ours))
    assert reconciled(cluster, answer=Unavailable("down")) == 60.0
    assert cluster.written == []


def gpus(free):
    return Node("n", (Offer("nvidia.com/gpu", 4, used=4 - free),), free_cpu_milli=1000, free_memory_bytes=2**30)


@pytest.mark.parametrize(("free", "warm"), [(2, True), (1, False), (0, False)])
def test_nothing_is_woken_ahead_onto_the_last_free_gpu(free, warm):
    hourly = busy(*((-3600 * n + 5, -3600 * n + 15) for n in range(40, 0, -1)), wake_s=20.0)  # due in 5 s
    cluster = Cluster(revision(), autoscaler())
    reconciled(cluster, answer=[hourly], nodes=[gpus(free)])
    assert any(MIN_SCALE in annotations for _, _, annotations in cluster.written) is warm


def test_nothing_is_woken_ahead_whose_budget_is_spent():
    hourly = busy(*((-3600 * n + 5, -3600 * n + 15) for n in range(40, 0, -1)), wake_s=20.0)  # due in 5 s
    cluster = Cluster(revision(), autoscaler())
    reconciled(cluster, answer=[hourly], nodes=[gpus(2)], is_spent=True)
    assert not any(MIN_SCALE in annotations for _, _, annotations in cluster.written)


def test_what_a_revision_that_is_gone_was_told_is_forgotten():
    handlers, cluster = [], Cluster(revision(), autoscaler())
    tuned = tuner(cluster)
    tuned._revisions.on_change = tuned._autoscalers.on_change = handlers.append
    tuned.start(lambda key: None)
    asyncio.run(tuned.reconcile(KEY))
    assert tuned._told
    handlers[0](KEY, revision(), None)
    assert not tuned._told


def test_a_function_without_a_gpu_takes_none():
    assert has_spare(Need("f"), ())


def test_a_change_of_a_revision_or_of_its_autoscaler_is_its_key():
    handlers, changed = [], []
    tuned = tuner(Cluster(revision()))
    tuned._revisions.on_change = tuned._autoscalers.on_change = handlers.append
    tuned.start(changed.append)
    for handle in handlers:
        handle(KEY, None, autoscaler())
        handle(KEY, autoscaler(), None)
    assert changed == [KEY, KEY]
