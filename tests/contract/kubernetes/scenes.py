"""What our client relies on of a Kubernetes API: played to the fake here, and in tests/cluster to the real one.

A class that inherits `ApiScenes` has a method `play(scene)`, which runs ``scene(api, namespace)``, with a namespace of
its own, against its server.
"""

from __future__ import annotations

import asyncio

import pytest

from adapter.cluster.api import GONE
from adapter.cluster.election import Election
from adapter.cluster.events import EventRecorder, reference_to
from adapter.cluster.informer import Informer, Rhythm
from adapter.cluster.resources import CONFIG_MAPS, EVENTS, LEASES
from adapter.errors import ConfigError, Conflict, NotFound, Unavailable
from tests.fakes.replicas import until

RHYTHM = Rhythm(first_pause_s=0.01, pause_limit_s=0.1)


def body(name, namespace, x="1"):
    return CONFIG_MAPS.body(name, namespace, data={"x": x})


def data(value):
    return (value.get("data") or {}).get("x")


class ApiScenes:
    def play(self, scene):
        raise NotImplementedError

    def test_an_object_is_made_read_and_removed(self):
        async def scene(api, namespace):
            path = CONFIG_MAPS.path(namespace, "a")
            made = await api.create(CONFIG_MAPS.path(namespace), body("a", namespace))
            assert data(await api.get(path)) == "1"
            with pytest.raises(Conflict) as caught:
                await api.create(CONFIG_MAPS.path(namespace), body("a", namespace))
            assert caught.value.code == "exists"
            with pytest.raises(Conflict):
                await api.delete(path, uid="another")
            assert await api.delete(path, uid=made["metadata"]["uid"])
            assert not await api.delete(path)
            with pytest.raises(NotFound):
                await api.get(path)

        self.play(scene)

    def test_what_was_read_before_somebody_wrote_replaces_nothing(self):
        async def scene(api, namespace):
            path = CONFIG_MAPS.path(namespace, "a")
            first = await api.create(CONFIG_MAPS.path(namespace), body("a", namespace))
            await api.replace(path, {**first, "data": {"x": "2"}})
            with pytest.raises(Conflict) as caught:
                await api.replace(path, {**first, "data": {"x": "3"}})
            assert caught.value.code == "conflict"
            assert data(await api.get(path)) == "2"

        self.play(scene)

    def test_patches_change_what_they_say(self):
        async def scene(api, namespace):
            path = CONFIG_MAPS.path(namespace, "a")
            await api.apply(path, body("a", namespace))
            await api.patch(path, {"data": {"y": "2"}})
            await api.patch(path, [{"op": "replace", "path": "/data/x", "value": "3"}])
            assert (await api.get(path))["data"] == {"x": "3", "y": "2"}
            with pytest.raises(ConfigError):
                await api.patch(path, [{"op": "test", "path": "/data/x", "value": "4"},
                                       {"op": "replace", "path": "/data/x", "value": "5"}])  # fmt: skip
            with pytest.raises(NotFound):
                await api.patch(CONFIG_MAPS.path(namespace, "none"), {"data": {}})

        self.play(scene)

    def test_a_long_list_comes_in_pages(self):
        async def scene(api, namespace):
            for number in range(7):
                await api.create(CONFIG_MAPS.path(namespace), body(f"m{number}", namespace))
            listing = await api.list(CONFIG_MAPS.path(namespace), data, page_items=3)
            assert listing.items.count("1") == 7
            assert listing.resource_version

        self.play(scene)

    def test_a_watch_says_what_happens_after_a_list(self):
        async def scene(api, namespace):
            path = CONFIG_MAPS.path(namespace, "a")
            listing = await api.list(CONFIG_MAPS.path(namespace), data)
            await api.create(CONFIG_MAPS.path(namespace), body("a", namespace))
            await api.patch(path, {"data": {"x": "2"}})
            await api.delete(path)
            watch = api.watch(CONFIG_MAPS.path(namespace), listing.resource_version, timeout_s=5, silence_s=20)
            heard = [(kind, data(value)) async for kind, value in watch if value["metadata"].get("name") == "a"]
            assert heard == [("ADDED", "1"), ("MODIFIED", "2"), ("DELETED", "2")]

        self.play(scene)

    def test_a_version_that_is_too_old_is_gone(self):
        async def scene(api, namespace):
            with pytest.raises(Unavailable) as caught:
                async for _ in api.watch(CONFIG_MAPS.path(namespace), "1", timeout_s=2, silence_s=20):
                    pass
            assert caught.value.code == GONE

        self.play(scene)

    def test_an_informer_follows(self):
        async def scene(api, namespace):
            path = CONFIG_MAPS.path(namespace, "a")
            informer = Informer(api, CONFIG_MAPS.path(namespace), data, rhythm=RHYTHM)
            running = asyncio.ensure_future(informer.run())
            await informer.synced.wait()
            await api.create(CONFIG_MAPS.path(namespace), body("a", namespace))
            await until(lambda: informer.get(f"{namespace}/a") == "1")
            await api.patch(path, {"data": {"x": "2"}})
            await until(lambda: informer.get(f"{namespace}/a") == "2")
            await api.delete(path)
            await until(lambda: informer.get(f"{namespace}/a") is None)
            running.cancel()

        self.play(scene)

    def test_a_lease_has_one_holder_who_gives_it_back(self):
        async def scene(api, namespace):
            led = []

            def stand(name):
                async def lead():
                    led.append(name)
                    await asyncio.Event().wait()

                return asyncio.ensure_future(Election(api, "lease", name, namespace=namespace).run(lead))

            first = stand("a")
            await until(lambda: led == ["a"])
            second = stand("b")
            holder = (await api.get(LEASES.path(namespace, "lease")))["spec"]["holderIdentity"]
            assert holder == "a"
            first.cancel()
            await until(lambda: led == ["a", "b"])
            second.cancel()
            await asyncio.wait([first, second])
            assert (await api.get(LEASES.path(namespace, "lease")))["spec"]["holderIdentity"] == ""

        self.play(scene)

    def test_an_event_is_said_and_counted(self):
        async def scene(api, namespace):
            now = [0.0]
            recorder = EventRecorder(api, "controller", lambda: now[0])
            about = reference_to(await api.create(CONFIG_MAPS.path(namespace), body("a", namespace)), kind="ConfigMap")
            for now[0] in (0.0, 400.0, 800.0):
                await recorder.say(about, "NoNodeFits", "None of 3 nodes fits.")
            [event] = (await api.list(EVENTS.path(namespace), lambda value: value)).items
            assert (event["note"], event["series"]["count"]) == ("None of 3 nodes fits.", 3)
            assert event["regarding"]["uid"] == about["uid"]

        self.play(scene)
