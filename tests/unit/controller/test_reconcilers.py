import asyncio

from adapter.cluster.health import new_registry
from adapter.controller.metrics import ControllerMetrics
from adapter.controller.reconcilers import Reconcilers
from adapter.errors import Unavailable
from tests.fakes.virtual_time import in_virtual_time


class Recorded:
    """A reconciler that does what `act` says, and keeps when it was asked."""

    def __init__(self, keys=(), act=lambda key: None, name="recorded"):
        self.name, self._keys, self._act = name, keys, act
        self.asked = []

    def start(self, changed):
        self.changed = changed

    def all_keys(self):
        return self._keys

    async def reconcile(self, key):
        self.asked.append((key, asyncio.get_running_loop().time()))
        return self._act(key)

    def times(self, key):
        return [at for asked, at in self.asked if asked == key]


def play(scene, *reconcilers):
    async def played():
        registry = new_registry()
        running = Reconcilers(reconcilers, ControllerMetrics(registry))
        await scene(running, registry)

    in_virtual_time(played())


def test_a_new_leader_looks_at_everything():
    recorded = Recorded(keys=["a", "b"])

    async def scene(running, registry):
        leading = asyncio.ensure_future(running.lead())
        await asyncio.sleep(1)
        assert [key for key, _ in recorded.asked] == ["a", "b"]
        leading.cancel()

    play(scene, recorded)


def test_who_does_not_lead_does_nothing_and_looks_at_all_when_it_does():
    recorded = Recorded(keys=["a"])

    async def scene(running, registry):
        recorded.changed("b")
        await asyncio.sleep(1)
        assert not recorded.asked
        for _ in range(2):
            leading = asyncio.ensure_future(running.lead())
            await asyncio.sleep(1)
            leading.cancel()
            await asyncio.wait([leading])
            recorded.changed("c")
        assert [key for key, _ in recorded.asked] == ["a", "a"]
        assert registry.get_sample_value("gpufn_controller_leading") == 0

    play(scene, recorded)


def test_what_fails_comes_again_and_stops_no_other():
    def act(key):
        if key == "odd":
            raise ValueError("it is odd")
        if key == "away":
            raise Unavailable("It is away.", code="api-unreachable")

    recorded = Recorded(keys=["odd", "away", "good"], act=act)

    async def scene(running, registry):
        leading = asyncio.ensure_future(running.lead())
        await asyncio.sleep(30)
        assert len(recorded.times("good")) == 1
        assert len(recorded.times("odd")) > 3
        assert len(recorded.times("away")) > 3
        labels = {"reconciler": "recorded", "code": "api-unreachable"}
        assert registry.get_sample_value("gpufn_reconcile_failures_total", labels) > 3
        leading.cancel()

    play(scene, recorded)


def test_a_key_comes_again_when_its_reconciler_wants_it():
    recorded = Recorded(keys=["a"], act=lambda key: 60.0)

    async def scene(running, registry):
        leading = asyncio.ensure_future(running.lead())
        await asyncio.sleep(150)
        first, second, third = recorded.times("a")
        assert (second - first, third - second) == (60, 60)
        leading.cancel()

    play(scene, recorded)


def test_the_time_from_an_event_to_the_end_of_what_it_led_to_is_measured():
    class Slow(Recorded):
        async def reconcile(self, key):
            await asyncio.sleep(3)

    slow = Slow()

    async def scene(running, registry):
        leading = asyncio.ensure_future(running.lead())
        await asyncio.sleep(1)
        slow.changed("a")
        await asyncio.sleep(10)
        assert registry.get_sample_value("gpufn_controller_lag_seconds_sum", {"reconciler": "recorded"}) == 3
        leading.cancel()

    play(scene, slow)


def test_one_reconciler_that_hangs_holds_no_other_up():
    class Hanging(Recorded):
        async def reconcile(self, key):
            await asyncio.Event().wait()

    hanging, recorded = Hanging(keys=list("abcdefgh"), name="hanging"), Recorded(keys=["a"])

    async def scene(running, registry):
        leading = asyncio.ensure_future(running.lead())
        await asyncio.sleep(1)
        assert recorded.asked
        assert running.waiting() == {"hanging": 4, "recorded": 0}
        leading.cancel()

    play(scene, hanging, recorded)


def test_who_leads_no_more_tells_nothing_of_what_a_leader_knows():
    async def scene(running, registry):
        leading = asyncio.ensure_future(running.lead())
        await asyncio.sleep(1)
        running._metrics.unplaced.labels("true").set(3)
        leading.cancel()
        await asyncio.wait([leading])
        assert registry.get_sample_value("gpufn_controller_leading") == 0
        assert registry.get_sample_value("gpufn_unplaced_pods", {"later": "true"}) is None

    play(scene, Recorded())
