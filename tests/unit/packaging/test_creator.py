"""The lifecycle from outside: what is sent in, what its words mean, where an image lies in a layout."""

import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from adapter.errors import AdapterError, ConfigError, NotFound, Unavailable
from adapter.packaging.assemble import source_folder
from adapter.packaging.creator import _UNKNOWN_IMAGE, Request, Transcript, _Parts, _send_logins, create, layout_path
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


STUB = """#!/bin/sh
echo "$@" >> "$CALLS"
echo "variables: $CNB_REGISTRY_AUTH" >> "$CALLS"
case "$1 $2" in
  "image inspect") case "$5" in *nowhere*) exit 1;; *) echo '["CNB_USER_ID=1000"]';; esac;;
  "pull "*) echo "manifest for $3 not found: manifest unknown" >&2; exit 1;;
  "create "*) echo c1;;
  "cp c1:/cnb/run.toml") [ -n "$RUN_TOML" ];;
  "cp "*) cat >> "$CALLS.sent";;
  "start "*) echo "===> BUILDING"; echo "✗ It broke.  [it-broke]"; echo "  Because."
    echo "  Mend it, or put it into /gpufn/buildpacks/gpufn_gpu-function/$VERSION/wheels."; exit 51;;
esac
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A `docker` that knows all images but those called nowhere, and whose builds fail. Returns what it was asked."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "docker"
    path.write_text(STUB)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    version = re.search(r'^version = "(.+)"', (source_folder() / "buildpack.toml").read_text(), re.MULTILINE)
    assert version is not None
    monkeypatch.setenv("VERSION", version[1])
    return tmp_path / "calls"


def fails(folder: Path, **more: Any) -> AdapterError:
    request = Request(folder, "team/image", publish=True, engine="docker", **more)
    with pytest.raises(AdapterError) as caught:
        create(request, lambda phase, line: None)
    return caught.value


def test_a_run_image_that_nothing_names_is_asked_for_before_the_build(folder, engine, monkeypatch):
    error = fails(folder, builder="b")
    assert (error.code, "--run-image" in error.hint) == ("no-run-image", True)
    assert "start" not in engine.read_text()
    monkeypatch.setenv("RUN_TOML", "1")  # a builder that pack made
    assert fails(folder, builder="b").code == "it-broke"


def test_a_builder_that_names_no_run_image_says_so_in_place_too(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("adapter.packaging.creator.in_place", lambda: True)
    monkeypatch.setattr("adapter.packaging.creator._RUN_TOML", str(tmp_path / "run.toml"))
    monkeypatch.delenv("CNB_RUN_IMAGE", raising=False)
    assert fails(folder).code == "no-run-image"


@pytest.mark.parametrize(
    ("builder", "run_image", "option"),
    [("nowhere/b", "r", "--builder"), ("b", "nowhere/r", "--run-image")],
)
def test_an_image_that_the_engine_does_not_find_is_named_with_its_option(folder, engine, builder, run_image, option):
    request = Request(folder, "team/image", builder=builder, run_image=run_image, engine="docker")
    with pytest.raises(NotFound, match="nowhere/") as caught:
        create(request, lambda phase, line: None)
    assert caught.value.hint.startswith(f"Check {option}")
    assert "start" not in engine.read_text()


@pytest.mark.parametrize(
    ("said", "is_unknown"),
    [
        ("pull access denied for b, repository does not exist or may require 'docker login'", True),
        ("denied: requested access to the resource is denied", True),
        ("manifest for b:1 not found: manifest unknown", True),
        ("permission denied while trying to connect to the Docker daemon socket", False),
        ("Cannot connect to the Docker daemon", False),
    ],
)
def test_an_engine_that_cannot_be_asked_is_no_missing_image(said, is_unknown):
    assert bool(_UNKNOWN_IMAGE.search(said)) is is_unknown


def test_an_error_names_the_folder_of_wheels_that_was_given(folder, engine, tmp_path):
    wheel(tmp_path / "wheels", "needed")
    error = fails(folder, builder="b", run_image="r", wheels=tmp_path / "wheels")
    assert error.hint == f"Mend it, or put it into {tmp_path / 'wheels'}."


def test_credentials_of_a_registry_go_in_as_a_file_of_roots(folder, engine):
    auth = {"registry.example.com": "Basic dXNlcjpodW50ZXIy", "docker.io": "Basic eA=="}
    fails(folder, builder="b", run_image="r", registry_auth=auth)
    calls = engine.read_text()
    assert "dXNlcjpodW50ZXIy" not in calls
    assert "--env DOCKER_CONFIG=/gpufn/docker" in calls
    stream = io.BytesIO()
    _send_logins(stream, "/gpufn/docker", auth)
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        info = tar.getmember("gpufn/docker/config.json")
        file = tar.extractfile(info)
        assert file is not None
        logins = json.load(file)["auths"]
    assert (info.mode, info.uid) == (0o600, 0)
    assert logins["registry.example.com"] == {"auth": "dXNlcjpodW50ZXIy"}
    assert "https://index.docker.io/v1/" in logins


def test_a_ca_is_for_the_build_and_in_no_layer(folder, tmp_path):
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n")
    found = sent(Request(folder, "image", ca=tmp_path / "ca.pem", settings={"PIP_CERT": "/own"}), tmp_path / "work")
    place = found["gpufn/platform/env/SSL_CERT_FILE"].pax_headers["content"]
    assert found["gpufn/platform/env/REQUESTS_CA_BUNDLE"].pax_headers["content"] == place
    assert found[place.lstrip("/")].pax_headers["content"].startswith("-----BEGIN CERTIFICATE")
    assert found["gpufn/platform/env/PIP_CERT"].pax_headers["content"] == "/own"
    assert not any(name.startswith("workspace/") and "ca" in name for name in found)


@pytest.mark.parametrize("text", [None, "no certificate", b"\xff\xfe"])
def test_a_ca_that_is_none_is_refused(folder, tmp_path, text):
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        sent(Request(folder, "image", ca=path), tmp_path / "work")
    assert caught.value.code == "bad-ca"


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
