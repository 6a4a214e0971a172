"""Snapshots beside a real image in a real registry, and whether a container sees the machine that the node does."""

import json
from pathlib import Path

from adapter.cli.main import run
from adapter.snapshot.identity import machine_identity
from adapter.snapshot.store import Store, compare, read_snapshot

_PRINT_MACHINE = (
    "import json; from adapter.snapshot.identity import machine_identity; print(json.dumps(machine_identity()))"
)


def take(store):
    with store.building("default", "fn.openfaas-fn", {"code": "1", **machine_identity()}, "process") as draft:
        (draft.path / "images").mkdir(mode=0o700)
        with (draft.path / "images/memory.img").open("wb") as file:
            file.seek(2**30)
            file.write(b"memory" * 1_000_000)
            file.truncate(2**31)
        return draft.publish({})


def test_a_snapshot_is_kept_beside_an_image_that_other_tools_pushed(run_image, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "none.json"))
    state, node = tmp_path / "state", tmp_path / "node"
    taken = take(Store(state / "snapshots"))
    for words in (["push", run_image], ["inspect", run_image], ["pull", run_image, "--into", str(node)]):
        assert run(["snapshot", *words, "--state", str(state), "-o", "json"]) == 0
        [said] = json.loads(capsys.readouterr().out)
        assert said["key"] == taken.key
    back = read_snapshot(Path(said["path"]), owner=1000)  # the image's user, who starts from it
    compare(back)
    assert back.files == taken.files
    assert back.size_bytes < 2**24  # the hole is one again


def test_a_container_sees_the_machine_as_its_node_does(run_image, run_once, repository):
    """By these fields a pull on the node chooses what a replica in a container will accept."""
    said = run_once(
        run_image,
        "python3",
        "-c",
        _PRINT_MACHINE,
        mounts={repository / "adapter": "/shim/adapter:ro"},
        PYTHONPATH="/shim",
    )
    assert json.loads(said.splitlines()[-1]) == machine_identity()
