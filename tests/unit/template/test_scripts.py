"""The template's scripts, with stand-ins for the programs of an image."""

import subprocess
from pathlib import Path

import pytest

SETTINGS = {"ADDITIONAL_PACKAGE": "", "UPGRADE_PACKAGES": "false", "CRIU": "false"}


@pytest.fixture
def debian_packages(repository, tmp_path):
    """Runs the script; what it asked apt-get for is in the file `asked`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    asked = tmp_path / "asked"

    def program(name: str, script: str) -> None:
        path: Path = programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def run(criu: str = "4.1", **settings: str) -> tuple[int, str, str]:
        program("apt-get", f'echo "$@" >>{asked}')
        program("rm", ":")
        program("criu", f'echo "Version: {criu}"')
        ended = subprocess.run(
            ["sh", str(repository / "template" / "python3-gpu" / "scripts" / "debian-packages.sh")],
            env={"PATH": f"{programs}:/usr/bin:/bin", **SETTINGS, **settings},
            text=True,
            capture_output=True,
            check=False,
        )
        return ended.returncode, ended.stderr, asked.read_text() if asked.exists() else ""

    return run


def test_without_packages_no_network_is_needed(debian_packages):
    assert debian_packages() == (0, "", "")


def test_packages_that_are_asked_for_are_installed(debian_packages):
    code, _, asked = debian_packages(ADDITIONAL_PACKAGE="gcc git", UPGRADE_PACKAGES="1")
    assert code == 0
    assert asked.splitlines() == ["update -qy", "upgrade -qy", "install -qy --no-install-recommends gcc git"]


@pytest.mark.parametrize(
    ("version", "code"), [("3.17.1", 1), ("4.0", 1), ("4.1", 0), ("4.1.1", 0), ("5.0", 0), ("10.2", 0)]
)
def test_a_criu_that_is_too_old_fails_the_build(debian_packages, version, code):
    ended, said, asked = debian_packages(version, CRIU="true")
    assert ended == code
    assert "install -qy --no-install-recommends criu" in asked
    assert len(said.splitlines()) == (3 if code else 0)
