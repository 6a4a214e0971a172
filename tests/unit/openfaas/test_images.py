"""What an image says of itself, asked of a registry."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json

import pytest

from adapter.errors import ConfigError, NotFound
from adapter.hosts.container import CONFIG_LABEL, CONTRACT_LABEL
from adapter.openfaas.catalog import ImageFacts
from adapter.openfaas.images import Images
from adapter.openfaas.wire import FunctionDeployment
from adapter.registry.client import INDEX_TYPE, MANIFEST_TYPE
from adapter.registry.reference import local_architecture
from tests.fakes.registry import FakeRegistry


@pytest.fixture
def registry():
    with FakeRegistry().running() as registry:
        yield registry


def push(registry, tag: str = "1", *, index: bool = False, user: str = "1000", env=(), **labels) -> str:
    """An image's digest, as its tag names it."""
    config = json.dumps({"config": {"Labels": labels, "User": user, "Env": list(env)}}).encode()
    digest = "sha256:" + hashlib.sha256(config).hexdigest()
    registry.blobs[digest] = config
    named = {"mediaType": MANIFEST_TYPE, "config": {"digest": digest, "size": len(config)}, "layers": []}
    raw = json.dumps({"schemaVersion": 2, **named}).encode()
    if not index:
        return registry.put_manifest(tag, MANIFEST_TYPE, raw)
    inner = registry.put_manifest("inner", MANIFEST_TYPE, raw)
    entry = {"mediaType": MANIFEST_TYPE, "digest": inner, "size": len(raw)}
    platforms = [{"os": "linux", "architecture": name} for name in ("other", local_architecture())]
    entries = [{**entry, "platform": platform} for platform in platforms]
    raw = json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}).encode()
    return registry.put_manifest(tag, INDEX_TYPE, raw)


def look(registry, image: str = "", *, configs=()) -> ImageFacts:
    async def pull_secrets(_namespace, _names):
        return list(configs)

    wanted = FunctionDeployment("fn", image or f"{registry.host}/team/fn:1")
    return asyncio.run(Images(pull_secrets).look(wanted))


def test_an_image_of_ours_is_pinned_and_says_what_it_was_built_with(registry):
    config = {"gpu": {"count": 1}}
    labels = {CONTRACT_LABEL: "1", CONFIG_LABEL: json.dumps(config)}
    digest = push(registry, env=["A=b", "PYTHONPATH=/opt/shim"], **labels)
    facts = look(registry)
    assert facts == ImageFacts(f"{registry.host}/team/fn@{digest}", True, config, "1000", "/opt/shim")
    assert ImageFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_an_index_is_pinned_itself_so_that_each_node_takes_its_own(registry):
    digest = push(registry, index=True, **{CONTRACT_LABEL: "1"})
    facts = look(registry)
    assert facts.reference.endswith(digest)
    assert facts.is_ours


def test_an_image_of_others_is_run_with_a_note(registry):
    push(registry)
    facts = look(registry)
    assert (facts.is_ours, facts.config) == (False, {})
    assert "not built by gpufn" in facts.note


def test_an_image_of_another_contract_is_refused(registry):
    push(registry, **{CONTRACT_LABEL: "99"})
    with pytest.raises(ConfigError, match="no function that this gpufn can run") as error:
        look(registry)
    assert "version 99" in error.value.why


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_configuration_that_is_none_is_refused(registry, text):
    push(registry, **{CONTRACT_LABEL: "1", CONFIG_LABEL: text})
    with pytest.raises(ConfigError, match="no JSON object"):
        look(registry)


def test_an_image_that_its_registry_does_not_have_is_refused(registry):
    with pytest.raises(NotFound):
        look(registry)


def test_a_reference_that_is_none_is_refused(registry):
    with pytest.raises(ConfigError, match="no image reference"):
        look(registry, "Not An Image")


def test_a_registry_that_cannot_be_asked_leaves_the_image_as_it_was_named(monkeypatch):
    monkeypatch.setattr("adapter.openfaas.images._LIMIT_S", 5)
    facts = look(None, "127.0.0.1:9/team/fn:1")
    assert (facts.reference, facts.is_ours) == ("127.0.0.1:9/team/fn:1", False)
    assert facts.note.startswith("the image could not be looked at: ")


def test_a_private_registry_is_asked_with_the_functions_own_pull_secret():
    with FakeRegistry(password="me:secret").running() as registry:
        digest = push(registry, **{CONTRACT_LABEL: "1"})
        assert "could not be looked at" in look(registry).note
        auth = base64.b64encode(b"me:secret").decode()
        config = json.dumps({"auths": {registry.host: {"auth": auth}}}).encode()
        assert look(registry, configs=[b'{"auths": {}}', config]).reference.endswith(digest)


def test_a_pull_secret_runs_no_program(registry, tmp_path, monkeypatch):
    helper = tmp_path / "docker-credential-evil"
    helper.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    push(registry, **{CONTRACT_LABEL: "1"})
    look(registry, configs=[json.dumps({"credHelpers": {registry.host: "evil"}, "credsStore": "evil"}).encode()])
    assert not (tmp_path / "ran").exists()
