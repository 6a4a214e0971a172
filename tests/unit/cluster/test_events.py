import asyncio

from adapter.cluster.events import EventRecorder, reference_to
from adapter.cluster.resources import EVENTS
from tests.fakes.api_server import FakeApiServer

POD = reference_to({"metadata": {"namespace": "team", "name": "pod", "uid": "u1"}})


def play(scene):
    async def played():
        server, now = FakeApiServer(), [0.0]
        async with server.serving(), server.client() as api:
            await scene(server, EventRecorder(api, "controller", lambda: now[0]), now)

    asyncio.run(played())


def events(server):
    return [value for path, value in server.objects.items() if path.startswith(EVENTS.path("team"))]


def test_an_event_is_on_the_object_with_all_that_kubectl_shows():
    async def scene(server, recorder, now):
        await recorder.say(POD, "NoNodeFits", "None of 3 nodes fits.")
        [event] = events(server)
        assert event["regarding"] == POD
        assert (event["type"], event["reason"], event["note"]) == ("Warning", "NoNodeFits", "None of 3 nodes fits.")
        assert event["metadata"]["namespace"] == "team"

    play(scene)


def test_the_same_again_is_one_event_that_counts_and_not_each_time():
    async def scene(server, recorder, now):
        for now[0] in (0, 10, 299, 301, 400):
            await recorder.say(POD, "NoNodeFits", "None fits.")
        [event] = events(server)
        assert event["series"]["count"] == 2

    play(scene)


def test_what_several_find_at_once_is_one_event():
    async def scene(server, recorder, now):
        for now[0] in (0, 400):
            await asyncio.gather(*(recorder.say(POD, "NoNodeFits", "None fits.") for _ in range(4)))
        [event] = events(server)
        assert event["series"]["count"] == 2

    play(scene)


def test_what_could_not_be_said_is_tried_again():
    async def scene(server, recorder, now):
        gone = asyncio.create_task(recorder.say(POD, "NoNodeFits", "None fits."))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        server.objects.clear()
        await recorder.say(POD, "NoNodeFits", "None fits.")
        assert len(events(server)) == 1

    play(scene)


def test_something_else_is_another_event():
    async def scene(server, recorder, now):
        await recorder.say(POD, "NoNodeFits", "None of 3 fits.")
        await recorder.say(POD, "NoNodeFits", "None of 4 fits.")
        await recorder.say({**POD, "uid": "u2"}, "NoNodeFits", "None of 4 fits.")
        assert len(events(server)) == 3

    play(scene)


def test_what_kubernetes_has_forgotten_is_said_anew():
    async def scene(server, recorder, now):
        await recorder.say(POD, "NoNodeFits", "None fits.")
        server.objects.clear()
        now[0] = 4000
        await recorder.say(POD, "NoNodeFits", "None fits.")
        assert len(events(server)) == 1

    play(scene)


def test_a_long_name_is_cut_where_it_stays_a_name():
    async def scene(server, recorder, now):
        await recorder.say({**POD, "name": "n" * 198 + "-." + "m" * 50}, "NoNodeFits", "None fits.")
        assert events(server)[0]["metadata"]["name"].startswith("n" * 198 + ".")

    play(scene)


def test_a_message_is_no_longer_than_an_event_takes():
    async def scene(server, recorder, now):
        await recorder.say(POD, "NoNodeFits", "x" * 5000)
        assert len(events(server)[0]["note"]) == 1024

    play(scene)
