"""`gpufn snapshot list`, `inspect` and `prune` over stores with sound, damaged, replaced and mapped snapshots."""

import json
import mmap

import pytest

from adapter.cli.kept import kept, may_go
from adapter.cli.main import run
from adapter.snapshot.store import Store


@pytest.fixture
def state(tmp_path):
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def store(state):
    return Store(state / "snapshots")


def publish(store, function="fn.openfaas-fn", kind="process", number=0, **facts):
    with store.building("default", function, {"code": f"{function}{number}"}, kind) as draft:
        (draft.path / "memory.img").write_bytes(b"memory" * 1000)
        return draft.publish(facts)


def snapshot(state, *words):
    return run(["snapshot", *words, "--state", str(state)])


def deployed(state, key):
    """As the gateway keeps it."""
    (state / "functions").mkdir(exist_ok=True)
    (state / "functions" / f"{key}.json").touch()


def paths(items):
    return {item.path for item in items}


def test_an_empty_store_says_how_to_fill_it(state, capsys):
    assert snapshot(state, "list") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "gpufn snapshot create" in said.err
    assert snapshot(state, "list", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert list(state.iterdir()) == []  # looking makes nothing


def test_the_list_has_one_line_each_and_names_damage(store, state, capsys):
    sound, cut = publish(store), publish(store, number=1)
    (cut.path / "memory.img").write_bytes(b"short")
    assert snapshot(state, "list", "-o", "json") == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[sound.key]["state"] == "ok"
    assert rows[sound.key]["size_bytes"] == sound.size_bytes
    assert (rows[cut.key]["state"], rows[cut.key]["created_at_ns"]) == ("damaged", None)
    assert "memory.img" in rows[cut.key]["damage"]
    assert snapshot(state, "list") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["fn"], ["fn.openfaas-fn"]),
        (["fn.openfaas-fn"], ["fn.openfaas-fn"]),
        (["fn", "-n", "team1"], ["fn.team1"]),
        (["fn.team1"], ["fn.team1"]),
        (["fn", "-A"], ["fn.openfaas-fn", "fn.team1"]),
        ([], ["fn.openfaas-fn"]),
        (["-A"], ["fn.openfaas-fn", "fn.team1", "other.dev"]),
    ],
)
def test_a_name_means_one_namespace(store, state, capsys, words, found):
    for function in ("fn.openfaas-fn", "fn.team1", "other.dev"):
        publish(store, function)
    assert snapshot(state, "list", *words, "-o", "json") == 0
    assert [f"{r['function']}.{r['namespace']}" for r in json.loads(capsys.readouterr().out)] == found


@pytest.mark.parametrize("words", [["list", "f"], ["list", "fn.dev"], ["prune", "f", "-y"]])
def test_a_function_that_is_not_known_is_an_error(store, state, capsys, words):
    publish(store)
    assert snapshot(state, *words) == 4
    assert "function-unknown" in capsys.readouterr().err


def test_a_function_that_is_deployed_may_have_none(state, capsys):
    deployed(state, "fn.openfaas-fn")
    assert snapshot(state, "list", "fn") == 0
    assert "No snapshots of fn.openfaas-fn." in capsys.readouterr().err


