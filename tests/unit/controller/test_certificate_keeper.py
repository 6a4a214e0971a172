import asyncio
import base64
import datetime as dt

import pytest
from hypothesis import given, settings, strategies as st

from adapter.cluster.certificates import signed_by, why_not
from adapter.cluster.resources import CONFIG_MAPS, MUTATING_WEBHOOKS, SECRETS
from adapter.controller.certificate_keeper import CertificateKeeper, _pair
from adapter.errors import AdapterError
from adapter.keys import AGENT_NAMESPACE, SYSTEM_NAMESPACE
from tests.fakes.api_server import FakeApiServer, hang, status

BEGIN = dt.datetime(2026, 11, 25, tzinfo=dt.timezone.utc)
DAY = dt.timedelta(days=1)
CA = SECRETS.path(SYSTEM_NAMESPACE, "gpufn-ca")
SERVING = [SECRETS.path(SYSTEM_NAMESPACE, name) for name in ("gpufn-webhook-tls", "gpufn-ledger-tls")]
TRUSTED = [CONFIG_MAPS.path(namespace, "gpufn-ca") for namespace in (SYSTEM_NAMESPACE, AGENT_NAMESPACE)]
WEBHOOKS = MUTATING_WEBHOOKS.path(name="gpufn")


class Scene:
    def __init__(self, server, api):
        self.server, self.api, self.now = server, api, BEGIN
        self.keeper = CertificateKeeper(api, lambda: self.now)

    async def look(self, after=dt.timedelta(0)):
        self.now += after
        return await self.keeper.reconcile("gpufn")

    def secret(self, path):
        return self.server.objects[path]["data"]

    def bundles(self):
        """As everybody sees them."""
        webhooks = self.server.objects[WEBHOOKS]["webhooks"]
        patched = [base64.b64decode(each["clientConfig"]["caBundle"]).decode() for each in webhooks]
        return [self.server.objects[path]["data"]["ca.crt"] for path in TRUSTED] + patched

    def assert_trusted(self):
        """Whatever is served now, everybody knows by the bundle that they have now."""
        for path in SERVING:
            pair = _pair({"data": self.secret(path)}, "tls.crt", "tls.key")
            assert why_not(pair, self.now) == ""
            assert all(signed_by(pair.certificate, bundle.encode()) for bundle in self.bundles())


def play(act):
    async def played():
        server = FakeApiServer()
        async with server.serving(), server.client() as api:
            await server.put(
                WEBHOOKS,
                {
                    "webhooks": [
                        {"name": f"{n}.gpufn.dev", "clientConfig": {"service": {}}} for n in ("pods", "services")
                    ]
                },
            )
            await asyncio.wait_for(act(Scene(server, api)), 60)

    asyncio.run(played())


def test_on_a_fresh_cluster_everything_is_made_and_trusted():
    async def act(scene):
        await scene.look()
        scene.assert_trusted()
        assert scene.server.objects[SERVING[0]]["type"] == "kubernetes.io/tls"

    play(act)


def test_a_second_look_writes_nothing():
    async def act(scene):
        await scene.look()
        before = dict(scene.server.objects)
        await scene.look(dt.timedelta(minutes=2))
        assert scene.secret(CA) == before[CA]["data"]
        assert [scene.secret(path) for path in SERVING] == [before[path]["data"] for path in SERVING]

    play(act)


def test_a_webhook_that_is_added_is_looked_at_at_once():
    async def act(scene):
        due: asyncio.Queue[str] = asyncio.Queue()
        scene.keeper.start(due.put_nowait)
        running = asyncio.ensure_future(scene.keeper.unknown.run())
        try:
            assert await due.get() == "gpufn"  # of those that are there
            await scene.look()
            scene.assert_trusted()
            added = {"name": "added.gpufn.dev", "clientConfig": {"service": {}}}
            there = scene.server.objects[WEBHOOKS]
            await scene.server.put(WEBHOOKS, {**there, "webhooks": [*there["webhooks"], added]})
            assert await due.get() == "gpufn"
            await scene.look()
            scene.assert_trusted()
        finally:
            running.cancel()

    play(act)


