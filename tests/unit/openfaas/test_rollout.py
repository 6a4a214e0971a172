import pytest

from adapter.errors import ConfigError
from adapter.hosts import Deployment
from adapter.openfaas.rollout import Rollout
from adapter.spec import parse_spec


def revision(number: int) -> Deployment:
    return Deployment("fn", "ns", str(number), "fn", parse_spec({}, {}))


ONE, TWO, THREE = revision(1), revision(2), revision(3)
PROBLEM = ConfigError("No.", why="Because.")


def prepared() -> Rollout:
    rollout = Rollout(ONE)
    assert rollout.prepared(ONE, None)
    return rollout


def test_the_first_revision():
    rollout = Rollout(ONE)
    assert rollout.status == "preparing: its environment is being built"
    assert rollout.prepared(ONE, None)
    assert (rollout.status, rollout.broken, rollout.is_ready) == ("", None, False)


def test_a_first_revision_that_cannot_run_is_replaced_at_once():
    rollout = Rollout(ONE)
    rollout.prepared(ONE, PROBLEM)
    assert rollout.broken is PROBLEM
    assert rollout.status == "failed: No. Because."
    assert rollout.begin(TWO)
    assert not rollout.wants(ONE)
    assert not rollout.prepared(ONE, None)  # too late
    assert rollout.prepared(TWO, None)


def test_a_later_revision_takes_over_when_it_is_ready():
    rollout = prepared()
    assert not rollout.begin(TWO)
    assert "revision 2" in rollout.status
    assert not rollout.is_ready
    rollout.prepared(TWO, None)
    assert rollout.is_ready
    assert rollout.switch() is TWO
    assert (rollout.status, rollout.wants(ONE), rollout.wants(TWO)) == ("", False, True)


@pytest.mark.parametrize("ready", [False, True])
def test_a_later_revision_that_fails_leaves_the_first(ready):
    rollout = prepared()
    rollout.begin(TWO)
    if ready:
        rollout.prepared(TWO, None)
        assert rollout.fail(TWO, PROBLEM)
    else:
        rollout.prepared(TWO, PROBLEM)
    assert rollout.broken is None
    assert rollout.status == "failed: No. Because."
    assert rollout.wants(ONE)
    assert not rollout.is_ready
    rollout.begin(THREE)
    rollout.prepared(THREE, None)
    rollout.switch()
    assert rollout.status == ""


def test_only_the_latest_counts():
    rollout = prepared()
    rollout.begin(TWO)
    rollout.begin(THREE)
    assert not rollout.prepared(TWO, None)
    assert not rollout.fail(TWO, PROBLEM)
    rollout.prepared(THREE, None)
    assert rollout.switch() is THREE
