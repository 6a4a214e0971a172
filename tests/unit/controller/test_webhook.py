import asyncio
import io
import json

import aiohttp

from adapter.cluster.health import new_registry
from adapter.cluster.serving import served
from adapter.controller import webhook
from adapter.controller.admission import Admission
from adapter.controller.metrics import AdmissionMetrics
from adapter.controller.webhook import LARGE_BYTES, LARGE_REVIEWS, REVIEW_LIMIT_BYTES, review_app
from tests.fakes.cluster_objects import View, function_pod, namespace, node

VIEW = (node("n1"), namespace("team"))


def play(scene, view=None):
    async def played():
        registry = new_registry()
        app = review_app(Admission(view or View(*VIEW)), AdmissionMetrics(registry))
        async with served(app, 0, address="127.0.0.1") as port, aiohttp.ClientSession() as session:

            async def ask(body, path="/pods", method="POST"):
                async with session.request(
                    method,
                    f"http://127.0.0.1:{port}{path}",
                    data=io.BytesIO(body) if isinstance(body, bytes) and body else body,
                ) as response:
                    return response.status, await response.text()

            def counted(outcome, code="", kind="pods"):
                labels = {"kind": kind, "outcome": outcome, "code": code}
                return registry.get_sample_value("gpufn_admission_reviews_total", labels)

            await asyncio.wait_for(scene(ask, counted), 30)

    asyncio.run(played())


def body_of(value, uid="u-1", **fields):
    request = {"uid": uid, "namespace": "team", "operation": "CREATE", "object": value, **fields}
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}).encode()


def test_a_review_is_answered_and_counted():
    async def scene(ask, counted):
        status, text = await ask(body_of(function_pod()))
        assert status == 200
        assert json.loads(text)["response"]["patch"]
        assert counted("patched") == 1
        assert (await ask(body_of(function_pod(annotations={"gpufn.dev/idle": "never"}))))[0] == 200
        assert counted("refused", "bad-value") == 1

    play(scene)


def test_garbage_is_refused_and_the_next_review_is_answered():
    async def scene(ask, counted):
        for garbage in (b"", b"garbage", b"{}", b"[" * 100_000, body_of("no object"), body_of({}, uid="")):
            status, text = await ask(garbage)
            assert (status, json.loads(text)["error"]["code"]) == (400, "bad-review")
        assert counted("unreadable", "bad-review") == 6
        assert (await ask(body_of(function_pod())))[0] == 200

    play(scene)


def test_a_pod_of_three_megabytes_is_answered():
    async def scene(ask, counted):
        pod = function_pod()
        pod["spec"]["containers"][0]["env"] = [{"name": f"V{number}", "value": "x" * 1000} for number in range(3000)]
        status, text = await ask(body_of(pod))
        assert status == 200
        assert json.loads(text)["response"]["patch"]

    play(scene)


def test_what_is_longer_than_any_review_is_refused():
    async def scene(ask, counted):
        assert (await ask(b"x" * (REVIEW_LIMIT_BYTES + 1)))[0] == 413
        assert counted("unreadable", "too-large") == 1

    play(scene)


def test_nothing_else_is_served():
    async def scene(ask, counted):
        assert (await ask(b"", "/other"))[0] == 404
        assert (await ask(None, method="GET"))[0] == 405

    play(scene)


async def _never_ending():
    yield b"{"
    await asyncio.Event().wait()


def test_large_bodies_are_read_a_few_at_a_time_and_small_ones_do_not_wait_for_them(monkeypatch):
    monkeypatch.setattr(webhook, "_READ_LIMIT_S", 60)

    async def scene(ask, counted):
        slow = [asyncio.create_task(ask(_never_ending())) for _ in range(LARGE_REVIEWS)]
        large = asyncio.create_task(ask(body_of(function_pod(annotations={"x": "y" * LARGE_BYTES}))))
        for _ in range(20):
            assert (await ask(body_of(function_pod())))[0] == 200
        assert not large.done()
        for each in slow:
            each.cancel()
        assert (await large)[0] == 200

    play(scene)


def test_who_sends_slowly_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(webhook, "_READ_LIMIT_S", 0.01)

    async def scene(ask, counted):
        assert (await ask(_never_ending()))[0] == 408
        assert counted("unreadable", "too-slow") == 1

    play(scene)
