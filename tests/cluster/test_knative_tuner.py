"""The tuner on a real Knative: its annotations reach what scales, no Revision appears, and what users set stays."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager, suppress

import pytest

from adapter.cluster.api import Api
from adapter.cluster.credentials import Credentials
from adapter.errors import AdapterError, Unavailable
from adapter.knative.autoscaling import MIN_SCALE, RETENTION, WINDOW, Defaults
from adapter.knative.tuner import Tuner, autoscalers_of, revisions_of
from adapter.ledger.traffic import LedgerTraffic
from adapter.policy.activity import Activity
from adapter.records import Rung

S = 10**9
WAIT_S = 90
REVISIONS, AUTOSCALERS = "revisions.serving.knative.dev", "podautoscalers.autoscaling.internal.knative.dev"


def service(namespace, image, *, template=None, env="1"):
    """It says that it needs a GPU; no webhook is there that would give it one."""
    container = {"image": image, "ports": [{"containerPort": 8080}], "env": [{"name": "ROUND", "value": env}]}
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "f", "namespace": namespace},
        "spec": {
            "template": {
                "metadata": {"annotations": {"gpufn.dev/gpu": "1", **(template or {})}},
                "spec": {"containers": [container]},
            }
        },
    }


def deploy(cluster, namespace, image, revision="f-00001", **more):
    cluster.apply([service(namespace, image, **more)])
    cluster.kubectl("wait", f"{REVISIONS}/{revision}", "-n", namespace, "--for=create", f"--timeout={WAIT_S}s")
    for name in (f"{REVISIONS}/{revision}", "services.serving.knative.dev/f"):
        cluster.kubectl("wait", name, "-n", namespace, "--for=condition=Ready", f"--timeout={WAIT_S}s")


def annotations(cluster, namespace, name="f-00001"):
    """Where this Knative takes them from; on the Revision they would be in its pods."""
    found = cluster.get(AUTOSCALERS, name, "-n", namespace)["metadata"].get("annotations", {})
    return {key: found[key] for key in (WINDOW, RETENTION, MIN_SCALE) if key in found}


def what_runs(cluster, namespace):
    """All that a rollout would change."""
    revisions = cluster.get(REVISIONS, "-n", namespace)["items"]
    deployments = cluster.get("deployments", "-n", namespace)["items"]
    return (
        sorted(item["metadata"]["name"] for item in revisions),
        [(d["metadata"]["name"], json.dumps(d["spec"]["template"], sort_keys=True)) for d in deployments],
    )


class Told:
    """A ledger that says what it is told to say of one function; None: it is down."""

    def __init__(self, namespace, busy_s=(), wake_s=5.0):
        """`busy_s`: seconds before now."""
        now_ns = time.time_ns()
        busy = tuple((now_ns - begin * S, now_ns - end * S) for begin, end in busy_s)
        self.says = [Activity("f", namespace, busy, {Rung.LOAD: (wake_s,) * 3})]

    async def ask(self, _since_ns):
        if self.says is None:
            raise Unavailable("It is down.")
        return self.says


EVERY_40_S = [(1000 - 50 * n, 990 - 50 * n) for n in range(20)]


@asynccontextmanager
async def tuning(cluster, told):
    """A tuner whose caches are current."""
    async with Api(Credentials(cluster.kubeconfig)) as api:
        revisions, autoscalers = revisions_of(api), autoscalers_of(api)
        tuner = Tuner(api, revisions, autoscalers, LedgerTraffic(told.ask), defaults=Defaults, nodes=tuple)
        running = asyncio.gather(revisions.run(), autoscalers.run())
        try:
            await asyncio.wait_for(asyncio.gather(revisions.synced.wait(), autoscalers.synced.wait()), WAIT_S)
            yield tuner
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


def tune(cluster, told, namespace, name="f-00001"):
    """Once; returns when it looks again."""

    async def once():
        async with tuning(cluster, told) as tuner:
            return await tuner.reconcile(f"{namespace}/{name}")

    return asyncio.run(once())


def test_a_keep_alive_reaches_what_scales_and_nothing_is_rolled_out(cluster, namespace, echo_image):
    deploy(cluster, namespace, echo_image)
    before = what_runs(cluster, namespace)
    assert tune(cluster, Told(namespace, EVERY_40_S), namespace)
    window_s = int(annotations(cluster, namespace)[WINDOW][:-1])
    assert 40 <= window_s < 60
    cluster.kubectl(  # what its autoscaler decides by
        "wait", "metrics.autoscaling.internal.knative.dev/f-00001", "-n", namespace,
        f"--for=jsonpath={{.spec.stableWindow}}={window_s * S}", f"--timeout={WAIT_S}s",
    )  # fmt: skip
    assert what_runs(cluster, namespace) == before
    assert annotations(cluster, namespace)[WINDOW] == f"{window_s}s"


def test_what_was_set_goes_again(cluster, namespace, echo_image):
    deploy(cluster, namespace, echo_image)
    tune(cluster, Told(namespace, EVERY_40_S), namespace)
    tune(cluster, Told(namespace, [(2000 - 90 * n, 1990 - 90 * n) for n in range(20)], wake_s=12.0), namespace)
    assert set(annotations(cluster, namespace)) == {RETENTION}


@pytest.mark.parametrize("theirs", [{RETENTION: "70s"}, {MIN_SCALE: "1"}])
def test_what_the_template_says_stays(cluster, namespace, echo_image, theirs):
    deploy(cluster, namespace, echo_image, template=theirs)
    tune(cluster, Told(namespace, EVERY_40_S), namespace)
    assert annotations(cluster, namespace) == theirs


def test_what_a_user_writes_over_ours_is_theirs_from_then_on(cluster, namespace, echo_image):
    deploy(cluster, namespace, echo_image)
    told = Told(namespace, EVERY_40_S)
    tune(cluster, told, namespace)
    theirs = {WINDOW: "33s", RETENTION: "9s"}
    words = [f"{key}={text}" for key, text in theirs.items()]
    cluster.kubectl("annotate", "--overwrite", AUTOSCALERS, "f-00001", "-n", namespace, *words)
    tune(cluster, told, namespace)
    assert annotations(cluster, namespace) == theirs


def test_a_new_revision_is_tuned_as_well_and_the_old_one_let_go(cluster, namespace, echo_image):
    told = Told(namespace, EVERY_40_S)
    deploy(cluster, namespace, echo_image)
    tune(cluster, told, namespace)
    deploy(cluster, namespace, echo_image, revision="f-00002", env="2")
    cluster.kubectl(
        "wait", f"{REVISIONS}/f-00001", "-n", namespace,
        r"--for=jsonpath={.metadata.labels.serving\.knative\.dev/routingState}=reserve", f"--timeout={WAIT_S}s",
    )  # fmt: skip
    assert tune(cluster, told, namespace) is None
    tune(cluster, told, namespace, "f-00002")
    assert annotations(cluster, namespace) == {}
    assert WINDOW in annotations(cluster, namespace, "f-00002")


def test_while_the_ledger_is_down_what_is_set_stays(cluster, namespace, echo_image):
    deploy(cluster, namespace, echo_image)
    told = Told(namespace, EVERY_40_S)
    tune(cluster, told, namespace)
    before = annotations(cluster, namespace)
    told.says = None
    tune(cluster, told, namespace)
    assert annotations(cluster, namespace) == before


def until_wanted(cluster, namespace, count):
    name, wanted = "deployment/f-00001-deployment", f"--for=jsonpath={{.spec.replicas}}={count}"
    cluster.kubectl("wait", name, "-n", namespace, wanted, "--timeout=150s", timeout_s=160)


def test_more_than_an_hour_is_held_from_zero_and_let_go_by_knative_itself(cluster, namespace, echo_image):
    deploy(cluster, namespace, echo_image, template={WINDOW: "6s", "gpufn.dev/idle": "3h"})
    until_wanted(cluster, namespace, 0)
    tune(cluster, Told(namespace, [(7300, 7200)]), namespace)
    assert annotations(cluster, namespace)[MIN_SCALE] == "1"
    until_wanted(cluster, namespace, 1)
    tune(cluster, Told(namespace, [(11000, 10900)]), namespace)
    assert MIN_SCALE not in annotations(cluster, namespace)


def test_what_was_deleted_is_not_made_again(cluster, namespace, echo_image):
    deploy(cluster, namespace, echo_image)

    async def late():
        async with tuning(cluster, Told(namespace, EVERY_40_S)) as tuner:
            key = f"{namespace}/f-00001"
            known = tuner._revisions.get(key), tuner._autoscalers.get(key)
            await asyncio.to_thread(cluster.kubectl, "delete", "services.serving.knative.dev", "f", "-n", namespace)
            await asyncio.to_thread(cluster.kubectl, "wait", AUTOSCALERS, "f-00001", "-n", namespace, "--for=delete")
            tuner._revisions, tuner._autoscalers = {key: known[0]}, {key: known[1]}
            with pytest.raises(AdapterError):
                await tuner.reconcile(key)

    asyncio.run(late())
    assert cluster.get(AUTOSCALERS, "-n", namespace)["items"] == []
