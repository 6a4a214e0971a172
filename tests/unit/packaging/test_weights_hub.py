"""A repository of a hub, through the hub's own client library, against a stand-in: see `tests.fakes.hub`."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapter.errors import AdapterError
from adapter.packaging.sources import FetchedWeights, WeightsConfig, fetch_weights
from tests.fakes.checkpoints import safetensors
from tests.fakes.hub import COMMIT, Hub, serving

FILES = {
    "model.safetensors": safetensors(a=[1.0] * 500, b=[2.0]),
    "config.json": b'{"size": 2}',
    "1_Pooling/config.json": b"{}",
    "pytorch_model.bin": b"the same once more",
    "modeling_net.py": b"raise SystemExit('code of a stranger')",
    "README.md": b"# net",
    "onnx/model.onnx": b"and again",
}
NET = WeightsConfig("hf://org/net@v1")


@pytest.fixture(autouse=True)
def _hub_for_us_alone(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    (tmp_path / "layers").mkdir()

    def fetch(hub: Hub, config: WeightsConfig = NET, **options) -> FetchedWeights:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        return fetch_weights(config, tmp_path, tmp_path / "layers" / "weights", **options)

    return fetch


def fails(fetch, hub: Hub, tmp_path: Path, config: WeightsConfig = NET, **options) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        fetch(hub, config, **options)
    assert list((tmp_path / "layers").iterdir()) == []
    assert caught.value.why
    assert caught.value.hint
    return caught.value


def test_a_revision_becomes_weights_and_no_more_is_fetched_than_is_needed(fetch):
    with serving(Hub(FILES, large=frozenset({"model.safetensors"}))) as hub:
        fetched = fetch(hub)
        asked = {path.partition("/resolve/")[2].partition("/")[2] for _, path, _ in hub.seen if "/resolve/" in path}
    assert asked == {"model.safetensors", "config.json", "1_Pooling/config.json"}
    assert fetched.source == f"hf://org/net@{COMMIT}"
    assert fetched.tensors == 2
    assert fetched.left_out == ("README.md", "modeling_net.py", "onnx/model.onnx", "pytorch_model.bin")
    found = {path.relative_to(fetched.folder).as_posix() for path in fetched.folder.rglob("*") if not path.is_dir()}
    assert found == {
        "weights.safetensors", "weights.json", "source.json",
        "model/model.safetensors", "model/config.json", "model/1_Pooling/config.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_another_digest_than_the_hub_says_is_refused(fetch, tmp_path, name):
    with serving(Hub(FILES, large=frozenset({"model.safetensors"}))) as hub:
        hub.damaged.add(name)
        error = fails(fetch, hub, tmp_path)
    assert (error.code, name in error.message) == ("weights-digest", True)


def test_a_connection_that_is_cut_goes_on(fetch):
    with serving(Hub(FILES, large=frozenset({"model.safetensors"}))) as hub:
        hub.cut.add("model.safetensors")
        assert fetch(hub).tensors == 2


def test_the_token_is_the_one_of_the_file_and_is_kept_nowhere(fetch, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_builder")
    (tmp_path / "token").write_text("hf_of_the_build\n")
    with serving(Hub(FILES, token="hf_of_the_build")) as hub:
        fetched = fetch(hub, token_file=tmp_path / "token")
        assert {login for _, _, login in hub.seen} == {"Bearer hf_of_the_build"}
    for path in fetched.folder.rglob("*"):
        assert path.is_dir() or b"hf_of" not in path.read_bytes()
    assert "hf_of" not in "".join(capfd.readouterr())


def test_without_a_token_none_of_the_builders_is_sent(fetch, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_builder")
    with serving(Hub(FILES, token="hf_of_the_build")) as hub:
        error = fails(fetch, hub, tmp_path)
        assert {login for _, _, login in hub.seen} == {""}
    assert (error.code, "token" in error.why) == ("weights-missing", True)


def test_a_token_that_is_refused_is_in_no_error(fetch, tmp_path):
    (tmp_path / "token").write_text("hf_wrong")
    with serving(Hub(FILES, token="hf_right")) as hub:
        error = fails(fetch, hub, tmp_path, token_file=tmp_path / "token")
    assert "hf_" not in repr((error.message, error.why, error.hint, error.__cause__, error.__context__))


def test_a_token_that_cannot_be_read_is_said(fetch, tmp_path):
    with serving(Hub(FILES)) as hub:
        assert fails(fetch, hub, tmp_path, token_file=tmp_path / "gone").code == "weights-token"


@pytest.mark.parametrize(
    ("source", "says"), [("hf://org/net@v9", "no revision v9"), ("hf://org/other@v1", "no such repository")]
)
def test_what_the_hub_has_not_is_said(fetch, tmp_path, source, says):
    with serving(Hub(FILES)) as hub:
        error = fails(fetch, hub, tmp_path, WeightsConfig(source))
    assert (error.code, says in error.why) == ("weights-missing", True)


@pytest.mark.parametrize(("status", "code"), [(403, "weights-denied"), (400, "weights-unreachable")])
def test_a_hub_that_refuses_is_said(fetch, tmp_path, status, code):
    with serving(Hub(FILES)) as hub:
        hub.statuses = [status] * 9
        assert fails(fetch, hub, tmp_path).code == code


def test_a_hub_that_is_down_is_said(fetch, tmp_path):
    with serving(Hub(FILES)) as hub:
        pass
    assert fails(fetch, hub, tmp_path).code == "weights-unreachable"


def test_names_that_lead_out_are_not_fetched(fetch, tmp_path):
    with serving(Hub({**FILES, "../../evil.json": b"{}", "a/../../evil.json": b"{}"})) as hub:
        fetched = fetch(hub)
        assert not [path for _, path, _ in hub.seen if "evil" in path]
    assert "../../evil.json" in fetched.left_out