def test_inspect_shows_the_newest_of_a_function_and_any_by_key(store, state, capsys):
    old, new = publish(store), publish(store, number=1, criu_version="4.1")
    assert snapshot(state, "inspect", "fn") == 0
    shown = capsys.readouterr().out
    assert new.key in shown
    assert "4.1" in shown
    assert "code" in shown
    assert snapshot(state, "inspect", old.key[:12], "-o", "json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["key"], facts["identity"]) == (old.key, old.identity)
    assert facts["files"]["memory.img"]["size"] == 6000
    assert snapshot(state, "inspect", "fn", "-o", "wide") == 0
    assert "memory.img" in capsys.readouterr().out


def test_inspect_names_what_it_cannot_choose(store, state, capsys):
    publish(store)
    assert snapshot(state, "inspect", "nobody") == 4
    assert "gpufn snapshot list" in capsys.readouterr().err
    publish(store, "other.openfaas-fn")
    assert snapshot(state, "inspect", "") == 5  # begins every key
    assert "fn.openfaas-fn" in capsys.readouterr().err


def test_a_flipped_bit_is_found_when_asked_for(store, state, capsys):
    made = publish(store)
    assert snapshot(state, "inspect", "fn", "--verify") == 0
    (made.path / "memory.img").write_bytes(b"mEmory" * 1000)
    assert snapshot(state, "inspect", "fn") == 0
    assert snapshot(state, "inspect", "fn", "--verify") == 1
    assert "memory.img" in capsys.readouterr().err


def test_inspect_of_a_damaged_one_says_how_to_be_rid_of_it(store, state, capsys):
    made = publish(store)
    (made.path / "manifest.json").write_text("{")
    assert snapshot(state, "inspect", made.key) == 1
    assert "gpufn snapshot prune" in capsys.readouterr().err


# Pruning ------------------------------------------------------------------------------------------


def test_replaced_and_damaged_ones_go_and_the_newest_of_each_kind_stay(store, state, capsys):
    old, weights, new, other = (
        publish(store),
        publish(store, kind="weights", number=1),
        publish(store, number=2),
        publish(store, "other.openfaas-fn"),
    )
    damaged = publish(store, number=3)
    (damaged.path / "stranger").touch()
    assert snapshot(state, "prune", "--dry-run") == 0
    assert len(kept(store)) == 5
    assert snapshot(state, "prune", "--yes") == 0
    assert "2 snapshots" in capsys.readouterr().err
    assert paths(kept(store)) == {weights.path, new.path, other.path}
    assert not old.path.exists()
    assert not damaged.path.exists()
    assert snapshot(state, "prune") == 0
    assert "Nothing to prune" in capsys.readouterr().err


def test_all_takes_every_one_of_the_functions_named(store, state):
    publish(store)
    other = publish(store, "other.openfaas-fn")
    assert snapshot(state, "prune", "fn", "--all", "-y") == 0
    assert paths(kept(store)) == {other.path}


def test_a_bare_name_spares_other_namespaces(store, state):
    publish(store, "slow.openfaas-fn")
    other = publish(store, "slow.team1")
    assert snapshot(state, "prune", "slow", "--all", "-y") == 0
    assert paths(kept(store)) == {other.path}
    assert snapshot(state, "prune", "--all", "-y") == 0
    assert paths(kept(store)) == {other.path}
    assert snapshot(state, "prune", "-A", "--all", "-y") == 0
    assert kept(store) == []


def test_those_of_removed_functions_go_when_that_is_asked_for(store, state):
    there, gone = publish(store), publish(store, "gone.openfaas-fn")
    deployed(state, "fn.openfaas-fn")
    assert snapshot(state, "prune", "-y") == 0
    assert paths(kept(store)) == {there.path, gone.path}
    assert snapshot(state, "prune", "--removed", "-y") == 0
    assert paths(kept(store)) == {there.path}


def test_inspect_finds_a_key_in_any_namespace_and_a_name_in_one(store, state, capsys):
    here, there = publish(store), publish(store, "fn.team1", number=1)
    for words, key in ((["fn"], here.key), (["fn.team1"], there.key), (["fn", "-n", "team1"], there.key),
                       ([there.key], there.key)):  # fmt: skip
        assert snapshot(state, "inspect", *words, "--json") == 0
        assert json.loads(capsys.readouterr().out)["key"] == key


def test_what_a_process_maps_stays(store):
    old = publish(store)
    publish(store, number=1)
    with (old.path / "memory.img").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        items = kept(store)
        assert [item.state for item in items if item.path == old.path] == ["in-use"]
        assert may_go(items) == []
        assert old.path not in paths(may_go(items, everything=True))
    assert paths(may_go(kept(store))) == {old.path}


def test_weights_stay_as_long_as_the_process_snapshot_made_with_them(store):
    weights = publish(store, kind="weights")
    process = publish(store, weights=weights.key)
    publish(store, kind="weights", number=1)
    with (process.path / "memory.img").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert weights.path not in paths(may_go(kept(store), everything=True))
    assert weights.path in paths(may_go(kept(store), everything=True))


def test_unused_ones_go_by_their_last_use(store):
    made = publish(store)
    assert may_go(kept(store), unused_since_ns=made.used_at_ns) == []
    assert paths(may_go(kept(store), unused_since_ns=made.used_at_ns + 1)) == {made.path}


def test_a_link_is_removed_and_not_what_it_leads_to(store, state, tmp_path):
    made = publish(store)
    precious = tmp_path / "precious"
    made.path.rename(precious)
    made.path.symlink_to(precious)
    assert snapshot(state, "prune", "-y") == 0
    assert not made.path.is_symlink()
    assert (precious / "memory.img").exists()


def test_without_a_terminal_it_removes_nothing_unasked(store, state, capsys):
    publish(store)
    assert snapshot(state, "prune", "--all") == 2
    assert "--yes" in capsys.readouterr().err
    assert len(kept(store)) == 1


def test_a_wrong_duration_says_what_is_accepted(state, capsys):
    assert snapshot(state, "prune", "--unused-for", "a while") == 2
    assert "30s" in capsys.readouterr().err
