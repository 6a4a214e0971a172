"""One build with the real pip, looked at from all sides: what an image has, and what it has not."""

import json
import os
import subprocess

import pytest

from adapter.packaging.layers import read_toml
from tests.fakes.builds import HANDLER, SHIM_WHEELS, Builder, wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Builder:
    root = tmp_path_factory.mktemp("built")
    for name, version in {**SHIM_WHEELS, "nvidia_ml_py": "12.570", "listed": "1.2"}.items():
        wheel(root / "wheels", name, version)
    direct = wheel(root / "elsewhere", "direct")
    (root / "function").mkdir()
    (root / "function" / "handler.py").write_text(HANDLER)
    (root / "function" / "requirements.txt").write_text(f"listed==1.2\ndirect @ file://{direct}\n")
    (root / "function" / "gpufn.toml").write_text('[gpu]\ncount = 0.5\nmemory = "8Gi"\n')
    builder = Builder(root / "function", root / "build", root / "wheels")
    builder(BPE_DEFAULT_LISTEN_ADDRESS="[::]:8080", BPE_MODE="fast")
    return builder


def test_an_image_starts_the_entrypoint_with_the_functions_packages(built):
    python = str(built.layers / "packages" / "bin" / "python")
    process = read_toml(built.layers / "launch.toml")["processes"][0]
    assert process == {"type": "web", "command": [python, "-m", "adapter.runtime"], "default": True}
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(built.layers / "shim")}
    code = "import listed, flask, adapter.runtime.entrypoint; print(listed.version, adapter.__file__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=environ, cwd="/")
    assert done.stdout.split() == ["1.2", str(built.layers / "shim" / "adapter" / "__init__.py")]


def test_the_control_side_is_not_in_the_image(built):
    names = {path.name for path in (built.layers / "shim" / "adapter").iterdir() if path.is_dir()}
    assert names - {"__pycache__"} == {"gpu", "runtime", "snapshot"}


def test_labels_say_what_the_function_needs(built):
    labels = {item["key"]: item["value"] for item in read_toml(built.layers / "launch.toml")["labels"]}
    config = labels.pop("dev.gpufn.config")
    assert labels == {"dev.gpufn.contract": "1", "dev.gpufn.gpu": "0.5", "dev.gpufn.gpu-memory": str(8 * 2**30)}
    assert json.loads(config) == {"gpu": {"count": 0.5, "memory": "8Gi"}}


def test_byte_code_is_there_and_no_start_checks_it_against_its_source(built):
    for folder in ("packages", "shim"):
        compiled = list((built.layers / folder).rglob("*.pyc"))
        assert compiled
        assert {path.read_bytes()[4:8] for path in compiled} == {b"\x01\0\0\0"}


def test_the_applications_byte_code_is_checked_for_people_who_edit_in_place(built):
    assert {path.read_bytes()[4:8] for path in built.places.app.rglob("*.pyc")} == {b"\x03\0\0\0"}


def test_an_environment_has_no_installer_and_nothing_that_names_the_build(built):
    names = {path.name for path in (built.layers / "packages").rglob("*")}
    assert "direct.py" in names
    assert not names & {"pip", "setuptools", "direct_url.json", "activate"}


def test_bills_of_materials_name_the_packages_and_no_time(built):
    bill = json.loads((built.layers / "packages.sbom.cdx.json").read_text())
    listed = next(item for item in bill["components"] if item["name"] == "listed")
    assert (listed["version"], listed["purl"]) == ("1.2", "pkg:pypi/listed@1.2")
    assert listed["licenses"] == [{"license": {"name": "MIT"}}]
    assert "timestamp" not in bill["metadata"]
    assert "serialNumber" not in bill


def test_variables_that_func_sets_are_in_the_image_as_defaults(built):
    folder = built.layers / "environment" / "env.launch"
    assert (folder / "LISTEN_ADDRESS.default").read_text() == "[::]:8080"
    assert (folder / "MODE.override").read_text() == "fast"
    assert (folder / "GPUFN_FOLDER.default").read_text() == str(built.places.app)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"BPL_GPUFN_SNAPSHOTS": "auto"}, {}),
        ({"BPL_GPUFN_CRIU": "off"}, {"GPUFN_PROCESS_SNAPSHOT": "off"}),
        ({"BPL_GPUFN_SNAPSHOTS": "off"}, {"GPUFN_PROCESS_SNAPSHOT": "off", "GPUFN_WEIGHT_SNAPSHOT": "off"}),
    ],
)
def test_the_launch_script_says_what_a_launch_set(built, given, expected, tmp_path):
    said = tmp_path / "said"
    script = built.layers / "environment" / "exec.d" / "gpufn"
    subprocess.run(["sh", "-c", f'"{script}" 3>"{said}"'], env={"PATH": os.environ["PATH"], **given}, check=True)
    assert read_toml(said) == expected
