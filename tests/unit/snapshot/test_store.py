"""The snapshot store: what is published is whole, what is not trusted is refused by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from adapter.errors import Conflict, NotFound, SnapshotCorrupt
from adapter.snapshot import store as module
from adapter.snapshot.store import MANIFEST, VERIFIED, Store, compare, read_snapshot, verify

IDENTITY = {"code": "a", "kernel": "6"}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "snapshots")


def publish(store, identity=IDENTITY, data=b"memory" * 1000, function="fn.ns"):
    with store.building("t", function, identity, "process") as draft:
        (draft.path / "images").mkdir(mode=0o700)
        (draft.path / "images" / "pages-1.img").write_bytes(data)
        return draft.publish({"pid": 5000})


def find(store, identity=IDENTITY):
    return store.find("t", "fn.ns", identity, "process")


def test_what_is_published_is_found_with_its_facts(store):
    published = publish(store)
    assert find(store) == published
    assert published.facts == {"pid": 5000}
    assert not os.stat(published.path).st_mode & 0o077


def test_without_any_it_says_so(store):
    with pytest.raises(NotFound) as caught:
        find(store)
    assert caught.value.code == "none"


def test_a_mismatch_names_the_fields_that_differ(store):
    publish(store)
    with pytest.raises(NotFound) as caught:
        find(store, {"code": "a", "kernel": "7"})
    assert caught.value.code == "mismatch"
    assert "kernel" in caught.value.why
    assert "code" not in caught.value.why


def flip(path):
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))


def truncate(path):
    os.truncate(path, 10)


def link_out(path):
    path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent.parent / "elsewhere")


def open_to_all(path):
    path.chmod(0o666)


def add_file(path):
    (path.parent / "stranger").write_bytes(b"x")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [flip, truncate, link_out, open_to_all, add_file, remove])
def test_a_damaged_snapshot_is_refused_by_name(store, harm):
    snapshot = publish(store)
    harm(snapshot.path / "images" / "pages-1.img")
    with pytest.raises(SnapshotCorrupt) as caught:
        find(store)
    named = caught.value.message + caught.value.why
    assert "pages-1.img" in named or "stranger" in named


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_foreign_owner_is_refused(store):
    snapshot = publish(store)
    os.chown(snapshot.path / "images" / "pages-1.img", 12345, -1)
    with pytest.raises(SnapshotCorrupt, match="12345"):
        find(store)


@pytest.mark.parametrize(
    "manifest",
    [b"", b"[]", b"{}", b'{"format": 99}', b"\xff", b'{"format": 1, "files": {"../../x": {}}}', b"[" * 100_000],
)
def test_a_hostile_manifest_is_refused(store, manifest):
    snapshot = publish(store)
    (snapshot.path / MANIFEST).write_bytes(manifest)
    with pytest.raises(SnapshotCorrupt):
        read_snapshot(snapshot.path)


def test_a_file_without_size_or_checksum_is_refused(store):
    snapshot = publish(store)
    data = json.loads((snapshot.path / MANIFEST).read_bytes())
    data["files"]["images/pages-1.img"] = {}
    (snapshot.path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(SnapshotCorrupt):
        find(store)


def test_names_that_leave_the_folder_are_refused(store):
    snapshot = publish(store)
    data = json.loads((snapshot.path / MANIFEST).read_bytes())
    data["files"]["../outside"] = {"size": 0, "checksum": ""}
    (snapshot.path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(SnapshotCorrupt, match="outside"):
        find(store)


def test_a_damaged_snapshot_is_replaced_by_the_next_build(store):
    add_file(publish(store).path / "images" / "pages-1.img")
    publish(store, data=b"new" * 1000)
    assert find(store).files["images/pages-1.img"]["size"] == 3000


def test_a_copy_is_verified_before_its_first_use(store, tmp_path):
    snapshot = publish(store)
    flip(snapshot.path / "images" / "pages-1.img")
    stats = json.loads((snapshot.path / VERIFIED).read_bytes())
    assert stats["images/pages-1.img"][0] == 6000  # the size is as it was: only the content tells
    with pytest.raises(SnapshotCorrupt, match="damaged"):
        verify(read_snapshot(snapshot.path))


def test_two_builders_of_one_snapshot_do_not_meet(store):
    with store.building("t", "fn.ns", IDENTITY, "process"):
        with pytest.raises(Conflict):
            publish(store)
        publish(store, {"code": "b"})  # another one may be built


def test_what_is_not_published_leaves_nothing(store):
    with pytest.raises(RuntimeError), store.building("t", "fn.ns", IDENTITY, "process") as draft:
        (draft.path / "half").write_bytes(b"x")
        raise RuntimeError
    assert [path.name for path in store.folder("t", "fn.ns").iterdir() if path.is_dir()] == []


def test_the_least_recently_used_goes_first(store):
    old, kept = publish(store, {"code": "old"}), publish(store, {"code": "kept"})
    os.utime(old.path / "used", (1, 1))
    os.utime(kept.path / "used", (2, 2))
    store.limit_bytes = kept.size_bytes * 2
    publish(store, {"code": "new"})
    assert {snapshot.identity["code"] for snapshot in store.all()} == {"kept", "new"}


BUILDER = """
import sys
from pathlib import Path
from adapter.snapshot.store import Store
with Store(Path(sys.argv[1])).building("t", "fn.ns", {"code": "a", "kernel": "6"}, "process") as draft:
    (draft.path / "half").write_bytes(b"x")
    print("half", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_builder_left_is_swept_and_never_seen(store):
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(store.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert store.all() == []
    assert list(store.folder("t", "fn.ns").glob(".draft-*"))
    publish(store)
    assert list(store.folder("t", "fn.ns").glob(".draft-*")) == []


PUBLISHER = """
import os, signal, sys
from pathlib import Path
from adapter.snapshot import store as module
store, steps = module.Store(Path(sys.argv[1])), int(sys.argv[2])

def step(event, arguments):
    global steps
    if event == "open" or event.startswith(("os.", "shutil.")):
        steps -= 1
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(step)
with store.building("t", "fn.ns", {"code": "a", "kernel": "6"}, "process") as draft:
    (draft.path / "images").mkdir(mode=0o700)
    (draft.path / "images" / "pages-1.img").write_bytes(b"new" * 1000)
    draft.publish({"pid": 5000})
"""


@pytest.mark.parametrize("replaces", [False, True], ids=["the first", "a later"])
def test_a_publisher_that_is_killed_at_any_step_leaves_the_old_the_new_or_none(store, replaces):
    """Every file operation of `building` and `publish` is a step; a thousand would be an endless loop."""
    for steps in range(1, 1000):
        if replaces:
            publish(store, data=b"old" * 1000)
        command = [sys.executable, "-c", PUBLISHER, str(store.root), str(steps)]
        code = subprocess.run(command, check=False).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        with suppress(NotFound):  # never `SnapshotCorrupt`: what can be found is whole
            assert find(store).files["images/pages-1.img"]["size"] == 3000
        publish(store, data=b"next" * 1000)  # the lock died with its holder
        assert find(store).files["images/pages-1.img"]["size"] == 4000
        assert list(store.folder("t", "fn.ns").glob(".draft-*")) == []
        shutil.rmtree(store.root)
    assert steps > 20


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_publishes_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(disk)], check=True)
    try:
        store = Store(disk / "snapshots")
        with pytest.raises(OSError, match="No space"):
            publish(store, data=os.urandom(200_000))
        assert store.all() == []
        assert list(store.folder("t", "fn.ns").glob(".draft-*")) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("field", ["tenant", "function", "kind"])
