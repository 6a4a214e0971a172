import asyncio
import copy
import itertools
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings, strategies as st

from adapter.cluster.election import Election
from adapter.errors import Conflict, NotFound, Timeout, Unavailable
from tests.fakes.virtual_time import in_virtual_time


class Leases:
    """One lease behind an API that does as `fault` says: seconds until a call arrives, and until its answer does."""

    def __init__(self, fault=lambda: (0.0, 0.0)) -> None:
        self.lease = None
        self.fault = fault
        self.down = False
        self._version = itertools.count(1)

    def through(self, fault) -> "Leases":
        """The same lease through a network of its own."""
        other = Leases(fault)
        other._write, other._read = self._write, self._read
        return other

    async def _call(self, patience, act):
        there_s, back_s = self.fault()

        async def carried():
            await asyncio.sleep(there_s)
            if self.down:
                raise Unavailable("It is down.", code="api-unreachable")
            result = act()  # arrives although nobody may wait for it any more
            await asyncio.sleep(back_s)
            return result

        call = asyncio.ensure_future(carried())
        call.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.wait_for(asyncio.shield(call), patience.total_s)
        except asyncio.TimeoutError:
            raise Timeout("It hangs.", code="api-timed-out") from None

    async def get(self, path, *, patience):
        return await self._call(patience, self._read)

    async def create(self, path, body, *, patience):
        return await self._call(patience, lambda: self._write(body, ""))

    async def replace(self, path, body, *, patience):
        version = body["metadata"]["resourceVersion"]
        return await self._call(patience, lambda: self._write(body, version))

    def _read(self):
        if self.lease is None:
            raise NotFound("It is not there.")
        return copy.deepcopy(self.lease)

    def _write(self, body, version):
        if version != (self.lease["metadata"]["resourceVersion"] if self.lease else ""):
            raise Conflict("Somebody else has written.")
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(next(self._version))


@dataclass
class Replica:
    election: Election
    task: asyncio.Task
    led: list


def replica(leases, name) -> Replica:
    led = []

    async def lead():
        led.append(asyncio.get_running_loop().time())
        await asyncio.Event().wait()

    clock = asyncio.get_running_loop().time
    election = Election(leases, "lease", name, clock=clock)
    return Replica(election, asyncio.ensure_future(election.run(lead)), led)


def test_one_leads_and_keeps_the_lease():
    async def scene():
        leases = Leases()
        replicas = [replica(leases, name) for name in "ab"]
        await asyncio.sleep(600)
        assert sorted(len(each.led) for each in replicas) == [0, 1]
        assert leases.lease["spec"]["leaseTransitions"] == 0

    in_virtual_time(scene())


def test_a_leader_that_stops_gives_the_lease_back_after_its_work_has_ended():
    async def scene():
        leases = Leases()
        first = replica(leases, "a")
        await asyncio.sleep(1)
        second = replica(leases, "b")
        await asyncio.sleep(1)
        first.task.cancel()
        stopped_at = asyncio.get_running_loop().time()
        await asyncio.sleep(10)
        assert second.led[0] - stopped_at <= 3
        assert first.election.left_s() == 0

    in_virtual_time(scene())


def test_a_leader_that_dies_is_followed_when_its_lease_has_run_out():
    async def scene():
        leases = Leases()
        first = replica(leases, "a")
        await asyncio.sleep(1)
        second = replica(leases, "b")
        await asyncio.sleep(5)
        lease = copy.deepcopy(leases.lease)
        first.task.cancel()
        await asyncio.wait([first.task])
        leases.lease = lease  # as if it had been killed
        died_at = asyncio.get_running_loop().time()
        await asyncio.sleep(40)
        assert 10 <= second.led[0] - died_at <= 20

    in_virtual_time(scene())


def test_a_leader_that_cannot_renew_leads_no_more_before_another_could():
    async def scene():
        leases = Leases()
        leader = replica(leases, "a")
        await asyncio.sleep(3)
        leases.down = True
        assert leader.election.left_s() > 0
        await asyncio.sleep(10)
        assert leader.election.left_s() == 0
        leases.down = False
        await asyncio.sleep(30)
        assert len(leader.led) == 2

    in_virtual_time(scene())


def test_work_that_fails_ends_the_election_and_gives_the_lease_back():
    async def scene():
        leases = Leases()

        async def lead():
            await asyncio.sleep(5)
            raise ValueError("it broke")

        election = Election(leases, "lease", "a", clock=asyncio.get_running_loop().time)
        with pytest.raises(ValueError, match="it broke"):
            await election.run(lead)
        assert leases.lease["spec"]["holderIdentity"] == ""

    in_virtual_time(scene())


def test_a_process_that_was_stopped_for_a_while_leads_no_more_before_its_first_step():
    async def scene():
        leases = Leases()
        leader = replica(leases, "a")
        await asyncio.sleep(3)
        asyncio.get_running_loop().now += 60  # no step was taken meanwhile
        assert leader.election.left_s() == 0

    in_virtual_time(scene())


OUTAGES = st.lists(
    st.tuples(
        st.floats(0, 120),  # begins
        st.floats(0, 60),  # seconds
        st.booleans(),  # calls do not arrive until it ends; else they do, and their answers do not
    ),
    max_size=4,
)


@settings(max_examples=30)
@given(st.tuples(OUTAGES, OUTAGES))
@example(([(5.0, 40.0, False)], []))
@example(([(5.0, 40.0, True)], []))
def test_two_never_lead_at_once_whatever_the_network_does(outages):
    async def scene():
        begun, now = asyncio.get_running_loop().time(), asyncio.get_running_loop().time
        shared = Leases()

        def of(mine):
            def fault():
                at = now() - begun
                ends = [
                    (start + lasts_s - at, there) for start, lasts_s, there in mine if start <= at < start + lasts_s
                ]
                return max(((s, 0.0) if there else (0.0, s) for s, there in ends), default=(0.0, 0.0))

            return shared.through(fault)

        replicas = [replica(of(mine), name) for mine, name in zip(outages, "ab", strict=True)]
        for _ in range(400):
            await asyncio.sleep(0.5)
            assert sum(each.election.left_s() > 0 for each in replicas) <= 1
        assert any(each.led for each in replicas)

    in_virtual_time(scene())
