"""The lifecycle from outside: what is sent in, what its words mean, where an image lies in a layout."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from adapter.errors import ConfigError, Unavailable
from adapter.packaging.creator import Request, Transcript, _Parts, create, layout_path
from adapter.packaging.report import built_layers
from tests.fakes.builds import HANDLER, wheel

LINES = """\x1b[36m===> ANALYZING\x1b[0m
Restoring data for SBOM from previous image
===> BUILDING
  packages: reused, 1 Python package, 1.0Ki
===> EXPORTING
Reusing layer 'gpufn/gpu-function:packages'
Adding layer 'gpufn/gpu-function:shim'
Reusing layer 'buildpacksio/lifecycle:launch.sbom'
Reused 1/1 app layer(s)
*** Images (sha256:0123456789ab0123456789ab0123456789ab0123456789ab0123456789ab0123):
"""


def transcript_of(text: str) -> Transcript:
    transcript = Transcript()
    for line in text.splitlines(keepends=True):
        transcript.add(line)
    return transcript


def test_lines_belong_to_phases_and_say_what_was_reused():
    transcript = transcript_of(LINES)
    assert [phase for phase, line in transcript.lines if not line] == ["ANALYZING", "BUILDING", "EXPORTING"]
    assert transcript.reused == {"packages", "launch.sbom", "app"}
    assert transcript.digest.startswith("sha256:0123456789ab")


def test_an_application_of_which_a_part_is_new_is_not_reused():
    assert "app" not in transcript_of("===> EXPORTING\nReused 1/2 app layer(s)\nAdded 1/2 app layer(s)\n").reused


def test_the_buildpacks_own_error_comes_out():
    error = transcript_of(
        "===> BUILDING\n✗ It broke.  [it-broke]\n  Because.\n  Mend it.\n\x1b[31;1mERROR: \x1b[0mfailed to build: exit status 3\n"
    ).error(51)
    assert (error.message, error.why, error.hint, error.code) == ("It broke.", "Because.", "Mend it.", "it-broke")


def test_an_error_of_one_line_borrows_none_of_what_follows():
    error = transcript_of("===> BUILDING\n✗ It broke.  [it-broke]\nERROR: failed to build: exit status 3\n").error(51)
    assert (error.why, error.hint) == ("", "")


def test_a_registry_that_refuses_is_not_the_users_folder():
    error = transcript_of("===> EXPORTING\nERROR: failed to export: connection refused\n").error(62)
    assert isinstance(error, Unavailable)
    assert (error.why, error.code) == ("failed to export: connection refused", "lifecycle-62")


@pytest.mark.parametrize(
    ("image", "place"),
    [
        ("busybox", "index.docker.io/library/busybox/latest"),
        ("team/echo:v1", "index.docker.io/team/echo/v1"),
        ("127.0.0.1:5000/team/echo", "127.0.0.1:5000/team/echo/latest"),
        (f"registry.example.com/echo@sha256:{'a' * 64}", f"registry.example.com/echo/sha256/{'a' * 64}"),
    ],
)
def test_an_image_lies_in_a_layout_where_the_lifecycle_looks(image, place):
    assert str(layout_path(image)) == place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "function"
    folder.mkdir()
    (folder / "handler.py").write_text(HANDLER)
    (folder / ".git").mkdir()
    (folder / ".env").write_text("TOKEN=1")
    return folder


def sent(request: Request, work: Path) -> dict[str, tarfile.TarInfo]:
    work.mkdir()
    stream = io.BytesIO()
    _Parts(request, work).archive(stream, "/gpufn", (1234, 5678))
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        found = {member.name: member for member in tar}
        for name, member in found.items():
            if "/platform/" in name and member.isreg():
                file = tar.extractfile(member)
                assert file is not None
                member.pax_headers = {"content": file.read().decode()}
    return found


def test_the_folder_is_sent_as_the_builds_user_owns_it_and_without_what_stays_out(folder, tmp_path):
    found = sent(Request(folder, "image", settings={"BP_GPUFN_CRIU": "off"}), tmp_path / "work")
    handler = found["workspace/handler.py"]
    assert (handler.uid, handler.gid) == (1234, 5678)
    assert {name for name in found if name.startswith("workspace/")} == {"workspace/handler.py"}
    assert found["gpufn/platform/env/BP_GPUFN_CRIU"].pax_headers["content"] == "off"
    assert found["gpufn/platform/env/BP_GPUFN_DETECT"].pax_headers["content"] == "on"
    assert any(name.endswith("/lib/adapter/packaging/build.py") for name in found)


def test_wheels_are_sent_and_are_the_only_source_then(folder, tmp_path):
    wheel(tmp_path / "wheels", "needed")
    found = sent(Request(folder, "image", wheels=tmp_path / "wheels"), tmp_path / "work")
    place = found["gpufn/platform/env/BP_GPUFN_WHEELS"].pax_headers["content"]
    assert f"{place.lstrip('/')}/needed-1.0-py3-none-any.whl" in found


def test_a_secret_is_a_binding_that_only_the_builds_user_reads(folder, tmp_path):
    (tmp_path / "token").write_text("hf_secret\n")
    request = Request(folder, "image", secrets={"huggingface": tmp_path / "token"})
    found = sent(request, tmp_path / "work")
    token = found["gpufn/platform/bindings/huggingface/token"]
    assert (token.pax_headers["content"], token.mode) == ("hf_secret", 0o400)
    assert found["gpufn/platform/bindings/huggingface/type"].pax_headers["content"] == "huggingface"


@pytest.mark.parametrize(("name", "path", "code"), [("../x", "token", "bad-name"), ("hub", "missing", "bad-secret")])
def test_a_secret_that_cannot_be_is_refused(folder, tmp_path, name, path, code):
    (tmp_path / "token").write_text("x")
    with pytest.raises(ConfigError) as caught:
        sent(Request(folder, "image", secrets={name: tmp_path / path}), tmp_path / "work")
    assert caught.value.code == code


def test_links_out_of_the_folder_are_refused_before_an_engine_is_asked(folder):
    (folder / "out").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="leads out"):
        create(Request(folder, "image", builder="b"), lambda phase, line: None)


def test_without_a_builder_it_says_which_option_names_one(folder):
    with pytest.raises(ConfigError) as caught:
        create(Request(folder, "image"), lambda phase, line: None)
    assert "--builder" in caught.value.hint


def test_an_engine_that_does_not_answer_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    engine = tmp_path / "bin" / "docker"
    engine.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(Unavailable, match="docker pull failed") as caught:
        create(Request(folder, "image", builder="b", engine="docker"), lambda phase, line: None)
    assert "Cannot connect" in caught.value.why


def test_layers_are_named_with_what_they_weigh_and_when_they_change():
    metadata = {
        "app": [{"sha": "sha256:a"}],
        "buildpacks": [
            {
                "key": "gpufn/gpu-function",
                "layers": {
                    "packages": {
                        "sha": "sha256:p",
                        "data": {"what": "3 Python packages", "size-bytes": 9},
                        "launch": True,
                    },
                    "pip-cache": {"sha": "sha256:c", "launch": False},
                },
            },
            {"key": "other/one", "layers": {"thing": {"sha": "sha256:t", "launch": True}}},
        ],
        "launcher": {"sha": "sha256:l"},
    }
    label = {"io.buildpacks.lifecycle.metadata": json.dumps(metadata)}
    config = {"config": {"Labels": label}, "rootfs": {"diff_ids": ["sha256:base", "sha256:p", "sha256:a"]}}
    layers = {layer.layer: layer for layer in built_layers(config, [100, 5, 2], {"packages", "launcher"})}
    assert layers.keys() == {"packages", "other/one:thing", "app", "launcher"}
    assert (layers["packages"].size_bytes, layers["packages"].is_reused) == (5, True)
    assert (layers["app"].size_bytes, layers["app"].is_reused) == (2, False)
    assert layers["launcher"].size_bytes is None
    assert built_layers(config, [], ())[0].size_bytes == 9