def test_serving_certificates_are_renewed_at_two_thirds_of_their_life():
    async def act(scene):
        await scene.look()
        first = scene.secret(SERVING[0])
        await scene.look(59 * DAY)
        assert scene.secret(SERVING[0]) == first
        await scene.look(2 * DAY)
        assert scene.secret(SERVING[0]) != first
        scene.assert_trusted()

    play(act)


def test_a_new_authority_signs_nothing_anew_before_all_have_its_bundle():
    async def act(scene):
        for days in (0, 61, 61, 61, 61):  # two thirds of the authority's life, and of the certificates' too
            old = scene.server.objects.get(CA, {}).get("data", {}).get("ca.crt")
            due = scene.server.objects.get(SERVING[0], {}).get("data")
            await scene.look(days * DAY)
        assert scene.secret(CA)["ca.crt"] != old
        assert scene.secret(SERVING[0]) == due
        scene.assert_trusted()
        await scene.look(dt.timedelta(minutes=11))
        assert scene.secret(SERVING[0]) != due
        scene.assert_trusted()

    play(act)


def test_in_years_nobody_ever_meets_a_certificate_that_they_do_not_know():
    async def act(scene):
        authorities = set()
        for _ in range(120):
            await scene.look(9 * DAY)
            scene.assert_trusted()
            authorities.add(scene.secret(CA)["ca.crt"])
        assert len(authorities) == 5
        assert max(bundle.count("BEGIN") for bundle in scene.bundles()) == 2

    play(act)


@pytest.mark.parametrize("path", [CA, *SERVING])
@pytest.mark.parametrize("damage", [{}, {"tls.crt": "!", "ca.crt": "!"}, {"tls.key": "eA==", "ca.key": "eA=="}])
def test_what_somebody_removed_or_damaged_is_made_anew(path, damage):
    async def act(scene):
        await scene.look()
        if damage:
            scene.server.objects[path]["data"].update(damage)
        else:
            await scene.server.remove(path)
        await scene.look()
        scene.assert_trusted()

    play(act)


def test_a_configuration_that_is_applied_anew_gets_its_bundle_back():
    async def act(scene):
        await scene.look()
        await scene.server.put(WEBHOOKS, {"webhooks": [{"name": "new.gpufn.dev", "clientConfig": {}}]})
        await scene.look()
        scene.assert_trusted()

    play(act)


def test_a_cluster_without_webhooks_or_without_agents_has_its_certificates_all_the_same():
    async def act(scene):
        await scene.server.remove(WEBHOOKS)
        scene.server.next(status(404, "NotFound"), lambda request: AGENT_NAMESPACE in request.path)
        await scene.look()
        assert all(path in scene.server.objects for path in (*SERVING, TRUSTED[0]))

    play(act)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 12), max_size=4))
def test_killed_at_any_request_the_next_look_goes_on_from_there(kills):
    async def act(scene):
        for index in kills:
            asked = 0

            def strikes(_, index=index):
                nonlocal asked
                asked += 1
                return asked > index

            scene.server.next(hang, strikes)
            with pytest.raises((asyncio.TimeoutError, AdapterError)):
                await asyncio.wait_for(scene.look(244 * DAY), 0.05)
                raise asyncio.TimeoutError
            scene.server._next.clear()
        await scene.look()
        scene.assert_trusted()

    play(act)


def test_what_another_leader_wrote_meanwhile_is_not_overwritten():
    async def act(scene):
        await scene.look()
        secret = dict(scene.server.objects[CA])

        async def raced(request):
            await scene.server.put(CA, secret)
            return await scene.server._serve(request)

        scene.server.next(raced, lambda request: request.method == "PUT")
        with pytest.raises(AdapterError) as caught:
            await scene.look(300 * DAY)
        assert caught.value.code == "conflict"
        assert scene.secret(CA) == secret["data"]

    play(act)