def test_a_manifest_of_another_snapshot_is_refused(store, field):
    publish(store)
    (folder,) = store.root.glob("*/*/process-*")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps({**manifest, field: "another"}))
    with pytest.raises(SnapshotCorrupt, match="of another snapshot"):
        find(store)


@pytest.mark.parametrize("name", ["verified.json", "used"])
@pytest.mark.parametrize("harm", ["pipe", "link"])
def test_own_files_that_are_no_files_are_refused_and_not_opened(store, tmp_path, name, harm):
    publish(store)
    (folder,) = store.root.glob("*/*/process-*")
    (folder / name).unlink()
    if harm == "pipe":
        os.mkfifo(folder / name, 0o600)
    else:
        (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotCorrupt, match=name):
        find(store)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 30, "-1", "true", "1.5"])
def test_numbers_beyond_all_bounds_are_refused(store, number):
    publish(store)
    (folder,) = store.root.glob("*/*/process-*")
    manifest = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(manifest.replace('"created_at_ns": ', f'"created_at_ns": {number}, "x": '))
    with pytest.raises(SnapshotCorrupt):
        find(store)


@pytest.mark.parametrize("harm", ["pipe", "link", "large"])
def test_a_manifest_that_is_replaced_after_it_was_looked_at_is_neither_followed_nor_waited_for(
    store, tmp_path, monkeypatch, harm
):
    path = publish(store).path / MANIFEST
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(path.read_bytes())
    check = module._check_trusted

    def replaced(checked, *words, **more):
        facts = check(checked, *words, **more)
        if checked == path:
            path.unlink()
            if harm == "pipe":
                os.mkfifo(path, 0o600)
            elif harm == "link":
                path.symlink_to(elsewhere)
            else:
                path.write_bytes(elsewhere.read_bytes() + b" " * 2**20)
                path.chmod(0o600)
        return facts

    monkeypatch.setattr(module, "_check_trusted", replaced)
    with pytest.raises(SnapshotCorrupt, match=MANIFEST):
        read_snapshot(path.parent)


def test_folders_that_the_manifest_does_not_list_are_refused(store):
    path = publish(store).path
    (path / "folder-1" / "below").mkdir(parents=True)
    with pytest.raises(SnapshotCorrupt, match="folder-"):
        read_snapshot(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_looks_at_what_belongs_to_another_user_and_trusts_it_no_more_than_before(store):
    snapshot = publish(store)
    for path in (snapshot.path, *snapshot.path.rglob("*")):
        os.chown(path, 1000, 1000)
    with pytest.raises(SnapshotCorrupt, match="belongs to user 1000"):
        read_snapshot(snapshot.path)
    compare(read_snapshot(snapshot.path, owner=1000))
    assert {path.stat().st_uid for path in snapshot.path.rglob("*")} == {1000}
