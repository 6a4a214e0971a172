"""What goes wrong while a snapshot is taken or restored: said by name, nothing left, and every request answered."""

import asyncio
import json
import os
import subprocess
from contextlib import contextmanager

import pytest

from adapter.keys import ENV_CRIU
from adapter.records import EventName
from adapter.snapshot.identity import key_of
from adapter.snapshot.process import find_criu
from adapter.snapshot.store import MANIFEST
from tests.fakes.host import Listener, ask, deployment, running, write_function

pytestmark = [pytest.mark.e2e, pytest.mark.criu]

HANDLER = "def load(device):\n    return 'm'\ndef handle(e, c):\n    return c.model\n"
LARGE = "def load(device):\n    return bytearray(range(256)) * 2**16\ndef handle(e, c):\n    return c.model[65:66]\n"


def one_life(state, functions, *, snapshot=True):
    """The answer of one life begun from zero, its start record, and what became of its snapshot."""

    async def scenario():
        wanted = deployment("fn")
        async with running(state, functions) as host:
            await host.prepare(wanted)
            listener = Listener()
            replica = await host.start(wanted, listener)
            answer = await ask(replica, b"")
            record = (await listener.heard(EventName.STARTED)).fields["record"]
            taken = (await listener.heard(EventName.SNAPSHOT, 2)).fields if snapshot else {}
            await replica.stop(30)
            return answer, record, taken

    return asyncio.run(asyncio.wait_for(scenario(), 110))


def left(state):
    """Everything in the snapshot folder that is neither a lock nor a published snapshot."""
    return [path.name for path in (state / "snapshots").glob("*/*/*") if path.name.startswith(".draft")]


def published(state):
    return list((state / "snapshots").glob("*/*/process-*"))


@pytest.fixture
def functions(tmp_path):
    write_function(tmp_path / "functions", "fn", HANDLER)
    return tmp_path / "functions"


@pytest.fixture
def criu(tmp_path, monkeypatch):
    """Use a shell script as CRIU; ``$CRIU`` in it is the real one, ``$1`` the verb."""
    real = find_criu().path

    def use(script):
        path = tmp_path / "criu"
        path.write_text(f'#!/bin/sh\nCRIU={real}\n{script}\nexec "$CRIU" "$@"\n')
        path.chmod(0o755)
        monkeypatch.setenv(ENV_CRIU, str(path))

    return use


def test_without_criu_a_function_works_and_says_what_is_missing(state_dir, functions, monkeypatch):
    monkeypatch.setenv(ENV_CRIU, "/nowhere/criu")
    answer, record, taken = one_life(state_dir, functions)
    assert (answer, record["rung"]) == (b"m", "load")
    assert (taken["state"], taken["code"]) == ("skipped", "criu-missing")
    assert "/nowhere/criu" in taken["reason"]
    assert not left(state_dir)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('[ "$1" != dump ] || exit 1', "code 1"),
        ('[ "$1" != check ] || { echo "no rights here" >&2; exit 1; }', "no rights here"),
        ('[ "$1" != dump ] || kill -9 $$', "code -9"),
        ('[ "$1" != dump ] || { "$CRIU" "$@"; kill -9 $$; }', "code -9"),
    ],
    ids=["dump fails", "no rights", "killed before its dump", "killed after its dump"],
)
def test_a_criu_that_fails_costs_nothing_but_the_snapshot(state_dir, functions, criu, script, reason):
    criu(script)
    answer, record, taken = one_life(state_dir, functions)
    assert (answer, record["rung"]) == (b"m", "load")
    assert taken["state"] in ("failed", "skipped")
    assert reason in taken["reason"]
    assert not left(state_dir)
    assert not published(state_dir)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_snapshotter_that_is_killed_leaves_what_the_next_one_sweeps(state_dir, functions, criu, monkeypatch, when):
    dump = '"$CRIU" "$@"; ' if when == "after" else ""
    criu(f'[ "$1" != dump ] || {{ {dump}kill -9 $PPID; exit 0; }}')
    answer, _, taken = one_life(state_dir, functions)
    assert answer == b"m"
    assert (taken["state"], taken["code"]) == ("failed", "snapshotter-died")
    assert not published(state_dir)
    monkeypatch.delenv(ENV_CRIU)
    answer, record, taken = one_life(state_dir, functions)
    assert (answer, record["rung"], taken["state"]) == (b"m", "load", "published")
    assert not left(state_dir)
    answer, record, _ = one_life(state_dir, functions, snapshot=False)
    assert (answer, record["rung"]) == (b"m", "restore")


