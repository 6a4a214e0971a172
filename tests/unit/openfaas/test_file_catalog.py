import asyncio
import errno
import json
import stat

import pytest

from adapter.errors import Conflict, NotFound, StorageError
from adapter.openfaas.file_catalog import FileCatalog
from adapter.openfaas.wire import FunctionDeployment


def run(work):
    return asyncio.run(work)


FN = FunctionDeployment("fn", "fn:1", env_vars={"a": "b"}, secrets=("s",))


def test_what_was_put_is_there_in_the_next_life(state_dir):
    catalog = FileCatalog(state_dir)
    run(catalog.put(FN, "then"))
    run(catalog.put(FunctionDeployment("fn", "fn:2", "other"), "then"))
    entry = run(catalog.put(FN, "later"))
    assert (entry.revision, entry.created_at) == (2, "then")
    again = FileCatalog(state_dir)
    assert again.get("fn.openfaas-fn") == entry
    assert [e.deployment.image for e in again.functions("other")] == ["fn:2"]
    run(again.remove("fn.other"))
    assert [e.deployment.key for e in FileCatalog(state_dir).functions()] == ["fn.openfaas-fn"]
    with pytest.raises(NotFound):
        run(again.remove("fn.other"))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"deployment": {}}', b'{"deployment": {"nonsense": 1}}'])
def test_a_damaged_file_is_left_out_and_the_others_stay(state_dir, damage):
    run(FileCatalog(state_dir).put(FN, "then"))
    (state_dir / "functions" / "bad.openfaas-fn.json").write_bytes(damage)
    (state_dir / "functions" / ".fn.openfaas-fn.json.part").write_bytes(b"half")
    catalog = FileCatalog(state_dir)
    assert [e.deployment.service for e in catalog.functions()] == ["fn"]
    assert not (state_dir / "functions" / ".fn.openfaas-fn.json.part").exists()


def test_secrets(state_dir):
    catalog = FileCatalog(state_dir)
    run(catalog.put_secret("ns", "token", b"\0one", new=True))
    with pytest.raises(Conflict):
        run(catalog.put_secret("ns", "token", b"two", new=True))
    with pytest.raises(NotFound):
        run(catalog.put_secret("ns", "absent", b"two", new=False))
    run(catalog.put_secret("ns", "token", b"two", new=False))
    path = state_dir / "secrets" / "ns" / "token"
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert (run(catalog.secrets("ns")), run(catalog.secrets("other"))) == (["token"], [])
    run(catalog.remove_secret("ns", "token"))
    with pytest.raises(NotFound):
        run(catalog.remove_secret("ns", "token"))


def test_namespaces(state_dir):
    catalog = FileCatalog(state_dir)
    assert catalog.namespaces() == ["openfaas-fn"]
    run(catalog.put_namespace("second", {"labels": {"a": "b"}}, new=True))
    with pytest.raises(Conflict):
        run(catalog.put_namespace("second", {}, new=True))
    with pytest.raises(NotFound):
        run(catalog.put_namespace("third", {}, new=False))
    assert catalog.namespace("second") == {"name": "second", "annotations": {}, "labels": {"a": "b"}}
    run(catalog.put(FunctionDeployment("fn", "fn", "second"), "then"))
    for name in ("second", "openfaas-fn"):
        with pytest.raises(Conflict):
            run(catalog.remove_namespace(name))
    run(catalog.remove("fn.second"))
    run(catalog.remove_namespace("second"))
    with pytest.raises(NotFound):
        catalog.namespace("second")


def test_no_secret_is_in_a_function_file(state_dir):
    catalog = FileCatalog(state_dir)
    run(catalog.put_secret("openfaas-fn", "s", b"s3cret", new=True))
    run(catalog.put(FN, "then"))
    text = (state_dir / "functions" / "fn.openfaas-fn.json").read_text()
    assert "s3cret" not in text
    assert json.loads(text)["deployment"]["secrets"] == ["s"]


def test_secrets_end_with_their_namespace(state_dir):
    catalog = FileCatalog(state_dir)
    run(catalog.put_namespace("team", {}, new=True))
    run(catalog.put_secret("team", "db", b"theirs", new=True))
    run(catalog.remove_namespace("team"))
    assert list((state_dir / "secrets").rglob("db")) == []
    (state_dir / "secrets" / "team" / "left").write_bytes(b"theirs too")
    run(catalog.put_namespace("team", {}, new=True))
    assert run(catalog.secrets("team")) == []


def test_a_part_of_a_secret_does_not_outlive_the_next_start(state_dir):
    run(FileCatalog(state_dir).put_secret("ns", "token", b"one", new=True))
    part = state_dir / "secrets" / "ns" / ".token.part"
    part.write_bytes(b"half")
    FileCatalog(state_dir)
    assert not part.exists()


def test_a_full_disk_is_told_and_changes_nothing(state_dir, monkeypatch):
    catalog = FileCatalog(state_dir)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("adapter.openfaas.file_catalog.write_whole", full)
    for write in (
        lambda: run(catalog.put(FN, "then")),
        lambda: run(catalog.put_secret("ns", "token", b"one", new=True)),
        lambda: run(catalog.put_namespace("team", {}, new=True)),
    ):
        with pytest.raises(StorageError) as caught:
            write()
        assert (caught.value.http_status, caught.value.why) == (507, "No space left on device.")
    assert (catalog.functions(), run(catalog.secrets("ns")), catalog.namespaces()) == ([], [], ["openfaas-fn"])
