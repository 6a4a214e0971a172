"""What the tuner writes, in which order, and when it looks again. tests/cluster has a real Knative."""

import asyncio
from types import SimpleNamespace

import pytest

from adapter.errors import Conflict, NotFound, Unavailable
from adapter.knative.autoscaling import MIN_SCALE, RETENTION, WINDOW, Defaults
from adapter.knative.traffic import LedgerTraffic
from adapter.knative.tuner import Tuner, has_spare
from adapter.knative.tuning import read_revision
from adapter.policy.activity import Activity
from adapter.policy.placement import Need, Node, Offer
from adapter.records import Rung
from tests.fakes.revisions import revision, revision_json

S = 10**9
NOW_NS = 10**6 * S
KEY = "team/embed-00001"


class Writes:
    """What would be written; `fails` is raised instead, once, at the path that it names."""

    def __init__(self, fails=None):
        self.done, self._fails = [], dict(fails or {})

    async def patch(self, path, body):
        self._write("patch", path, body)

    async def apply(self, path, body):
        self._write("apply", path, body)

    def _write(self, how, path, body):
        for part, error in list(self._fails.items()):
            if part in path:
                del self._fails[part]
                raise error
        self.done.append((how, path, body))


def busy(*spans, wake_s=5.0):
    return Activity(
        "embed", "team", tuple((NOW_NS + a * S, NOW_NS + b * S) for a, b in spans), {Rung.LOAD: (wake_s,) * 3}
    )


EVERY_40_S = busy(*((-1000 + 50 * n, -990 + 50 * n) for n in range(20)))


def tuner(found, writes, answer=(EVERY_40_S,), nodes=()):
    async def ask(_since_ns):
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    cached = {KEY: found} if found else {}
    revisions = SimpleNamespace(get=cached.get, snapshot=lambda: cached, on_change=lambda _: None)
    traffic = LedgerTraffic(ask, clock_ns=lambda: NOW_NS)
    return Tuner(writes, revisions, traffic, defaults=Defaults, nodes=lambda: nodes, clock_ns=lambda: NOW_NS)


def reconciled(found, writes, **more):
    return asyncio.run(tuner(found, writes, **more).reconcile(KEY))


def test_the_autoscaler_is_told_before_the_revision():
    writes = Writes()
    assert reconciled(revision(), writes) == 60.0
    (told, autoscaler, merge), (applied, path, body) = writes.done
    assert (told, applied) == ("patch", "apply")
    assert autoscaler.endswith("/namespaces/team/podautoscalers/embed-00001")
    assert path.endswith("/namespaces/team/revisions/embed-00001")
    assert body["metadata"] == {
        "name": "embed-00001", "namespace": "team", "uid": "u-1",
        "annotations": {WINDOW: merge["metadata"]["annotations"][WINDOW]},
    }  # fmt: skip
    assert merge["metadata"]["annotations"][RETENTION] is None


def test_what_is_as_it_should_be_is_not_written_again():
    first = Writes()
    reconciled(revision(), first)
    writes = Writes()
    reconciled(revision(ours=first.done[-1][2]["metadata"]["annotations"]), writes)
    assert writes.done == []


def test_what_the_user_set_is_not_even_named():
    writes = Writes()
    reconciled(revision({WINDOW: "10s"}), writes)
    assert WINDOW not in str(writes.done)


def test_an_autoscaler_that_is_not_made_yet_is_no_failure():
    writes = Writes({"podautoscalers": NotFound("none")})
    reconciled(revision(), writes)
    assert [how for how, _, _ in writes.done] == ["apply"]


@pytest.mark.parametrize("at", ["podautoscalers", "revisions"])
def test_what_failed_half_way_is_done_whole_the_next_time(at):
    writes = Writes({at: Conflict("not now")})
    with pytest.raises(Conflict):
        reconciled(revision(), writes)
    before = len(writes.done)
    reconciled(revision(), writes)
    assert [how for how, _, _ in writes.done[before:]] == ["patch", "apply"]


def test_a_revision_that_is_not_there_any_more_is_nothing_to_do():
    assert reconciled(None, Writes()) is None


def test_a_revision_that_lost_its_traffic_is_let_go_once_and_looked_at_no_more():
    writes = Writes()
    assert reconciled(revision(ours={WINDOW: "20s"}, state="reserve"), writes) is None
    assert writes.done[-1][2]["metadata"]["annotations"] == {}


@pytest.mark.parametrize("ours", [{}, {RETENTION: "33s"}])
def test_while_the_ledger_is_down_nothing_is_written(ours):
    writes = Writes()
    assert reconciled(revision(ours=ours), writes, answer=Unavailable("down")) == 60.0
    assert writes.done == []


def gpus(free):
    return Node("n", (Offer("nvidia.com/gpu", 4, used=4 - free),), free_cpu_milli=1000, free_memory_bytes=2**30)


@pytest.mark.parametrize(("free", "warm"), [(2, True), (1, False), (0, False)])
def test_nothing_is_woken_ahead_onto_the_last_free_gpu(free, warm):
    hourly = busy(*((-3600 * n + 5, -3600 * n + 15) for n in range(40, 0, -1)), wake_s=20.0)  # due in 5 s
    writes = Writes()
    reconciled(revision(), writes, answer=[hourly], nodes=[gpus(free)])
    assert any(MIN_SCALE in body["metadata"]["annotations"] for how, _, body in writes.done if how == "apply") is warm


def test_a_function_without_a_gpu_takes_none():
    assert has_spare(Need("f"), ())


def test_a_change_of_a_revision_is_its_key():
    handlers, changed = [], []
    tuned = tuner(revision(), Writes())
    tuned._revisions.on_change = handlers.append
    tuned.start(changed.append)
    handlers[0](KEY, None, read_revision(revision_json()))
    handlers[0](KEY, read_revision(revision_json()), None)
    assert changed == [KEY]
