"""Which snapshots a node has, and which go."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from adapter.agent import cache as module
from adapter.agent.cache import Cached, Savings, disk_bytes_per_s, evict, make_folder, read_cache, to_evict
from adapter.errors import SnapshotError
from adapter.records import Rung, StartRecord
from adapter.snapshot.store import Store, discard, read_snapshot

DAY_NS = 86_400 * 10**9


def cached(n, size=100, age_ns=0, kind="process"):
    return Cached(Path(f"/s/t/f{n}/{kind}-{n}"), f"t/f{n}", kind, str(n), size, 100 * DAY_NS - age_ns)


def kept(everything, limit, savings=None):
    leaving = to_evict(everything, limit, 100 * DAY_NS, savings or {})
    return [one.name for one in everything if one not in leaving]


def test_the_least_recently_used_goes_first_where_all_else_is_equal():
    assert kept([cached(1, age_ns=2 * DAY_NS), cached(2), cached(3, age_ns=DAY_NS)], 200) == ["t/f2", "t/f3"]


def test_what_saves_more_for_a_byte_stays():
    large, small = cached(1, size=1000), cached(2, size=10)
    assert kept([large, small], 1000) == ["t/f2"]
    assert kept([large, small], 1000, {large.path: 900.0, small.path: 1.0}) == ["t/f1"]


def test_no_measured_saving_and_no_time_in_the_future_keeps_one_for_ever():
    liar, honest = cached(1, size=100), cached(2, size=10)
    assert kept([liar, honest], 100, {liar.path: 1e9, honest.path: 600.0}) == ["t/f2"]
    ahead, fresh, old = cached(1, age_ns=-DAY_NS), cached(2, age_ns=DAY_NS // 2), cached(3, age_ns=2 * DAY_NS)
    assert kept([ahead, fresh, old], 100) == ["t/f2"]
    assert kept([ahead, fresh, old], 200) == ["t/f1", "t/f2"]


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 10 * DAY_NS)), max_size=12), st.integers(0, 3000))
def test_the_rest_fits_and_nothing_goes_without_need(sizes, limit):
    everything = [cached(n, size, age_ns) for n, (size, age_ns) in enumerate(sizes)]
    leaving = to_evict(everything, limit, 100 * DAY_NS, {})
    assert sum(one.bytes for one in everything if one not in leaving) <= limit
    assert not leaving or sum(one.bytes for one in everything if one not in leaving[:-1]) > limit


def start(rung, seconds, error=""):
    return StartRecord("f", "n", "1", "r", rung, 0, int(seconds * 1e9), (), error=error)


def test_what_a_snapshot_saves_is_what_starts_took_with_and_without_it():
    savings = Savings()
    assert savings.of("t/f", "process") == 5.0
    savings.saw("t/f", start(Rung.LOAD, 12))
    savings.saw("t/f", start(Rung.RESTORE, 2))
    savings.saw("t/f", start(Rung.RESTORE, 1, error="no"))
    assert savings.of("t/f", "process") == 10.0
    savings.saw("t/f", start(Rung.START, 4))
    assert savings.of("t/f", "weights") == 8.0
    assert savings.of("t/other", "compile") == 5.0


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "snapshots")


def publish(store, function, size, *, tenant="acme", kind="process"):
    with store.building(tenant, function, {"code": function}, kind) as draft:
        (draft.path / "memory").write_bytes(os.urandom(size))
        return draft.publish({})


def test_whole_snapshots_are_listed_whoever_owns_them(store):
    published = publish(store, "embed.acme", 5000)
    publish(store, "other.acme", 5000, kind="weights")
    if os.geteuid() == 0:
        for path in (published.path.parent, published.path, *published.path.iterdir()):
            os.chown(path, 1000, 1000)
    found = read_cache(store.root)
    assert [(one.name, one.kind, one.key) for one in found] == [
        ("acme/embed.acme", "process", published.key),
        ("acme/other.acme", "weights", found[1].key),
    ]
    assert found[0].bytes >= 5000


def test_what_is_no_snapshot_is_not_listed(store, tmp_path):
    published = publish(store, "embed.acme", 10)
    elsewhere = publish(Store(tmp_path / "elsewhere"), "embed.acme", 10)
    folder = store.folder("thief", "embed.acme")
    os.symlink(elsewhere.path, folder / elsewhere.path.name)
    os.rename(publish(store, "moved.acme", 10).path, store.folder("acme", "another.acme") / published.path.name)
    (store.folder("acme", "torn.acme") / "process-abc").mkdir()
    (store.folder("acme", "draft.acme") / ".draft-process-abc").mkdir()
    assert [one.name for one in read_cache(store.root)] == ["acme/embed.acme"]


def test_of_a_folder_that_is_full_of_names_only_so_many_are_looked_at(store, monkeypatch):
    publish(store, "embed.acme", 10)
    full = store.folder("acme", "full.acme")
    for n in range(3000):
        (full / f"process-{n}").touch()
    looked_at = []

    def count(path, **_):
        looked_at.append(path)
        return read_snapshot(path)

    monkeypatch.setattr(module, "read_snapshot", count)
    assert [one.name for one in read_cache(store.root)] == ["acme/embed.acme"]
    assert len(looked_at) <= 1001


def test_one_that_cannot_be_removed_stops_nobody_elses_removal(store, monkeypatch):
    stuck, other = publish(store, "stuck.acme", 100_000), publish(store, "other.acme", 100_000)

    def fail(path):
        if path == stuck.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        discard(path)

    monkeypatch.setattr(module, "discard", fail)
    stayed, left = evict(store.root, 0, Savings())
    assert ([one.path for one in stayed], [one.path for one in left]) == ([stuck.path], [other.path])
    assert not other.path.exists()


def test_no_store_is_an_empty_one(tmp_path):
    assert read_cache(tmp_path / "none") == []


def test_eviction_removes_and_says_what_it_removed(store):
    small, large = publish(store, "small.acme", 100), publish(store, "large.acme", 100_000)
    stayed, left = evict(store.root, 50_000, Savings())
    assert ([one.name for one in stayed], [one.name for one in left]) == (["acme/small.acme"], ["acme/large.acme"])
    assert small.path.exists()
    assert not large.path.exists()


def test_what_a_builder_that_was_ended_left_goes_though_none_comes_after_it(store, tmp_path):
    """As of a pod that made room for a function's in the middle of its dump, of a function that is gone since."""
    whole = publish(store, "embed.acme", 10)
    folder, kept = store.folder("acme", "gone.acme"), tmp_path / "kept"
    (kept / "images").mkdir(parents=True)
    for name in (".draft-process-old-1", ".draft-process-new-1"):
        (folder / name / "images").mkdir(parents=True)
    os.symlink(kept, folder / ".draft-process-link-1")
    for name in (".draft-process-old-1", ".draft-process-link-1"):
        os.utime(folder / name, (1, 1), follow_symlinks=False)
    os.utime(whole.path, (1, 1))
    evict(store.root, 10**9, Savings())
    assert [path.name for path in folder.iterdir()] == [".draft-process-new-1"]
    assert whole.path.exists()
    assert (kept / "images").exists()


def test_a_functions_folder_can_be_written_by_its_containers_and_reached_by_nobody_else(tmp_path):
    make_folder(tmp_path / "store", "acme/embed.acme")
    make_folder(tmp_path / "store", "acme/embed.acme")  # again, as for each pod
    modes = [(tmp_path / "store" / place).stat().st_mode & 0o777 for place in ("", "acme", "acme/embed.acme")]
    assert modes == [0o700, 0o700, 0o777]


@pytest.mark.parametrize("name", ["../../etc", "acme/../other", "/etc", "acme", "acme/a/b"])
def test_no_name_leads_out_of_the_store(tmp_path, name):
    with pytest.raises(SnapshotError):
        make_folder(tmp_path / "store", name)
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "store"])


def test_a_disks_pace_is_measured_and_leaves_nothing(tmp_path):
    assert disk_bytes_per_s(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert disk_bytes_per_s(tmp_path / "file") == 0
