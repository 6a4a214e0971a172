"""Function folders become images by the real lifecycle, twice; and the images answer as the folders did."""

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from adapter.cli.buildpack import private_criu
from adapter.cli.main import run as gpufn
from adapter.packaging.creator import layout_path
from tests.images.restores import answers_the_same_after_a_kill

SHIM = ("flask", "gunicorn", "werkzeug", "jinja2", "markupsafe", "itsdangerous", "click", "blinker")


@pytest.fixture(scope="module")
def shim_wheels(wheels, tmp_path_factory) -> Path:
    """Only what the shim needs."""
    folder: Path = tmp_path_factory.mktemp("shim-wheels")
    for path in wheels.glob("*.whl"):
        if path.name.lower().startswith(SHIM):
            shutil.copy(path, folder)
    return folder


@pytest.fixture
def build(docker, build_image, run_image, monkeypatch, capfd):
    """`gpufn build` with the base images; the rows that it printed."""
    monkeypatch.setenv("DOCKER_HOST", docker.host)

    def build(folder: Path, image: str, *options: str) -> dict[str, dict[str, object]]:
        words = ["build", str(folder), image, "--engine", "docker", "--builder", build_image, "--run-image", run_image]
        capfd.readouterr()
        code = gpufn([*words, "-o", "json", *options])
        said = capfd.readouterr()
        assert code == 0, said.err
        return {row["layer"]: row for row in json.loads(said.out)}

    return build


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def manifest_of(registry: str, image: str) -> dict[str, object]:
    accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
    request = urllib.request.Request(f"http://{registry}/v2/{image}/manifests/latest", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, object] = json.load(answer)
        return found


def example_of(folder: Path) -> tuple[object, dict[str, object]]:
    example = json.loads(next(iter(sorted((folder / "examples").glob("*.json")))).read_text())
    return example["request"]["body"], example["response"]


def test_echo_is_built_into_a_layout_without_any_registry_for_it(build, repository, shim_wheels, tmp_path):
    folder, layout = copy_of(repository / "functions" / "echo", tmp_path / "echo"), tmp_path / "layout"
    rows = build(folder, "team/echo", "--layout", str(layout), "--wheels", str(shim_wheels))
    assert not any(row["is_reused"] for row in rows.values())
    assert {"packages", "shim", "environment", "app"} <= rows.keys()
    place = layout / layout_path("team/echo")
    manifest = json.loads((place / "index.json").read_text())["manifests"][0]
    assert (place / "blobs" / manifest["digest"].replace(":", "/")).is_file()
    again = build(folder, "team/echo", "--layout", str(layout), "--wheels", str(shim_wheels))
    assert all(row["is_reused"] for row in again.values())


def test_embed_answers_its_example_and_a_change_of_code_makes_the_application_only(
    docker, build, repository, registry, wheels, tmp_path, start_container
):
    folder = copy_of(repository / "functions" / "embed", tmp_path / "embed")
    options = ("--publish", "--wheels", str(wheels), "--env", "BP_GPUFN_FROM_BASE=torch")
    first = build(folder, f"{registry}/team/embed", *options)
    criu = {"criu"} if private_criu() else set()
    assert first.keys() >= {"packages", "shim", "environment", "app"} | criu
    before = manifest_of(registry, "team/embed")

    with (folder / "handler.py").open("a") as handler:
        handler.write("\n# Another thought.\n")
    second = build(folder, f"{registry}/team/embed", *options)
    assert [name for name, row in second.items() if not row["is_reused"]] == ["app"]
    after = manifest_of(registry, "team/embed")
    digests = [{layer["digest"] for layer in manifest["layers"]} for manifest in (before, after)]  # type: ignore[attr-defined]
    assert len(digests[1] - digests[0]) == 1

    container = start_container(f"{registry}/team/embed")
    request, response = example_of(folder)
    container.wait_until_ready()
    answer = container.ask("/", request)
    assert answer.status == 200
    expected = response["json"]["embeddings"]  # type: ignore[index]
    assert answer.json()["embeddings"][0] == pytest.approx(expected[0], abs=1e-3)
    restored = answers_the_same_after_a_kill(docker, f"{registry}/team/embed", request, tmp_path / "state")
    assert json.loads(restored)["embeddings"][0] == pytest.approx(expected[0], abs=1e-3)


def test_two_builds_of_one_input_have_the_same_digest(build, repository, registry, shim_wheels, tmp_path):
    folder = copy_of(repository / "functions" / "echo", tmp_path / "echo")
    for name in ("one", "two"):  # images that know nothing of each other: every layer is made
        rows = build(folder, f"{registry}/team/{name}", "--publish", "--wheels", str(shim_wheels))
        assert not any(row["is_reused"] for row in rows.values())
    assert manifest_of(registry, "team/one") == manifest_of(registry, "team/two")


