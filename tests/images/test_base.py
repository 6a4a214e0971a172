"""The base images: small, of an ordinary user, with what functions and buildpacks need, and the same each time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.images import machine
from tests.images.wheels import PYTHON


def test_a_container_of_the_run_image_runs_python_as_an_ordinary_user(run_image, run_once):
    answer = run_once(
        run_image, "python3", "-c", "import os, sys, ssl; print(*sys.version_info[:2], os.getuid(), os.getgid())"
    )
    assert answer.splitlines()[-1].split() == [*PYTHON.split("."), "1000", "1000"]


def test_it_has_an_environment_to_make_venvs_with_and_a_home_to_write_to(run_image, run_once):
    assert run_once(
        run_image, "sh", "-c", "python3 -m venv --system-site-packages ~/env && ~/env/bin/pip --version"
    ).split()[-4:-2]


def test_torch_is_the_base_image_s(run_image, run_once):
    code = "import torch; print(torch.nn.functional.relu(torch.tensor([-1.0, 2.0])).tolist())"
    assert run_once(run_image, "python3", "-W", "ignore", "-c", code).splitlines()[-1] == "[0.0, 2.0]"


def test_labels_say_what_it_is(docker, run_image, build_image):
    for image in (run_image, build_image):
        docker("pull", "--quiet", image)
        config = docker.inspect(image)["Config"]
        assert config["User"] == "1000:1000"
        assert config["Labels"]["io.buildpacks.base.distro.name"] == "debian"
        assert config["Labels"]["io.buildpacks.base.distro.version"] == "13"
        assert "python3-torch" in config["Labels"]["io.buildpacks.base.description"]


@pytest.mark.parametrize(
    "folder", ["/var/lib/apt/lists", "/var/cache/apt", "/usr/share/doc", "/usr/share/man", "/var/log"]
)
def test_nothing_lies_in_it_that_no_function_reads(run_image, run_once, folder):
    assert run_once(run_image, "find", folder, "-mindepth", "1") == ""


def test_nobody_becomes_another_user_by_a_file_in_it(run_image, run_once):
    assert run_once(run_image, "find", "/usr", "-type", "f", "-perm", "/6000") == ""


def test_a_volume_for_snapshots_is_the_user_s(run_image, run_once, docker):
    volume = docker("volume", "create")
    try:
        run_once(run_image, "touch", "/var/lib/gpufn/snapshots/mine", mounts={volume: "/var/lib/gpufn/snapshots"})
    finally:
        docker("volume", "rm", volume)


def test_the_daemon_of_these_tests_gives_the_right_that_a_restore_needs(docker, run_image):
    """Debian 12's own refuses it by name."""
    status = docker(
        "run", "--rm", "--network", "none", "--cap-add", "CHECKPOINT_RESTORE", run_image, "cat", "/proc/self/status"
    )
    bounding = next(line.split()[1] for line in status.splitlines() if line.startswith("CapBnd:"))
    assert int(bounding, 16) & 1 << 40


def test_no_compiler_is_in_it(run_image, run_once):
    assert run_once(run_image, "sh", "-c", "command -v cc gcc clang make || echo none") == "none"


def test_the_build_image_has_the_lifecycle_and_the_user_of_builds(docker, build_image, run_once):
    docker("pull", "--quiet", build_image)
    environment = dict(pair.split("=", 1) for pair in docker.inspect(build_image)["Config"]["Env"])
    assert environment["CNB_USER_ID"] == environment["CNB_GROUP_ID"] == "1000"
    for phase in ("detector", "analyzer", "restorer", "builder", "exporter", "creator"):
        assert run_once(build_image, f"/cnb/lifecycle/{phase}", "-version").startswith("0.20.8")
    assert run_once(build_image, "sh", "-c", "touch /layers/a /workspace/b && wc -c < /cnb/order.toml") == "0"


def test_the_build_image_is_the_run_image_and_one_layer(base_layout):
    run, build = (_layers(base_layout, image) for image in ("run", "build"))
    assert build[:-1] == run


def test_a_second_making_has_the_same_digests(base_layout, lifecycle, repository, tmp_path):
    from tests.images.conftest import BASE_PACKAGES

    packages = [word for package in BASE_PACKAGES for word in ("--with", package)]
    machine.run_script(repository, "base-image.sh", *packages, "--lifecycle", str(lifecycle), str(tmp_path / "again"))
    assert _digests(tmp_path / "again") == _digests(base_layout)


def test_what_is_missing_is_said_in_three_lines(repository, tmp_path):
    ended = subprocess.run(
        [
            str(repository / "scripts" / "base-image.sh"),
            "--lifecycle",
            str(tmp_path / "none"),
            str(tmp_path / "layout"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        f"base-image: no lifecycle in {tmp_path}/none.",
        "The build image has it in it.",
        "Run scripts/install-lifecycle.sh, or name its folder with --lifecycle.",
    ]
    assert not (tmp_path / "layout").exists()


def _index(layout: Path) -> dict[str, str]:
    manifests = json.loads((layout / "index.json").read_bytes())["manifests"]
    return {manifest["annotations"]["org.opencontainers.image.ref.name"]: manifest["digest"] for manifest in manifests}


def _layers(layout: Path, image: str) -> list[str]:
    algorithm, digest = _index(layout)[image].split(":")
    manifest = json.loads((layout / "blobs" / algorithm / digest).read_bytes())
    return [layer["digest"] for layer in manifest["layers"]]


def _digests(layout: Path) -> dict[str, str]:
    return _index(layout)
