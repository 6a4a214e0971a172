"""Fleets on few GPUs, whatever happens to them: grants are always the living replicas' claims, and none is lost."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress

from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from adapter.errors import AdapterError, Unavailable
from adapter.hosts import Deployment, Inventory, ReplicaState
from adapter.openfaas.fleet import Fleet
from adapter.openfaas.gpus import Gpus
from adapter.policy.grants import Device
from adapter.records import Event, EventName, Rung, StartRecord
from adapter.spec import parse_spec

MEMORY = 16
RECORD = StartRecord("f", "ns", "1", "f-1", Rung.LOAD, 0, 1, (), error="no").to_json()
TURNS = 12
"""More turns of the loop than anything takes that waits for nothing."""


class PatientLoop(asyncio.SelectorEventLoop):
    """Its clock stands still until a test moves it."""

    now_s = 1000.0

    def time(self) -> float:
        return self.now_s


class Replica:
    """Does what the test says, and nothing else. `holds`: its process has memory of `devices`."""

    def __init__(self, machine, identity, deployment, sink, devices):
        self.id = identity
        self.deployment = deployment
        self.host, self.port = "nowhere", 0
        self.state = ReplicaState.STARTING
        self.building_snapshot = False
        self.devices = devices
        self.holds = True
        self.park_asked = self.resume_asked = False
        self._machine = machine
        self._sink = sink
        self._gone = asyncio.Event()

    def say(self, name, **fields):
        self._sink(self, Event(name, 0, fields))

    def park(self):
        self.park_asked = True

    def resume(self, devices):
        assert self.state is ReplicaState.PARKED
        assert not self.holds
        self.devices, self.holds, self.resume_asked = tuple(devices), True, True

    async def stop(self, grace_s):
        if self.state is not ReplicaState.GONE:
            self.state = ReplicaState.STOPPING
        await self._gone.wait()

    # What the test does

    def serve(self):
        self.state, self.resume_asked = ReplicaState.SERVING, False
        self.say(EventName.SERVING, rung="load")

    def now_parked(self):
        self.park_asked = self.holds = False
        if self.state is not ReplicaState.STOPPING:
            self.state = ReplicaState.PARKED
        self.say(EventName.PARKED)

    def end(self):
        self.state, self.holds = ReplicaState.GONE, False
        self._machine.replicas.remove(self)
        self._gone.set()
        self.say(EventName.STOPPED, reason="drained")


class Machine:
    """A host."""

    def __init__(self):
        self.replicas = []
        self.refusals = 0
        self.slow = None
        self._numbers = itertools.count(1)

    async def start(self, deployment, sink, devices=()):
        if self.slow is not None:
            await self.slow.wait()
        if self.refusals:
            self.refusals -= 1
            raise Unavailable("No process can be started.")
        replica = Replica(self, f"{deployment.name}-{next(self._numbers)}", deployment, sink, devices)
        self.replicas.append(replica)
        return replica


def of_replicas(condition):
    """A rule about one of the replicas of which `condition` is true; where there is none, it is no rule."""

    def decorate(act):
        def chosen(self, data):
            act(self, data.draw(st.sampled_from([r for r in self.host.replicas if condition(r)])))

        chosen.__name__ = act.__name__
        return precondition(lambda self: any(map(condition, self.host.replicas)))(rule(data=st.data())(chosen))

    return decorate


class Grants(RuleBasedStateMachine):
    calls = Bundle("calls")

    @initialize(
        gpus=st.integers(1, 2),
        needs=st.lists(
            st.tuples(st.sampled_from((0.5, 1, 2)), st.sampled_from((0, 0, 1)), st.sampled_from((0, 30))),
            min_size=2,
            max_size=3,
        ),
    )
    def begin(self, gpus, needs):
        self.loop = PatientLoop()
        asyncio.set_event_loop(self.loop)
        self.devices = [Device(f"GPU-{n}", "NVIDIA L4", MEMORY) for n in range(gpus)]
        self.host = Machine()
        self.gpus = Gpus(Inventory(tuple(self.devices)), self.loop.time)
        self.revisions = itertools.count(1)
        self.needs = [(min(count, gpus), least, park) for count, least, park in needs]
        self.fleets = []
        for n in range(len(self.needs)):
            self.fleets.append(Fleet(self.host, self.deployment(n), gpus=self.gpus, clock=self.loop.time))
            self.run(lambda fleet: fleet.prepared(fleet.deployment, None, initial=0), self.fleets[-1])
        self.releases = {}

    def deployment(self, n):
        count, least, park = self.needs[n]
        scale = {"min": least, "max": 2, "in_flight": 1, "park": park, "idle": 100}
        spec = parse_spec({"gpu": {"count": count}, "scale": scale, "limits": {"start_timeout": 50}}, {})
        return Deployment(f"f{n}", "ns", str(next(self.revisions)), f"f{n}", spec)

    def run(self, what=None, *arguments):
        """Do it on the loop, and let everything happen that follows by itself."""

        async def turn():
            if what is not None:
                what(*arguments)
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turn())

    # What callers do ------------------------------------------------------------------------------

    @rule(target=calls, n=st.integers(0, 2))
    def call(self, n):
        if n >= len(self.fleets):
            return multiple()
        over = asyncio.Event()

        async def request():
            with suppress(AdapterError):
                async with self.fleets[n].slot():
                    await over.wait()

        task = self.loop.create_task(request())
        self.releases[task] = over
        self.run()
        return task

    @rule(call=calls)
    def answer(self, call):
        self.run(self.releases[call].set)

    @rule(call=calls)
    def leave(self, call):
        self.run(call.cancel)

    # What replicas do -----------------------------------------------------------------------------

    @of_replicas(lambda r: r.resume_asked or r.state is ReplicaState.STARTING)
    def serve(self, replica):
        self.run(replica.serve)

    @of_replicas(lambda r: r.park_asked and r.state in (ReplicaState.SERVING, ReplicaState.STOPPING))
    def park(self, replica):
        self.run(replica.now_parked)

    @of_replicas(lambda r: r.park_asked)
    def forget_to_park(self, replica):
        replica.park_asked = False

    @of_replicas(lambda r: r.state is ReplicaState.STOPPING)
    def stop(self, replica):
        self.run(replica.end)

    @of_replicas(lambda _: True)
    def die(self, replica):
        self.run(replica.end)

    @of_replicas(lambda r: r.state in (ReplicaState.SERVING, ReplicaState.PARKED))
    def model_exits(self, replica):
        replica.state, replica.resume_asked = ReplicaState.STARTING, False
        self.run(lambda: replica.say(EventName.MODEL_EXITED, reason="killed"))

    @of_replicas(lambda r: r.state is ReplicaState.STARTING)
    def fail(self, replica):
        self.run(lambda: replica.say(EventName.FAILED, code="load-raised", reason="no", record=RECORD))

    # What the host and the operator do --------------------------------------------------------------

    @rule()
    def refuse_a_start(self):
        self.host.refusals += 1

    @rule()
    def be_slow(self):
        if self.host.slow is None:
            self.host.slow = asyncio.Event()
        else:
            self.run(self.host.slow.set)
            self.host.slow = None

    @rule(n=st.integers(0, 2), replicas=st.integers(0, 2))
    def scale(self, n, replicas):
        if n < len(self.fleets):
            self.run(self.fleets[n].scale, replicas)

    @rule(n=st.integers(0, 2), initial=st.integers(0, 1))
    def deploy(self, n, initial):
        if n < len(self.fleets):
            deployment = self.deployment(n)
            self.run(self.fleets[n].update, deployment)
            self.run(lambda: self.fleets[n].prepared(deployment, None, initial=initial))

    @rule(seconds=st.sampled_from((1, 5, 31, 60)))
    def wait(self, seconds):
        for _ in range(seconds):
            self.loop.now_s += 1
            self.run()

    # What is always so ------------------------------------------------------------------------------

    @invariant()
    def no_gpu_is_over_committed(self):
        for device in getattr(self, "devices", ()):
            used = [r for r in self.host.replicas if r.holds and device.uuid in r.devices]
            assert (
                sum(r.deployment.spec.gpus * MEMORY if r.deployment.spec.gpus < 1 else MEMORY for r in used) <= MEMORY
            )

    @invariant()
    def grants_are_the_claims_of_living_replicas(self):
        if not hasattr(self, "gpus"):
            return
        starting = sum(fleet._pending for fleet in self.fleets)
        for row in self.gpus.rows():
            there = {r.id for r in self.host.replicas if row["uuid"] in r.devices}
            holders = {h["replica"] for h in row["holders"] if not h["replica"].endswith("(new)")}
            new = [h for h in row["holders"] if h["replica"].endswith("(new)")]
            assert holders == {r.id for r in self.host.replicas if r.id in there and r.holds}
            assert {h["replica"] for h in row["parked"]} == there - holders
            if self.host.slow is None:
                assert not new
            else:
                assert len(new) <= starting + len(self.fleets)  # also those of the next revisions

    @invariant()
    def nobody_waits_for_what_nobody_wants(self):
        for fleet in getattr(self, "fleets", ()):
            waiting = self.gpus.waiting().count(fleet.deployment.key)
            assert waiting <= len(fleet._claims.asks)

    @invariant()
    def who_is_woken_has_its_gpu(self):
        for fleet in getattr(self, "fleets", ()):
            for member in fleet.members.values():
                assert member.grant.is_held or member.asleep or member.state is ReplicaState.STOPPING

    def everybody_gets_a_turn(self):
        """Whatever has happened: when requests end and replicas do as they are asked, each function is served."""
        self.host.refusals = 0
        for over in self.releases.values():
            self.run(over.set)
        for n in range(len(self.fleets)):
            served = []

            async def request(fleet, served=served):
                while not served:
                    with suppress(AdapterError):  # a back-off, of what went wrong before
                        async with fleet.slot():
                            served.append(fleet)
                    await asyncio.sleep(1)

            task = self.loop.create_task(request(self.fleets[n]))
            for _ in range(300):
                self.behave()
            assert served, f"f{n} was never served"
            task.cancel()

    def behave(self):
        """A second of a world in which all goes well."""
        self.loop.now_s += 1
        self.run()
        for replica in list(self.host.replicas):
            if replica.state is ReplicaState.STOPPING:
                self.run(replica.end)
            elif replica.resume_asked or replica.state is ReplicaState.STARTING:
                self.run(replica.serve)
            elif replica.park_asked and not any(
                m.in_flight for f in self.fleets for m in f.members.values() if m.replica is replica
            ):
                self.run(replica.now_parked)

    def teardown(self):
        if not hasattr(self, "loop"):
            return
        if self.host.slow is not None:
            self.run(self.host.slow.set)
            self.host.slow = None
        if not any(least for _, least, _ in self.needs):  # else somebody may hold his minimum for ever
            self.everybody_gets_a_turn()
        closing = [self.loop.create_task(fleet.close()) for fleet in self.fleets]
        self.run()
        for replica in list(self.host.replicas):
            self.run(replica.end)
        for call in self.releases:
            call.cancel()
        self.loop.run_until_complete(asyncio.wait(closing, timeout=0))
        assert all(task.done() and task.exception() is None for task in closing)
        self.run()
        assert self.gpus.waiting() == []
        assert all(row["free_bytes"] == MEMORY and not row["parked"] for row in self.gpus.rows())
        self.loop.close()
        asyncio.set_event_loop(None)


TestGrants = Grants.TestCase
TestGrants.settings = settings(max_examples=100, stateful_step_count=40)
