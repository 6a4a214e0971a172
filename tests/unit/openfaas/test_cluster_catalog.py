"""The desired state as objects of a cluster, with others who write it too."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from contextlib import asynccontextmanager

import pytest

from adapter.cluster.resources import CONFIG_MAPS, NAMESPACES, SECRETS
from adapter.errors import ConfigError, Conflict, NotFound, Unavailable
from adapter.hosts import Deployment
from adapter.openfaas.catalog import ImageFacts
from adapter.openfaas.cluster_catalog import ClusterCatalog, Membership
from adapter.openfaas.cluster_records import read_record, record_of
from adapter.openfaas.cluster_secrets import ClusterSecrets
from adapter.openfaas.wire import FunctionDeployment
from adapter.spec import parse_spec
from tests.fakes.api_server import status
from tests.fakes.pods import FakeCluster
from tests.fakes.replicas import until

NAMESPACE = "openfaas-fn"
FN = FunctionDeployment("fn", "fn:1", env_vars={"a": "b"})
PATH = f"/api/v1/namespaces/{NAMESPACE}/configmaps/function-fn"
FACTS = ImageFacts("fn@sha256:1", is_ours=True, config={"gpu": {"count": 1}})
MEMBERSHIP = Membership("functions-role", "provider", "system")


class Told:
    """A listener that remembers."""

    def __init__(self):
        self.news = []

    def deployed(self, entry, *, first=False):
        self.news.append((entry.deployment.key, entry.revision))

    def removed(self, key):
        self.news.append((key, "removed"))


class Place:
    def __init__(self, fake, api) -> None:
        self.fake = fake
        self.told = Told()
        self.namespaces = []
        self.looked = []
        self.facts = FACTS
        self.catalog = ClusterCatalog(api, ClusterSecrets(api), NAMESPACE, self.look, MEMBERSHIP)
        self.catalog.listen(self.told)

    async def look(self, wanted):
        self.looked.append(wanted.image)
        if isinstance(self.facts, Exception):
            raise self.facts
        return self.facts

    async def edit(self, **changes):
        """As kubectl does."""
        record = json.loads(json.dumps(self.fake.objects[PATH]))
        wanted = json.loads(record["data"]["deployment"]) | changes
        record["data"]["deployment"] = json.dumps(wanted)
        await self.fake.put(PATH, record)


@asynccontextmanager
async def opened(fake=None):
    fake = fake or FakeCluster(None)
    async with fake.serving() as server, server.client() as api:
        place = Place(fake, api)
        await place.catalog.open(place.namespaces.append, place.namespaces.remove)
        try:
            yield place
        finally:
            await place.catalog.close()
            await fake.close()


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


# Functions ---------------------------------------------------------------------------------------


def test_what_was_put_is_there_for_the_next_gateway_with_what_its_image_said():
    async def scenario():
        fake = FakeCluster(None)
        async with opened(fake) as place:
            first = await place.catalog.put(FN, "", FACTS)
            again = await place.catalog.put(FN, "", FACTS)
            assert (first.revision, again.revision) == (1, 2)
            assert again.created_at == first.created_at
        async with opened(fake) as place:
            assert place.catalog.get("fn.openfaas-fn") == again
            assert [entry.image for entry in place.catalog.functions()] == [FACTS]
            assert place.catalog.functions("other") == []
            await place.catalog.remove("fn.openfaas-fn")
            assert PATH not in fake.objects
            with pytest.raises(NotFound):
                place.catalog.get("fn.openfaas-fn")
            with pytest.raises(NotFound):
                await place.catalog.remove("fn.openfaas-fn")

    run(scenario())


def test_what_another_gateway_deploys_and_removes_is_told():
    async def scenario():
        async with opened() as place:
            await place.fake.put(PATH, record_of(FN, 4, None) | _created())
            await until(lambda: place.told.news == [("fn.openfaas-fn", 4)])
            await place.fake.put(PATH, {**record_of(FN, 5, None), "metadata": place.fake.objects[PATH]["metadata"]})
            await until(lambda: place.told.news[-1] == ("fn.openfaas-fn", 5))
            await place.fake.remove(PATH)
            await until(lambda: place.told.news[-1] == ("fn.openfaas-fn", "removed"))
            assert place.catalog.uid("fn.openfaas-fn") == ""

    run(scenario())


def test_what_it_does_itself_is_not_told_again():
    async def scenario():
        async with opened() as place:
            await place.catalog.put(FN, "")
            await place.catalog.put(FN, "")
            await place.catalog.remove("fn.openfaas-fn")
            await place.fake.put(_path("last"), record_of(FunctionDeployment("last", "x"), 1, None) | _created("last"))
            await until(lambda: ("last.openfaas-fn", 1) in place.told.news)
            assert ("fn.openfaas-fn", "removed") not in place.told.news

    run(scenario())


def test_an_edit_by_hand_is_a_deploy_of_which_a_revision_is_made():
    async def scenario():
        async with opened() as place:
            await place.catalog.put(FN, "", FACTS)
            place.facts = ImageFacts("fn@sha256:2")
            await place.edit(image="fn:2")
            await until(lambda: place.told.news[-1:] == [("fn.openfaas-fn", 2)])
            entry = place.catalog.get("fn.openfaas-fn")
            assert (entry.deployment.image, entry.image.reference) == ("fn:2", "fn@sha256:2")
            assert place.looked == ["fn:2"]
            assert place.fake.objects[PATH]["data"]["revision"] == "2"

    run(scenario())


def test_a_record_of_before_that_others_put_back_is_a_deploy_too():
    """Out of a backup, with all that was in it."""

    async def scenario():
        async with opened() as place:
            await place.catalog.put(FN, "")
            before = json.loads(json.dumps(place.fake.objects[PATH]["data"]))
            for image in ("fn:2", "fn:3"):
                await place.catalog.put(dataclasses.replace(FN, image=image), "")
            for data, image in ((before, "fn:1"), (before | {"deployment": json.dumps(_of("fn:4"))}, "fn:4")):
                record = json.loads(json.dumps(place.fake.objects[PATH]))
                await place.fake.put(PATH, {**record, "data": data})
                await until(lambda image=image: place.catalog.get("fn.openfaas-fn").deployment.image == image)
            assert place.told.news == [("fn.openfaas-fn", 4), ("fn.openfaas-fn", 5)]
            assert read_record(place.fake.objects[PATH]).entry == place.catalog.get("fn.openfaas-fn")

    run(scenario())


def _of(image: str) -> dict:
    return FN.to_json() | {"image": image}


def test_an_edit_whose_image_cannot_be_looked_at_is_taken_with_a_note():
    async def scenario():
        async with opened() as place:
            await place.catalog.put(FN, "", FACTS)
            place.facts = ConfigError("No such image.")
            await place.edit(image="fn:2")
            await until(lambda: place.told.news[-1:] == [("fn.openfaas-fn", 2)])
            assert "No such image" in place.catalog.get("fn.openfaas-fn").image.note

    run(scenario())


_BROKEN = (
    {"service": "other"},
    {"image": ""},
    {"env_vars": ["A"]},
    {"secrets": "token"},
    {"secrets": [{}]},
    {"limits": {"cpu": 1}},
)


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "[]", '{"service": 1}', *(json.dumps(FN.to_json() | change) for change in _BROKEN)]
)
def test_an_edit_that_breaks_a_record_leaves_what_runs(text):
    async def scenario():
        async with opened() as place:
            entry = await place.catalog.put(FN, "")
            record = json.loads(json.dumps(place.fake.objects[PATH]))
            record["data"]["deployment"] = text
            broken = await place.fake.put(PATH, record)
            version = broken["metadata"]["resourceVersion"]
            await until(lambda: place.catalog._records["fn.openfaas-fn"].version == version)
            assert place.catalog.get("fn.openfaas-fn") == entry
            assert ("fn.openfaas-fn", "removed") not in place.told.news
            assert (await place.catalog.put(FN, "")).revision == 2

    run(scenario())


def test_a_write_that_another_was_faster_than_goes_on_top_of_it():
    async def scenario():
        async with opened() as place:
            await place.catalog.put(FN, "")
            place.fake.silent.set()  # its watch has not told yet
            await place.fake.put(PATH, {**record_of(FN, 2, None), "metadata": place.fake.objects[PATH]["metadata"]})
            assert (await place.catalog.put(FN, "")).revision == 3
            await place.fake.remove(PATH)
            assert (await place.catalog.put(FN, "")).revision == 1
            place.fake.silent.clear()

    run(scenario())


@pytest.mark.parametrize("data", [{}, {"revision": "1"}], ids=["what is beside it", "its count"])
def test_a_record_that_others_touched_without_an_edit_can_be_deployed_on_top_of(data):
    async def scenario():
        async with opened() as place:
            await place.catalog.put(FN, "")
            await place.catalog.put(FN, "")
            record = json.loads(json.dumps(place.fake.objects[PATH]))
            record["metadata"]["annotations"] = {"team": "a"}
            record["data"] |= data
            await place.fake.put(PATH, record)
            assert (await place.catalog.put(FN, "")).revision == 3
            assert read_record(place.fake.objects[PATH]).entry.revision == 3
            assert place.told.news == []

    run(scenario())


def test_a_record_that_was_not_marked_as_ours_for_a_while_is_the_same_function_again():
    async def scenario():
        async with opened() as place:
            entry = await place.catalog.put(FN, "")
            record = json.loads(json.dumps(place.fake.objects[PATH]))
            labels = record["metadata"].pop("labels")
            await place.fake.put(PATH, record)
            await until(lambda: place.told.news == [("fn.openfaas-fn", "removed")])
            await place.fake.put(PATH, {**record, "metadata": {**record["metadata"], "labels": labels}})
            await until(lambda: place.told.news[1:] == [("fn.openfaas-fn", 1)])
            assert place.catalog.get("fn.openfaas-fn") == entry
            assert (await place.catalog.put(FN, "")).revision == 2

    run(scenario())


def test_functions_of_a_namespace_that_was_not_marked_for_a_while_are_there_again():
    async def scenario():
        async with opened() as place:
            path, team = NAMESPACES.path(name="team"), {"metadata": {"name": "team", "labels": {"openfaas": "1"}}}
            await place.fake.put(path, team)
            await until(lambda: "team" in place.catalog.namespaces())
            entry = await place.catalog.put(FunctionDeployment("fn", "x", namespace="team"), "")
            await place.fake.put(path, {"metadata": {"name": "team"}})
            await until(lambda: place.told.news == [("fn.team", "removed")])
            await place.fake.put(path, team)
            await until(lambda: place.told.news[1:] == [("fn.team", 1)])
            assert place.catalog.get("fn.team") == entry

    run(scenario())


def test_late_news_of_a_function_that_was_removed_and_deployed_anew_is_no_news():
    async def scenario():
        async with opened() as place:
            await place.catalog.put(FN, "")
            place.fake.silent.set()
            await place.catalog.remove("fn.openfaas-fn")
            entry = await place.catalog.put(FN, "")
            place.fake.silent.clear()
            await place.fake.put(_path("last"), record_of(FunctionDeployment("last", "x"), 1, None) | _created("last"))
            await until(lambda: ("last.openfaas-fn", 1) in place.told.news)
            assert place.catalog.get("fn.openfaas-fn") == entry
            assert ("fn.openfaas-fn", "removed") not in place.told.news

    run(scenario())


def test_a_function_that_others_removed_and_made_anew_in_one_glance_is_another_one():
    async def scenario():
        async with opened() as place:
            for _ in range(3):
                await place.catalog.put(FN, "")
            uid = place.catalog.uid("fn.openfaas-fn")
            place.fake.silent.set()
            await place.fake.remove(PATH)
            await place.fake.put(PATH, record_of(FN, 1, None) | _created())
            place.fake.compact()  # what happened in between is not told any more
            place.fake.silent.clear()
            place.fake.cut_watches()
            await until(lambda: place.told.news == [("fn.openfaas-fn", "removed"), ("fn.openfaas-fn", 1)])
            assert place.catalog.uid("fn.openfaas-fn") not in ("", uid)
            assert place.catalog.get("fn.openfaas-fn").revision == 1

    run(scenario())


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_function_that_others_removed_is_told_as_such_before_its_next_deploy(made_anew):
    async def scenario():
        async with opened() as place:
            for _ in range(3):
                await place.catalog.put(FN, "")
            place.fake.silent.set()
            await place.fake.remove(PATH)
            if made_anew:
                await place.fake.put(PATH, record_of(FN, 1, None) | _created())
            entry = await place.catalog.put(FN, "")
            assert entry.revision == 1 + made_anew
            assert place.told.news == [("fn.openfaas-fn", "removed")]
            place.fake.silent.clear()
            await place.fake.put(_path("last"), record_of(FunctionDeployment("last", "x"), 1, None) | _created("last"))
            await until(lambda: ("last.openfaas-fn", 1) in place.told.news)
            assert place.told.news == [("fn.openfaas-fn", "removed"), ("last.openfaas-fn", 1)]
            assert place.catalog.get("fn.openfaas-fn") == entry

    run(scenario())


def test_news_from_before_a_deploy_of_ours_is_no_news():
    """Removed, made and removed by others, then made by us: the watch tells of the one in between last."""

    async def scenario():
        async with opened() as place:
            await place.catalog.put(FN, "")
            place.fake.silent.set()
            await place.fake.remove(PATH)
            await place.fake.put(PATH, record_of(FN, 9, None) | _created())
            await place.fake.remove(PATH)
            entry = await place.catalog.put(FN, "")
            place.fake.silent.clear()
            await place.fake.put(_path("last"), record_of(FunctionDeployment("last", "x"), 1, None) | _created("last"))
            await until(lambda: ("last.openfaas-fn", 1) in place.told.news)
            assert place.told.news == [("fn.openfaas-fn", "removed"), ("last.openfaas-fn", 1)]
            assert place.catalog.get("fn.openfaas-fn") == entry

    run(scenario())


@pytest.mark.parametrize("name", ["backup-of-fn", "function-other"])
def test_a_copy_of_a_record_under_another_name_does_not_take_its_place(name):
    async def scenario():
        async with opened() as place:
            entry = await place.catalog.put(FN, "")
            copy = record_of(FN, 7, None) | _created()
            copy["metadata"]["name"] = name
            await place.fake.put(CONFIG_MAPS.path(NAMESPACE, name), copy)
            await place.fake.put(_path("last"), record_of(FunctionDeployment("last", "x"), 1, None) | _created("last"))
            await until(lambda: ("last.openfaas-fn", 1) in place.told.news)
            assert place.told.news == [("last.openfaas-fn", 1)]
            assert place.catalog.get("fn.openfaas-fn") == entry
            assert [e.deployment.service for e in place.catalog.functions()] == ["fn", "last"]
            await place.fake.remove(CONFIG_MAPS.path(NAMESPACE, name))
            await place.fake.remove(_path("last"))
            await until(lambda: place.told.news[-1] == ("last.openfaas-fn", "removed"))
            assert place.catalog.get("fn.openfaas-fn") == entry
            assert (await place.catalog.put(FN, "")).revision == 2

    run(scenario())


def test_a_config_map_of_somebody_else_is_not_written_over():
    async def scenario():
        async with opened() as place:
            await place.fake.put(PATH, {"data": {"theirs": "1"}})
            with pytest.raises(Conflict, match="somebody else's") as error:
                await place.catalog.put(FN, "")
            assert "function-fn" in error.value.message
            assert place.fake.objects[PATH]["data"] == {"theirs": "1"}
            assert place.catalog.functions() == []

    run(scenario())


def test_a_server_that_refuses_is_told_to_whoever_deploys():
    async def scenario():
        async with opened() as place:
            place.fake.next(status(403, "Forbidden", "configmaps is forbidden"), lambda r: r.method == "POST")
            with pytest.raises(Unavailable, match="refused"):
                await place.catalog.put(FN, "")
            assert place.catalog.functions() == []

    run(scenario())


def test_a_record_is_read_as_it_was_written():
    body = record_of(FN, 7, FACTS)
    body["metadata"] |= {"uid": "u", "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    record = read_record(body)
    assert (record.key, record.is_edited, record.problem) == ("fn.openfaas-fn", False, "")
    assert record.entry is not None
    assert (record.entry.deployment, record.entry.revision, record.entry.image) == (FN, 7, FACTS)


def _created(name: str = "fn") -> dict:
    metadata = record_of(FunctionDeployment(name, "x"), 1, None)["metadata"]
    return {"metadata": {**metadata, "creationTimestamp": "2026-01-01T00:00:00Z"}}


def _path(name: str) -> str:
    return CONFIG_MAPS.path(NAMESPACE, f"function-{name}")


# Namespaces --------------------------------------------------------------------------------------


def test_namespaces_are_those_with_the_mark_of_openfaas_as_label_or_annotation():
    async def scenario():
        async with opened() as place:
            for name, metadata in {
                "labelled": {"labels": {"openfaas": "1", "gpufn.dev/snapshots": "enabled"}},
                "annotated": {"annotations": {"openfaas": "true"}},
                "no": {"labels": {"openfaas": "0"}},
                "kube-system": {},
            }.items():
                await place.fake.put(NAMESPACES.path(name=name), {"metadata": metadata})
            await until(lambda: place.catalog.namespaces() == ["annotated", "labelled", NAMESPACE])
            assert place.catalog.keeps_snapshots("labelled")
            assert not place.catalog.keeps_snapshots("annotated")
            assert not place.catalog.keeps_snapshots("absent")
            await place.fake.put("/api/v1/namespaces/labelled/configmaps/function-fn", _record_in("labelled"))
            await until(lambda: ("fn.labelled", 1) in place.told.news)
            await place.fake.remove(NAMESPACES.path(name="labelled"))
            await until(lambda: ("fn.labelled", "removed") in place.told.news)
            assert place.namespaces == [NAMESPACE, "annotated"]

    run(scenario())


def test_a_namespace_without_the_mark_is_refused_with_what_to_do():
    async def scenario():
        async with opened() as place:
            with pytest.raises(NotFound) as caught:
                place.catalog.namespace("team-a")
            assert caught.value.message == "No namespace team-a."
            assert "kubectl annotate namespace team-a openfaas=1" in caught.value.hint

    run(scenario())


def _record_in(namespace: str) -> dict:
    body = record_of(FunctionDeployment("fn", "fn:1", namespace), 1, None)
    body["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    return body


def test_a_namespace_that_is_made_is_one_of_functions_and_gives_us_its_rights():
    async def scenario():
        async with opened() as place:
            await place.catalog.put_namespace("second", {"labels": {"a": "b"}, "annotations": {}}, new=True)
            assert place.catalog.namespace("second") == {
                "name": "second",
                "labels": {"a": "b", "openfaas": "1"},
                "annotations": {},
            }
            made = place.fake.objects["/api/v1/namespaces/second"]["metadata"]
            assert made["labels"]["openfaas"] == made["annotations"]["openfaas"] == "1"
            bindings = [path for path in place.fake.objects if "rolebindings" in path]
            assert bindings == ["/apis/rbac.authorization.k8s.io/v1/namespaces/second/rolebindings/provider"]
            assert place.fake.objects[bindings[0]]["roleRef"]["name"] == "functions-role"
            with pytest.raises(Conflict):
                await place.catalog.put_namespace("second", {}, new=True)
            await place.catalog.put_namespace("second", {"labels": {"a": "c"}}, new=False)
            assert place.catalog.namespace("second")["labels"] == {"a": "c", "openfaas": "1"}
            await place.catalog.remove_namespace("second")
            assert "second" not in place.catalog.namespaces()

    run(scenario())


def test_a_namespace_of_others_is_neither_taken_nor_removed():
    async def scenario():
        async with opened() as place:
            await place.fake.put(NAMESPACES.path(name="kube-system"), {"metadata": {}})
            with pytest.raises(Conflict, match="not one of functions"):
                await place.catalog.put_namespace("kube-system", {}, new=True)
            with pytest.raises(NotFound):
                await place.catalog.put_namespace("kube-system", {}, new=False)
            with pytest.raises(NotFound):
                await place.catalog.remove_namespace("kube-system")
            with pytest.raises(Conflict):
                await place.catalog.remove_namespace(NAMESPACE)

    run(scenario())


def test_a_namespace_with_functions_is_not_removed():
    async def scenario():
        async with opened() as place:
            await place.catalog.put_namespace("second", {}, new=True)
            await place.catalog.put(FunctionDeployment("fn", "fn:1", "second"), "")
            with pytest.raises(Conflict, match="has functions: fn"):
                await place.catalog.remove_namespace("second")

    run(scenario())


# Secrets -----------------------------------------------------------------------------------------


def _secret(name: str) -> str:
    return SECRETS.path(NAMESPACE, name)


def test_secrets_are_those_that_openfaas_manages():
    async def scenario():
        async with opened() as place:
            catalog = place.catalog
            await catalog.put_secret(NAMESPACE, "token", b"\0one", new=True)
            stored = place.fake.objects[_secret("token")]
            assert stored["data"] == {"token": base64.b64encode(b"\0one").decode()}
            assert stored["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "openfaas"}
            with pytest.raises(Conflict):
                await catalog.put_secret(NAMESPACE, "token", b"two", new=True)
            await catalog.put_secret(NAMESPACE, "token", b"two", new=False)
            assert place.fake.objects[_secret("token")]["data"]["token"] == base64.b64encode(b"two").decode()
            with pytest.raises(NotFound):
                await catalog.put_secret(NAMESPACE, "absent", b"", new=False)
            assert await catalog.missing_secrets(NAMESPACE, ["token", "absent"]) == ["absent"]
            await catalog.remove_secret(NAMESPACE, "token")
            with pytest.raises(NotFound):
                await catalog.remove_secret(NAMESPACE, "token")

    run(scenario())


def test_a_secret_of_somebody_else_is_neither_read_nor_changed_nor_removed():
    async def scenario():
        async with opened() as place:
            await place.fake.put(_secret("tls"), {"type": "kubernetes.io/tls", "data": {"tls.key": "eA=="}})
            for change in (
                place.catalog.put_secret(NAMESPACE, "tls", b"", new=False),
                place.catalog.remove_secret(NAMESPACE, "tls"),
            ):
                with pytest.raises(NotFound):
                    await change
            with pytest.raises(ConfigError, match="not one of functions") as error:
                await place.catalog.missing_secrets(NAMESPACE, ["tls"])
            assert "label secret tls" in error.value.hint

    run(scenario())


def test_secrets_for_pulling_need_no_label_and_are_told_apart():
    async def scenario():
        async with opened() as place:
            data = {".dockerconfigjson": base64.b64encode(b"{}").decode()}
            await place.fake.put(_secret("registry"), {"type": "kubernetes.io/dockerconfigjson", "data": data})
            secrets = place.catalog._secrets
            await place.fake.put(_secret("foreign"), {"type": "Opaque", "data": {}})
            assert await place.catalog.missing_secrets(NAMESPACE, ["registry"]) == []
            assert await secrets.for_pulling(_needing("registry", "absent")) == {"registry"}
            with pytest.raises(ConfigError, match="not one of functions"):
                await secrets.for_pulling(_needing("registry", "foreign"))
            assert await secrets.docker_configs(NAMESPACE, ["registry", "absent"]) == [b"{}"]

    run(scenario())


def _needing(*secrets):
    return Deployment("fn", NAMESPACE, "1", "fn:1", parse_spec({}, {}), secrets=secrets)


def test_whoever_deploys_is_not_told_before_its_write_is_done():
    async def scenario():
        async with opened() as place:
            told_early = []

            async def slow(request):
                """The watch is faster than the answer."""
                answer = await place.fake._write(request, await request.json())
                await until(place.catalog.functions)
                told_early.extend(place.told.news)
                return answer

            place.fake.next(slow, lambda request: request.method == "POST")
            assert (await place.catalog.put(FN, "")).revision == 1
            assert told_early == []

    run(scenario())
