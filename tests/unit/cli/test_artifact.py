"""`gpufn snapshot push`, `pull` and `inspect IMAGE` against a registry in this process."""

import json
import os

import pytest

from adapter.cli.main import run
from adapter.registry.client import Client
from adapter.registry.reference import Reference
from adapter.snapshot.store import Store
from tests.fakes.registry import FakeRegistry
from tests.unit.registry.conftest import put_image, take


@pytest.fixture
def image():
    """Reference of an image in a registry."""
    with FakeRegistry().running() as registry:
        name = f"{registry.host}/team/fn:1"
        with Client(Reference.parse(name)) as client:
            put_image(client)
        yield name


@pytest.fixture(autouse=True)
def _no_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "none.json"))


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def store(state):
    return Store(state / "snapshots")


def snapshot(state, *words):
    return run(["snapshot", *words, "--state", str(state)])


def answer(capsys):
    said = capsys.readouterr()
    return json.loads(said.out)


def test_a_snapshot_goes_there_is_seen_and_comes_back(state, store, image, tmp_path, capsys):
    taken = take(store)
    assert snapshot(state, "push", image, "-o", "json") == 0
    [pushed] = answer(capsys)
    assert pushed["key"] == taken.key
    assert snapshot(state, "inspect", image, "-o", "json") == 0
    [seen] = answer(capsys)
    assert (seen["digest"], seen["fits_here"], seen["function"]) == (pushed["digest"], True, taken.function)
    assert seen["size_bytes"] == pushed["size_bytes"]
    assert snapshot(state, "pull", image, "--into", str(tmp_path / "node"), "-o", "json") == 0
    [pulled] = answer(capsys)
    assert pulled["path"] == str(tmp_path / "node/default" / taken.function / f"process-{taken.key}")
    assert pulled["received_bytes"] == pushed["compressed_bytes"]


def test_tables_are_for_people(state, store, image, capsys):
    taken = take(store)
    assert snapshot(state, "push", image) == 0
    assert f"gpufn snapshot pull {image}" in capsys.readouterr().err
    assert snapshot(state, "inspect", image) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["FUNCTION", "KIND", "KEY"]
    assert taken.key in row
    assert "yes" in row


def test_one_that_does_not_fit_says_in_what(state, store, image, capsys):
    take(store, machine={"kernel": "5.4", "cpu": "x", "driver": "none", "gpus": "none"})
    assert snapshot(state, "push", image) == 0
    capsys.readouterr()
    assert snapshot(state, "inspect", image, "-o", "json") == 0
    [seen] = answer(capsys)
    assert not seen["fits_here"]
    assert "kernel" in seen["differs_in"]
    assert snapshot(state, "pull", image) == 1
    said = capsys.readouterr().err
    assert "[snapshot-mismatch]" in said
    assert "kernel" in said


def test_an_image_without_snapshots_is_an_empty_list(state, image, capsys):
    assert snapshot(state, "inspect", image, "-o", "json") == 0
    assert answer(capsys) == []
    assert snapshot(state, "pull", image) == 4


def test_the_weights_that_a_process_needs_go_with_it(state, store, image, tmp_path, capsys):
    weights = take(store, kind="weights", machine={})
    take(store, weights=weights.key)
    assert snapshot(state, "push", image, "-o", "json") == 0
    assert [row["kind"] for row in answer(capsys)] == ["weights", "process"]
    assert snapshot(state, "pull", image, "--into", str(tmp_path / "node"), "-o", "json") == 0
    assert [row["kind"] for row in answer(capsys)] == ["weights", "process"]


def test_a_process_whose_weights_are_gone_is_not_pushed(state, store, image, capsys):
    take(store, weights="0123")
    assert snapshot(state, "push", image) == 4
    assert "0123" in capsys.readouterr().err


def test_without_any_or_with_many_one_is_asked_for(state, store, image, capsys):
    state.mkdir()
    assert snapshot(state, "push", image) == 4
    first = take(store, function="first.openfaas-fn")  # no name that a key could begin with
    take(store, function="second.openfaas-fn", number=1)
    assert snapshot(state, "push", image) == 5
    assert "--snapshot" in capsys.readouterr().err
    for which in ("first", "first.openfaas-fn", first.key[:8]):
        assert snapshot(state, "push", image, "--snapshot", which, "-o", "json") == 0
        [pushed] = answer(capsys)
        assert pushed["key"] == first.key
    assert snapshot(state, "push", image, "--snapshot", "zzz") == 4


def test_a_pull_may_name_function_and_tenant(state, store, image, tmp_path, capsys):
    take(store)
    assert snapshot(state, "push", image) == 0
    words = ("--into", str(tmp_path / "node"), "--function", "other", "--tenant", "blue", "-o", "name")
    assert snapshot(state, "pull", image, *words) == 0
    assert "/blue/other.openfaas-fn/process-" in capsys.readouterr().out
    assert snapshot(state, "pull", image, "--into", str(tmp_path / "node"), "--tenant", "../x") == 1


@pytest.mark.parametrize(
    ("reference", "code"),
    [("127.0.0.1:{free}/team/fn:1", 6), ("{image}x", 4), ("https://x/y", 3), ("{image}@sha256:1", 3)],
)
def test_each_trouble_has_its_exit_code_and_three_lines(
    state, store, image, capsys, free_port, reference, code, monkeypatch
):
    monkeypatch.setattr(Client.__init__, "__kwdefaults__", {**Client.__init__.__kwdefaults__, "pause": lambda _: None})
    take(store)
    for verb in ("push", "pull", "inspect"):
        assert snapshot(state, verb, reference.format(free=free_port, image=image)) == code
        assert len(capsys.readouterr().err.strip().splitlines()) == 3


def test_what_has_no_slash_is_a_function_or_a_key(state, store, image, capsys):
    taken = take(store)
    assert snapshot(state, "inspect", taken.key[:6], "-o", "json") == 0
    assert answer(capsys)["key"] == taken.key


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_root_pushes_and_pulls_for_the_user_of_the_image(state, store, tmp_path, capsys):
    taken = take(store)
    for path in (store.root / "default" / taken.function, *taken.path.rglob("*"), taken.path):
        os.chown(path, 12345, 12346)
    with FakeRegistry().running() as registry:
        image = f"{registry.host}/team/fn:1"
        with Client(Reference.parse(image)) as client:
            put_image(client, user="12345:12346")
        assert snapshot(state, "push", image) == 0
        assert not list(taken.path.glob("verified.json")) or (taken.path / "verified.json").stat().st_uid == 12345
        node = tmp_path / "node"
        assert snapshot(state, "pull", image, "--into", str(node)) == 0
        given = [path for path in (node, *node.rglob("*")) if ".receiving" not in path.parts]  # that stays root's
        assert {path.stat().st_uid for path in given} == {12345}
        assert snapshot(state, "pull", image, "--into", str(node), "-o", "json") == 0
        assert '"received_bytes": 0' in capsys.readouterr().out
