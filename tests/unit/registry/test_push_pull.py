"""Snapshots to a registry and back: every registry, holes kept, cut, killed, full disks, and what fits a machine."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from adapter.errors import (
    AdapterError,
    Conflict,
    NotFound,
    SnapshotCorrupt,
    SnapshotMismatch,
    StorageError,
    Unavailable,
)
from adapter.registry import artifact, pull as pulling
from adapter.registry.pull import choose, pull, snapshots_of
from adapter.registry.push import push
from adapter.snapshot.identity import machine_identity
from adapter.snapshot.store import Store, read_snapshot, verify
from tests.fakes.cutting_proxy import CuttingProxy
from tests.unit.registry.conftest import client_of, put_image, take

MACHINE = machine_identity()
CHUNK_BYTES = 2**18


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Many chunks of few bytes."""
    monkeypatch.setattr(artifact, "CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture
def other(tmp_path):
    """The empty store of another node."""
    return Store(tmp_path / "other")


def pull_into(store, client, image, **options):
    [entry] = choose(snapshots_of(client, image.digest), MACHINE, "image")
    return pull(client, image.digest, entry.descriptor, store, MACHINE, **options)


def files_in(store):
    return [path for path in store.root.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_snapshot_comes_back_as_it_was_on_an_empty_node(client, store, other):
    snapshot, image = take(store, criu="/opt/criu"), put_image(client)
    pushed = push(client, image, snapshot)
    assert 0 < pushed.compressed_bytes < pushed.size_bytes + CHUNK_BYTES
    assert pushed.size_bytes <= snapshot.size_bytes < 2**24  # no holes are sent
    back = pull_into(other, client, image).snapshot
    assert (back.identity, back.facts, back.files) == (snapshot.identity, snapshot.facts, snapshot.files)
    assert (back.key, back.kind, back.function, back.created_at_ns) == (
        snapshot.key,
        snapshot.kind,
        snapshot.function,
        snapshot.created_at_ns,
    )
    verify(back, always=True)
    assert back.size_bytes <= snapshot.size_bytes * 1.1  # holes are holes
    assert {path.stat().st_mode & 0o777 for path in (back.path / "images").iterdir()} == {0o400}
    assert other.find("default", snapshot.function, snapshot.identity, "process").path == back.path


def test_nothing_is_read_again_after_it_has_come(client, store, other, monkeypatch):
    snapshot, image = take(store), put_image(client)
    push(client, image, snapshot)
    monkeypatch.setattr("adapter.snapshot.store.file_checksum", lambda path: pytest.fail(f"{path} is read again"))
    pull_into(other, client, image)
    other.find("default", snapshot.function, snapshot.identity, "process")


def test_the_same_snapshot_gives_the_same_artifact_and_is_sent_once(client, store):
    snapshot, image = take(store), put_image(client)
    first, second = (push(client, image, snapshot) for _ in range(2))
    assert first.digest == second.digest
    assert first.sent_bytes > 0
    assert second.sent_bytes == 0
    assert len(snapshots_of(client, image.digest)) == 1


def test_a_copy_gives_the_same_artifact_as_the_original(client, store, other):
    snapshot, image = take(store), put_image(client)
    first = push(client, image, snapshot)
    assert push(client, image, pull_into(other, client, image).snapshot).digest == first.digest


def test_what_is_there_already_is_not_fetched(client, store, other):
    image = put_image(client)
    push(client, image, take(store))
    assert pull_into(other, client, image).received_bytes > 0
    assert pull_into(other, client, image).received_bytes == 0


def test_a_damaged_copy_is_fetched_anew(client, store, other):
    image = put_image(client)
    push(client, image, take(store))
    memory = pull_into(other, client, image).snapshot.path / "images/memory.img"
    memory.chmod(0o600)
    with memory.open("r+b") as file:
        file.truncate(10)
    verify(pull_into(other, client, image).snapshot, always=True)


def test_it_may_be_for_another_function_and_tenant(client, store, other):
    snapshot, image = take(store), put_image(client)
    push(client, image, snapshot)
    pull_into(other, client, image, tenant="blue", function="copy.prod")
    assert other.find("blue", "copy.prod", snapshot.identity, "process").function == "copy.prod"


def test_a_snapshot_that_is_damaged_here_is_not_sent(client, store):
    snapshot, image = take(store), put_image(client)
    memory = snapshot.path / "images/memory.img"
    with memory.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(SnapshotCorrupt):
        push(client, image, snapshot)
    assert snapshots_of(client, image.digest) == []


# What fits


def test_of_many_those_that_fit_are_chosen_the_newest_of_each(client, store):
    image = put_image(client)
    for number, kernel in enumerate(["old", MACHINE["kernel"], MACHINE["kernel"]]):
        push(client, image, take(store, number=number, machine={**MACHINE, "kernel": kernel}))
    weights = take(store, kind="weights", machine={})
    push(client, image, weights)
    found = snapshots_of(client, image.digest)
    assert len(found) == 4
    chosen = choose(found, MACHINE, "image")
    assert [entry.kind for entry in chosen] == ["weights", "process", "process"]
    assert {entry.identity.get("kernel") for entry in chosen} == {None, MACHINE["kernel"]}


def test_where_none_fits_each_difference_is_named(client, store):
    image = put_image(client)
    push(client, image, take(store, machine={**MACHINE, "kernel": "6.0"}))
    push(client, image, take(store, number=1, machine={**MACHINE, "cpu": "x", "gpus": "y"}))
    with pytest.raises(SnapshotMismatch) as caught:
        choose(snapshots_of(client, image.digest), MACHINE, "team/fn:1")
    assert "team/fn:1" in caught.value.message
    assert "kernel" in caught.value.why
    assert "cpu, gpus" in caught.value.why
    assert caught.value.hint


def test_an_image_without_snapshots_says_how_to_get_one(client):
    image = put_image(client)
    with pytest.raises(NotFound) as caught:
        choose(snapshots_of(client, image.digest), MACHINE, "team/fn:1")
    assert "gpufn snapshot push team/fn:1" in caught.value.hint


def test_a_snapshot_of_another_build_of_the_tag_is_not_seen(client, store):
    push(client, put_image(client), take(store))
    assert snapshots_of(client, put_image(client, "2").digest) == []


# What goes wrong


def test_a_pull_that_is_cut_goes_on_and_fetches_little_again(client, host, proxy, store, other):
    image = put_image(client)
    pushed = push(client, image, take(store))
    proxy.cuts = [CHUNK_BYTES // 2, CHUNK_BYTES // 2, CHUNK_BYTES // 4]
    with client_of(proxy.host) as cut:
        snapshot = pull_into(other, cut, image).snapshot
    assert proxy.cuts == []
    verify(snapshot, always=True)
    assert proxy.received < pushed.compressed_bytes + CHUNK_BYTES


def test_a_pull_from_a_registry_that_goes_down_publishes_nothing_and_the_next_fetches_the_rest(
    fake, store, other, monkeypatch
):
    with client_of(fake.host) as client:
        image = put_image(client)
        pushed = push(client, image, take(store))
        monkeypatch.setattr(pulling, "_THREADS", 1)
        lost = dict(list(fake.blobs.items())[-4:])
        kept = {digest: data for digest, data in fake.blobs.items() if digest not in lost or data.startswith(b"{")}
        everything, fake.blobs = fake.blobs, kept
        with pytest.raises(NotFound):
            pull_into(other, client, image)
        assert other.all() == []
        fake.blobs = everything
        pulled = pull_into(other, client, image)
    verify(pulled.snapshot, always=True)
    assert 0 < pulled.received_bytes < pushed.compressed_bytes


_PULL = """
import sys
from pathlib import Path
from adapter.registry import artifact, pull as pulling
from adapter.registry.client import Client
from adapter.registry.reference import Reference
from adapter.snapshot.identity import machine_identity
from adapter.snapshot.store import Store
pulling._THREADS = 1
artifact.CHUNK_BYTES = int(sys.argv[4])
client = Client(Reference.parse(sys.argv[1] + "/team/fn:1"))
[entry] = pulling.snapshots_of(client, sys.argv[2])
pulling.pull(client, sys.argv[2], entry.descriptor, Store(Path(sys.argv[3])), machine_identity())
"""


def test_a_pull_that_is_killed_leaves_what_the_next_goes_on_from(client, host, store, other):
    image = put_image(client)
    pushed = push(client, image, take(store))
    with CuttingProxy(int(host.rpartition(":")[2])).running() as proxy:
        proxy.on_bytes = lambda count: setattr(proxy, "hangs", count > 3 * CHUNK_BYTES)
        command = [sys.executable, "-c", _PULL, proxy.host, image.digest, str(other.root), str(CHUNK_BYTES)]
        with subprocess.Popen(command) as process:
            try:
                assert proxy.hung.wait(60)
            finally:
                process.send_signal(signal.SIGKILL)
    assert other.all() == []
    pulled = pull_into(other, client, image)
    verify(pulled.snapshot, always=True)
    assert pulled.received_bytes < pushed.compressed_bytes - CHUNK_BYTES
    assert [path for path in files_in(other) if ".receiving" in str(path)] == []


def test_parts_that_were_damaged_meanwhile_are_fetched_again(client, store, other, monkeypatch):
    snapshot, image = take(store), put_image(client)
    push(client, image, snapshot)
    with monkeypatch.context() as patch:
        patch.setattr("adapter.snapshot.store.Draft.adopt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("os.unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            pull_into(other, client, image)
    draft = next(other.root.glob(".receiving/*/.receiving-*"))
    (draft / "receiving").write_text(mark_of(client, image))
    with (draft / "images/memory.img").open("r+b") as file:
        file.write(b"damage")
    pulled = pull_into(other, client, image)
    verify(pulled.snapshot, always=True)
    assert 0 < pulled.received_bytes < 3 * CHUNK_BYTES


def mark_of(client, image):
    [entry] = snapshots_of(client, image.digest)
    digest: str = client.get_manifest(entry.descriptor.digest).data["config"]["digest"]
    return digest


def test_parts_of_another_snapshot_with_the_same_key_are_not_used(client, store, other):
    image = put_image(client)
    snapshot = take(store)
    push(client, image, snapshot)
    draft = other.root / ".receiving" / f"default@{snapshot.function}" / f".receiving-process-{snapshot.key}"
    (draft / "images").mkdir(parents=True, mode=0o700)
    (draft / "receiving").write_text("sha256:" + "0" * 64)
    with (draft / "images/memory.img").open("wb") as file:
        file.seek(2**29)
        file.write(b"where a hole has to be")
    (draft / "evil").symlink_to("/etc/passwd")
    verify(pull_into(other, client, image).snapshot, always=True)


def test_what_a_container_puts_into_its_folder_leads_a_pull_nowhere(client, store, other, tmp_path):
    """The folder is a mount of a function's container, which may be hostile; the pull may be root's."""
    image = put_image(client)
    snapshot = take(store)
    push(client, image, snapshot)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "memory.img").write_text("untouched")
    (victim / "memory.img").chmod(0o644)
    before = {path: os.lstat(path) for path in (victim, victim / "memory.img")}
    folder = other.folder("default", snapshot.function)
    draft = folder / f".receiving-process-{snapshot.key}"
    draft.mkdir(mode=0o700)
    (draft / "receiving").write_text(mark_of(client, image))
    (draft / "images").symlink_to(victim)
    (folder / ".x.lock").symlink_to(victim / "memory.img")
    (folder / f".process-{snapshot.key}.lock").symlink_to(victim / "memory.img")
    (folder / f"process-{snapshot.key}").symlink_to(victim)
    verify(pull_into(other, client, image).snapshot, always=True)
    assert (victim / "memory.img").read_text() == "untouched"
    for path, facts in before.items():
        now = os.lstat(path)
        assert (now.st_uid, now.st_mode, now.st_ino) == (facts.st_uid, facts.st_mode, facts.st_ino)


def test_a_push_reads_nothing_through_a_link(client, store, tmp_path):
    snapshot, image = take(store), put_image(client)
    (snapshot.path / "images").rename(tmp_path / "host")  # a copy would fill its holes
    (snapshot.path / "images").symlink_to(tmp_path / "host")
    with pytest.raises((OSError, AdapterError)):
        push(client, image, snapshot)
    assert not snapshots_of(client, image.digest)


def test_two_pulls_of_the_same_do_not_meet(client, store, other):
    snapshot, image = take(store), put_image(client)
    push(client, image, snapshot)
    receiving = other.receiving("default", snapshot.function, snapshot.identity, "process")
    with receiving, pytest.raises(Conflict) as caught:
        pull_into(other, client, image)
    assert caught.value.code == "snapshot-busy"
    pull_into(other, client, image)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_fills_or_breaks_leaves_nothing(client, store, other, monkeypatch, number):
    image = put_image(client)
    push(client, image, take(store))
    real, left = os.pwrite, [3]

    def pwrite(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(StorageError) as caught:
            pull_into(other, client, image)
    assert str(other.root) in caught.value.message
    assert os.strerror(number) in caught.value.why
    assert caught.value.hint
    assert (caught.value.code == "disk-full") == (number in {errno.ENOSPC, errno.EDQUOT})
    assert files_in(other) == []
    pull_into(other, client, image)


def test_a_disk_that_is_full_already_is_told_before_anything_comes(client, store, other, monkeypatch):
    image = put_image(client)
    push(client, image, take(store))
    there = os.statvfs(store.root)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*there[:4], 10, *there[5:])))
    received = client.traffic.received_bytes
    with pytest.raises(StorageError) as caught:
        pull_into(other, client, image)
    assert caught.value.code == "disk-full"
    assert client.traffic.received_bytes - received < CHUNK_BYTES // 4
    assert files_in(other) == []


def test_a_folder_that_cannot_be_written_is_named(client, store, tmp_path):
    image = put_image(client)
    push(client, image, take(store))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        pull_into(Store(tmp_path / "file"), client, image)
    assert caught.value.code == "not-written"


def test_a_push_to_a_registry_that_fails_enters_nothing(fake, store):
    with client_of(fake.host) as client:
        image = put_image(client)
        fake.answers.extend([(404, {}), (202, {"Location": "/v2/team/fn/blobs/uploads/1"})])
        fake.answers.extend([(500, {})] * 200)
        with pytest.raises(Unavailable):
            push(client, image, take(store))
        fake.answers.clear()
        assert snapshots_of(client, image.digest) == []


def test_a_push_and_a_pull_tell_how_far_they_are(client, store, other):
    image, heard = put_image(client), []
    pushed = push(client, image, take(store), on_progress=lambda done, total: heard.append((done, total)))
    assert heard[0] == (0, pushed.size_bytes)
    assert max(heard) == (pushed.size_bytes, pushed.size_bytes)
    heard.clear()
    pull_into(other, client, image, on_progress=lambda done, total: heard.append((done, total)))
    assert max(heard) == (pushed.size_bytes, pushed.size_bytes)


# The store's side


def test_a_draft_that_nobody_finishes_goes_after_a_day(store):
    with store.receiving("default", "fn.x", {"code": "1"}, "process") as draft:
        (draft.path / "part").write_bytes(b"x")
    with store.receiving("default", "fn.x", {"code": "2"}, "process"):
        assert (draft.path / "part").exists()
    os.utime(draft.path, (1, 1))
    with store.receiving("default", "fn.x", {"code": "2"}, "process"):
        assert not draft.path.exists()


def test_a_draft_with_more_or_other_files_than_listed_is_not_adopted(store):
    files = {"memory.img": {"size": 3, "checksum": "0" * 64}}
    with store.receiving("default", "fn.x", {"code": "1"}, "process") as draft:
        (draft.path / "memory.img").write_bytes(b"four")
        with pytest.raises(SnapshotCorrupt):
            draft.adopt({}, files, 1)
        (draft.path / "memory.img").chmod(0o600)
        (draft.path / "memory.img").write_bytes(b"abc")
        (draft.path / "more").write_bytes(b"")
        with pytest.raises(SnapshotCorrupt):
            draft.adopt({}, files, 1)
        (draft.path / "more").unlink()
        assert read_snapshot(draft.adopt({}, files, 1).path).files == files
