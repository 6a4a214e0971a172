"""A real Knative takes the templates that come out, adds its own defaults, and makes one Revision of them."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json

import jsonpatch

from adapter.cluster.api import Api, Pace
from adapter.cluster.credentials import Credentials
from adapter.cluster.resources import KNATIVE_SERVICES
from adapter.errors import ConfigError
from adapter.knative.autoscaling import MAX_SCALE, RETENTION, Defaults
from adapter.knative.service_patch import patch_service

ASKED = {
    "gpu": ("1", "0.5"),
    "max": ("3",),
    "min": ("0", "1"),
    "initial": ("0", "2"),
    "idle": ("0", "20s", "10m", "3h", "auto"),
    "in-flight": ("4",),
    "start-timeout": ("20m",),
    "exec-timeout": ("0", "5m"),
    "mig": ("1g.5gb",),
}
WAIT_S = 90


def service(namespace, image, asked, *, template=None, name=None, **spec):
    metadata = {"annotations": template or {}, **({"name": name} if name else {})}
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {
            "name": "f",
            "namespace": namespace,
            "annotations": {f"gpufn.dev/{key}": text for key, text in asked.items()},
        },
        "spec": {"template": {"metadata": metadata, "spec": {"containers": [{"image": image}], **spec}}},
    }


def admitted(new, old=None):
    patch = patch_service(new, old, namespace=new["metadata"]["namespace"], namespace_labels={}, defaults=Defaults())
    return jsonpatch.apply_patch(new, list(patch.operations))


def talk(cluster, conversation):
    """What `conversation` with the API server comes to."""

    async def held():
        async with Api(Credentials(cluster.kubeconfig), pace=Pace(1000, 1000)) as api:
            return await conversation(api)

    return asyncio.run(held())


async def would_be(api, value):
    """As Knative has it, with its own defaults; it is not made."""
    return await api.create(KNATIVE_SERVICES.path(value["metadata"]["namespace"]), value, dry_run=True)


def replace(cluster, value, *options):
    """Whatever Knative has written to it meanwhile: its status, and what follows from it."""
    metadata = {name: text for name, text in value["metadata"].items() if name != "resourceVersion"}
    whole = json.dumps({**value, "metadata": metadata})
    return json.loads(cluster.kubectl("replace", "-o", "json", "-f", "-", *options, stdin=whole))


def revisions(cluster, namespace):
    return sorted(
        item["metadata"]["name"] for item in cluster.get("revisions.serving.knative.dev", "-n", namespace)["items"]
    )


def create(cluster, namespace, value):
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(value))
    until_created(cluster, namespace, "f-00001" if "name" not in value["spec"]["template"]["metadata"] else "f-one")
    return cluster.get("services.serving.knative.dev", "f", "-n", namespace)


def until_created(cluster, namespace, revision):
    name = f"revisions.serving.knative.dev/{revision}"
    cluster.kubectl("wait", name, "-n", namespace, "--for=create", f"--timeout={WAIT_S}s")


def test_knative_takes_whatever_comes_of_annotations(cluster, namespace, echo_image):
    pairs = [
        pair
        for one, other in itertools.combinations(ASKED, 2)
        for pair in itertools.product(((one, text) for text in ASKED[one]), ((other, text) for text in ASKED[other]))
    ]

    async def all_of_them(api):
        taken = 0
        for pair in pairs:
            try:
                value = admitted(service(namespace, echo_image, dict(pair)))
            except ConfigError:
                continue  # a share of slices, one at least and none at most
            defaulted = await would_be(api, value)
            assert admitted(defaulted)["spec"] == defaulted["spec"]
            assert admitted(defaulted, defaulted) == defaulted
            taken += 1
        return taken

    assert talk(cluster, all_of_them) > 50


def test_an_update_of_something_else_makes_no_revision(cluster, namespace, echo_image):
    live = create(cluster, namespace, admitted(service(namespace, echo_image, {"max": "2", "exec-timeout": "2m"})))
    before = revisions(cluster, namespace)
    changed = copy.deepcopy(live)
    changed["metadata"]["labels"] = {"team": "a"}
    replace(cluster, admitted(changed, live))
    cluster.kubectl(
        "wait", "services.serving.knative.dev/f", "-n", namespace, "--for=jsonpath={.metadata.labels.team}=a"
    )
    generation = cluster.get("configurations.serving.knative.dev", "f", "-n", namespace)["metadata"]["generation"]
    assert generation == 1
    assert revisions(cluster, namespace) == before


def test_an_annotation_that_changes_makes_one_revision_with_what_comes_of_it(cluster, namespace, echo_image):
    live = create(cluster, namespace, admitted(service(namespace, echo_image, {"max": "2"})))
    changed = copy.deepcopy(live)
    changed["metadata"]["annotations"]["gpufn.dev/max"] = "3"
    replace(cluster, admitted(changed, live))
    until_created(cluster, namespace, "f-00002")
    assert revisions(cluster, namespace) == ["f-00001", "f-00002"]
    newest = cluster.get("revisions.serving.knative.dev", "f-00002", "-n", namespace)
    assert newest["metadata"]["annotations"][MAX_SCALE] == "3"


def test_a_template_that_keeps_its_name_is_taken_after_its_service_was_changed(cluster, namespace, echo_image):
    live = create(cluster, namespace, admitted(service(namespace, echo_image, {"max": "2"}, name="f-one")))
    changed = copy.deepcopy(live)
    changed["metadata"]["annotations"]["gpufn.dev/max"] = "3"
    replace(cluster, admitted(changed, live), "--dry-run=server")
    changed["spec"]["template"]["metadata"]["name"] = "f-two"
    found = replace(cluster, admitted(changed, live), "--dry-run=server")
    assert found["spec"]["template"]["metadata"]["annotations"][MAX_SCALE] == "3"


def test_what_a_user_wrote_comes_first_in_knative_too(cluster, namespace, echo_image):
    theirs = {MAX_SCALE: "7", RETENTION: "90s"}
    value = admitted(service(namespace, echo_image, {"max": "2", "idle": "1h"}, template=theirs, timeoutSeconds=45))
    found = talk(cluster, lambda api: would_be(api, value))["spec"]["template"]
    assert found["metadata"]["annotations"].items() >= theirs.items()
    assert found["spec"]["timeoutSeconds"] == 45