@pytest.fixture(scope="module")
def echo_image(repository, docker, build_image, run_image, shim_wheels, tmp_path_factory) -> str:
    """An image of echo in the engine, with a private CRIU where there is one."""
    folder = copy_of(repository / "functions" / "echo", tmp_path_factory.mktemp("function") / "echo")
    words = ["build", str(folder), "gpufn-test/echo", "--wheels", str(shim_wheels), "--engine", "docker"]
    words += ["--builder", build_image, "--run-image", run_image]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", docker.host)
        assert gpufn([*words, "--env", f"BP_GPUFN_CRIU={'bring' if private_criu() else 'off'}"]) == 0
    return "gpufn-test/echo"


def test_an_image_runs_as_another_user_with_the_entrypoint_as_its_first_process(echo_image, docker, start_container):
    container = start_container(echo_image)
    container.wait_until_ready()
    assert container.ask("/", "hello").body == b"hello"
    processes = container.execute("sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline; id -u")
    assert processes.split()[1:] == ["-m", "adapter.runtime", "1000"]
    labels = docker.inspect(echo_image)["Config"]["Labels"]
    assert (labels["dev.gpufn.contract"], labels["dev.gpufn.gpu"]) == ("1", "0")


@pytest.mark.criu
def test_a_private_criu_runs_in_the_image_and_is_small(echo_image, docker):
    if private_criu() is None:
        pytest.skip("no private CRIU here, but one of the system: make criu")
    folder = "/layers/gpufn_gpu-function/criu"
    command = f"{folder}/criu --version; du -sk {folder}"
    said = docker("run", "--rm", "--network", "none", "--entrypoint", "sh", echo_image, "-c", command)
    assert said.startswith("Version: 4.")
    assert int(said.splitlines()[-1].split()[0]) * 1024 <= 30e6


def test_the_lifecycle_in_place_builds_without_a_daemon(
    repository, docker, build_image, run_image, registry, shim_wheels, tmp_path
):
    """As CI does: a job in the builder image that has the buildpack, and a checkout that becomes /workspace."""
    pack = tmp_path / "pack"
    assert gpufn(["buildpack", str(pack), "--wheels", str(shim_wheels), "--no-criu"]) == 0
    (tmp_path / "order.toml").write_text(
        '[[order]]\n[[order.group]]\nid = "gpufn/gpu-function"\n'
        f'version = "{(pack / "buildpack.toml").read_text().split("version = ")[1].split(chr(34))[1]}"\n'
    )
    folder = copy_of(repository / "functions" / "echo", tmp_path / "echo")
    (folder / "gpufn.toml").write_text("")
    version = (tmp_path / "order.toml").read_text().rsplit("version = ", 1)[1].strip().strip('"')
    name = f"{registry}/team/in-place"
    script = f"cp -a /checkout/. /workspace && chown -R 1000:1000 /workspace && /cnb/lifecycle/creator -run-image={run_image} {name}"
    mounts = [
        f"{pack}:/cnb/buildpacks/gpufn_gpu-function/{version}:ro",
        f"{tmp_path / 'order.toml'}:/cnb/order.toml:ro",
    ]
    mounts += [f"{folder}:/checkout:ro"]
    said = docker(
        "run", "--rm", "--network", "host", "--user", "0", "--env", "CNB_PLATFORM_API=0.13",
        *(word for mount in mounts for word in ("--volume", mount)), build_image, "sh", "-ec", script,
    )  # fmt: skip
    assert "application: /workspace" in said
    assert manifest_of(registry, "team/in-place")["layers"]


def test_a_folder_without_a_function_ends_with_three_lines_and_no_image(
    repository, docker, build_image, run_image, registry, tmp_path, monkeypatch, capfd
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing\n")
    monkeypatch.setenv("DOCKER_HOST", docker.host)
    words = ["build", str(tmp_path / "empty"), f"{registry}/team/nothing", "--publish", "--engine", "docker"]
    assert gpufn([*words, "--builder", build_image, "--run-image", run_image]) == 3
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("✓")]
    assert lines[0].startswith("✗ ")
    assert len(lines) == 3
    with pytest.raises(OSError, match="404"):
        manifest_of(registry, "team/nothing")


def test_a_requirement_that_does_not_resolve_says_so_through_the_lifecycle(
    repository, docker, build_image, run_image, registry, shim_wheels, tmp_path, monkeypatch, capfd
):
    folder = copy_of(repository / "functions" / "echo", tmp_path / "echo")
    (folder / "requirements.txt").write_text("no-such-package==4.2\n")
    monkeypatch.setenv("DOCKER_HOST", docker.host)
    words = ["build", str(folder), f"{registry}/team/unresolved", "--publish", "--engine", "docker"]
    words += ["--builder", build_image, "--run-image", run_image, "--wheels", str(shim_wheels)]
    assert gpufn(words) == 3
    said = capfd.readouterr().err
    assert "No matching distribution found for no-such-package==4.2" in said
    assert "requirements.txt, line 1: no-such-package==4.2" in said


def test_the_sources_of_the_buildpack_say_how_to_put_it_together(repository):
    script = repository / "buildpacks" / "gpu-function" / "bin" / "detect"
    done = subprocess.run(
        ["python3", str(script)], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=False
    )
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (1, 3)
    assert "gpufn buildpack FOLDER" in lines[2]