@pytest.mark.parametrize(
    "script",
    [
        '[ "$1" != restore ] || exit 1',
        '[ "$1" != restore ] || kill -9 $$',
        # It restores the process, and is killed before it can say so.
        '[ "$1" != restore ] || { "$CRIU" "$@"; kill -9 $$; }',
    ],
    ids=["fails", "killed before", "killed after"],
)
def test_a_restore_that_fails_is_dropped_and_the_request_answered(state_dir, functions, criu, script):
    criu(script)
    assert one_life(state_dir, functions)[2]["state"] == "published"
    answer, record, _ = one_life(state_dir, functions, snapshot=False)
    assert answer == b"m"
    if record["rung"] == "load":
        (skipped,) = [one for one in record["skipped"] if one["rung"] == "restore"]
        assert skipped["code"] == "restore-failed"
        assert sum(phase["end_ns"] - phase["start_ns"] for phase in record["phases"]) <= record["total_ns"]


@pytest.mark.parametrize("field", ["kernel", "cpu"])
def test_a_snapshot_of_another_machine_is_not_used_and_named(state_dir, functions, field):
    one_life(state_dir, functions)
    (folder,) = published(state_dir)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["identity"][field] = "another"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    folder.rename(folder.with_name(f"process-{key_of(manifest['identity'])}"))
    answer, record, taken = one_life(state_dir, functions)
    assert (answer, record["rung"], taken["state"]) == (b"m", "load", "published")
    (skipped,) = [one for one in record["skipped"] if one["rung"] == "restore"]
    assert skipped["code"] == "mismatch"
    assert f"Differs in: {field}." in skipped["reason"]


@pytest.mark.parametrize("harm", ["truncated", "link", "foreign owner", "missing"])
def test_a_damaged_snapshot_is_refused_by_name_and_replaced(state_dir, functions, harm):
    one_life(state_dir, functions)
    (folder,) = published(state_dir)
    pages = folder / "images" / "pages-1.img"
    match harm:
        case "truncated":
            os.truncate(pages, pages.stat().st_size // 2)
        case "link":
            pages.rename(state_dir / "elsewhere")
            pages.symlink_to(state_dir / "elsewhere")
        case "foreign owner":
            os.chown(pages, 12345, 12345)
        case "missing":
            pages.unlink()
    answer, record, taken = one_life(state_dir, functions)
    assert (answer, record["rung"], taken["state"]) == (b"m", "load", "published")
    (skipped,) = [one for one in record["skipped"] if one["rung"] == "restore"]
    assert skipped["code"] == "snapshot-corrupt"
    assert "pages-1.img" in skipped["reason"]
    assert one_life(state_dir, functions, snapshot=False)[1]["rung"] == "restore"


@contextmanager
def small_disk(folder, size):
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["1m", "8m", "24m"])
def test_a_disk_that_fills_up_while_dumping_costs_nothing_but_the_snapshot(state_dir, tmp_path, size):
    """Too small for CRIU's own files, for the memory, and for the rewritten memory beside it."""
    write_function(tmp_path / "functions", "fn", LARGE)
    with small_disk(state_dir / "snapshots", size):
        answer, record, taken = one_life(state_dir, tmp_path / "functions")
        assert (answer, record["rung"]) == (b"A", "load")
        assert taken["state"] == "failed"
        assert "No space left" in taken["reason"]
        assert not left(state_dir)
        assert not published(state_dir)


@pytest.mark.parametrize(
    ("facts", "code"),
    [({"pid": "x"}, "snapshot-corrupt"), ({"pipes": 5}, "snapshot-corrupt")],
    ids=str,
)
def test_a_manifest_that_says_something_else_is_dropped(state_dir, functions, facts, code):
    one_life(state_dir, functions)
    (folder,) = published(state_dir)
    changed(folder, **facts)
    answer, record, taken = one_life(state_dir, functions)
    assert (answer, record["rung"], taken["state"]) == (b"m", "load", "published")
    assert [one["code"] for one in record["skipped"] if one["rung"] == "restore"] == [code]


def test_no_program_that_a_manifest_names_is_run_and_our_own_restores(state_dir, functions, tmp_path):
    """As on another node, where CRIU lies at another place."""
    one_life(state_dir, functions)
    (folder,) = published(state_dir)
    evil = tmp_path / "evil"
    evil.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    evil.chmod(0o755)
    changed(folder, criu=str(evil))
    answer, record, _ = one_life(state_dir, functions, snapshot=False)
    assert (answer, record["rung"]) == (b"m", "restore")
    assert not (tmp_path / "was-run").exists()


def changed(folder, **facts):
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["facts"] |= facts
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_function_that_changes_while_it_is_dumped_is_not_kept(state_dir, tmp_path):
    changes = "import pathlib, time\npathlib.Path(__file__).with_name('data').write_text(str(time.time_ns()))\n"
    write_function(tmp_path / "functions", "fn", changes + HANDLER)
    answer, _, taken = one_life(state_dir, tmp_path / "functions")
    assert answer == b"m"
    assert (taken["state"], taken["code"]) == ("failed", "changed")
    assert "code" in taken["reason"]
    assert not published(state_dir)
