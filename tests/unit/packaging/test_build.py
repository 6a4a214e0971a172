"""Builds with the real pip and no network: what is in a layer, when it is kept, and what is refused."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from adapter.errors import AdapterError, ConfigError, HandlerError, Unavailable
from adapter.packaging.layers import read_toml
from adapter.packaging.packages import Wanted, _Pip
from adapter.packaging.requirements import Line, Requirements
from tests.fakes.builds import Builder, digest_of, wheel
from tests.fakes.checkpoints import safetensors

LAYERS = {"packages", "shim", "environment"}


def ask(builder: Builder, code: str) -> str:
    """What the environment of the image prints, run without this process's path."""
    python = builder.layers / "packages" / "bin" / "python"
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(builder.layers / "shim")}
    return subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True, env=environ, cwd="/"
    ).stdout.strip()


def test_two_builds_of_one_input_are_equal(builder, function, wheels):
    wheel(wheels, "sets", source="words = {'a', 'b', 'c', 'd'} | {'e'}\ndef f(x): return x in {'q', 'r', 's'}\n")
    (function / "requirements.txt").write_text("sets\n")
    builder()
    first = {name: digest_of(builder.layers / name) for name in LAYERS}
    app = digest_of(builder.places.app)
    shutil.rmtree(builder.layers)
    builder()
    assert {name: digest_of(builder.layers / name) for name in LAYERS} == first
    assert digest_of(builder.places.app) == app


def test_a_second_build_keeps_every_layer_and_makes_none(builder, function):
    builder()
    builder.exported()
    (function / "handler.py").write_text((function / "handler.py").read_text() + "# changed\n")
    outcomes = builder()
    assert all(outcome.is_reused for outcome in outcomes.values())
    assert not any((builder.layers / name).exists() for name in LAYERS)
    assert read_toml(builder.layers / "packages.toml")["types"] == {"launch": True, "build": False, "cache": False}


def test_another_requirement_makes_the_packages_anew_and_only_them(builder, function, wheels):
    wheel(wheels, "more")
    builder()
    builder.exported()
    (function / "requirements.txt").write_text("more\n")
    outcomes = builder()
    assert outcomes["packages"].changed == ("requirements",)
    assert [name for name, outcome in outcomes.items() if not outcome.is_reused] == ["packages"]


def test_another_wheel_of_the_same_version_makes_the_packages_anew(builder, wheels):
    builder()
    builder.exported()
    wheel(wheels, "flask", "3.1.0", source="patched = True\n")
    assert builder()["packages"].changed == ("wheels",)


def test_packages_of_the_base_image_are_not_installed_again(builder, function, monkeypatch, wheels):
    """`pip` stands for one that the base brings: the interpreter's own environment has it."""
    wheel(wheels, "wants_base", requires="based>=1")
    monkeypatch.setattr("adapter.packaging.packages._base_version", lambda name: "2.5+debian")
    (function / "requirements.txt").write_text("based==9\nwants_base\n")
    builder(BP_GPUFN_FROM_BASE="Based")
    assert ask(builder, "import wants_base, importlib.util as u; print(u.find_spec('based'))") == "None"


def test_a_package_that_the_base_image_lacks_is_refused(builder):
    with pytest.raises(ConfigError, match="does not bring nosuchthing") as caught:
        builder(BP_GPUFN_FROM_BASE="nosuchthing")
    assert "nosuchthing" in caught.value.why
    assert not (builder.layers / "packages").exists()


def test_hashes_are_kept_to_and_the_shim_comes_beside_them(builder, function, wheels):
    path = wheel(wheels, "locked")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (function / "requirements.lock").write_text(f"locked==1.0 \\\n    --hash=sha256:{digest}\n")
    (function / "requirements.txt").write_text("not-looked-at\n")
    builder()
    assert ask(builder, "import locked, flask; print('both')") == "both"
    (function / "requirements.lock").write_text(f"locked==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(ConfigError, match="cannot be installed"):
        builder()


def test_a_pylock_is_installed_as_it_pins(builder, function, wheels):
    digest = hashlib.sha256(wheel(wheels, "pinned", "2.0").read_bytes()).hexdigest()
    wheel(wheels, "pinned", "3.0")
    (function / "pylock.toml").write_text(
        'lock-version = "1.0"\n[[packages]]\nname = "pinned"\nversion = "2.0"\n'
        f'wheels = [{{name = "x", hashes = {{sha256 = "{digest}"}}}}]\n'
    )
    builder()
    assert ask(builder, "import pinned; print(pinned.version)") == "2.0"


def test_what_is_wanted_without_its_dependencies_comes_without_them(builder, function, wheels):
    wheel(wheels, "alone", requires="missing-thing")
    (function / "requirements-nodeps.txt").write_text("# a comment\nalone==1.0\n")
    builder()
    assert ask(builder, "import alone; print(alone.version)") == "1.0"


def test_a_requirement_that_does_not_resolve_is_named_with_its_line_and_pips_words(builder, function):
    (function / "requirements.txt").write_text("flask\n\nno-such-package==4.2\n")
    with pytest.raises(ConfigError) as caught:
        builder(BP_GPUFN_WHEELS=str(builder.places.buildpack / "wheels"))
    error = caught.value
    assert error.code == "requirements-failed"
    assert "No matching distribution found for no-such-package==4.2" in error.why
    assert "requirements.txt, line 3: no-such-package==4.2" in error.hint
    assert not (builder.layers / "packages").exists()
    assert not (builder.layers / "packages.toml").exists()


def test_a_password_in_an_index_is_in_no_error(builder, function):
    (function / "requirements.txt").write_text("--index-url http://user:hunter2@127.0.0.1:9/simple\nno-such-package\n")
    with pytest.raises(AdapterError) as caught:
        builder(PIP_NO_INDEX="0", PIP_RETRIES="0", PIP_TIMEOUT="1")
    assert "hunter2" not in caught.value.to_text()


def test_an_index_that_does_not_answer_is_not_called_a_bad_requirement(builder, function):
    """pip tells it when it tries again, so it must try again once."""
    (function / "requirements.txt").write_text("no-such-package\n")
    with pytest.raises(Unavailable) as caught:
        builder(
            PIP_NO_INDEX="0",
            PIP_INDEX_URL="http://u:hunter2@127.0.0.1:9/simple?key=hunter3",
            PIP_RETRIES="1",
            PIP_TIMEOUT="1",
        )
    error = caught.value
    assert error.code == "index-unreachable"
    assert "NewConnectionError" in error.why
    assert "--ca FILE" in error.hint
    assert "requirements.txt" not in error.to_text()
    assert "hunter" not in error.to_text()


def failure(said: str, *, requirements: str = "numpy\n", own: str = "flask", offline: bool = False) -> AdapterError:
    lines = tuple(Line("requirements.txt", n, text) for n, text in enumerate(requirements.splitlines(), 1))
    wheels = (Path("/given/wheels"),) if offline else ()
    wanted = Wanted(Requirements(lines, (), ""), (own,), (), wheels, offline)
    pip = object.__new__(_Pip)
    pip._wanted, pip._work = wanted, Path("/nowhere")
    return pip._failure(said, 1, [Line("the shim", 0, own), *lines])


NONE_FOUND = "ERROR: Could not find a version that satisfies the requirement numpy (from versions: none)\n"
CERTIFICATE = (
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'SSLError(CERTIFICATE_VERIFY_FAILED)': /simple/numpy/\n"
    "Could not fetch URL https://me:pw@pypi.example.com/simple/numpy/?token=pw: There was a problem confirming the ssl "
    "certificate: (Caused by SSLError(CERTIFICATE_VERIFY_FAILED)) - skipping\n"
)


def test_a_certificate_that_is_not_trusted_is_said_without_its_addresss_secrets():
    error = failure("\n".join(sorted(CERTIFICATE.splitlines())) + "\n" + NONE_FOUND)  # the other one last
    assert (type(error), error.code) == (Unavailable, "index-unreachable")
    assert error.why.startswith("Could not fetch URL https://***@pypi.example.com/simple/numpy/?***")
    assert "pw" not in error.to_text()


@pytest.mark.parametrize(
    "said",
    [
        "ERROR: Could not find a version that satisfies the requirement numpy==9 (from versions: 1.0, 2.0)\n",
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES: numpy\n",
    ],
)
def test_a_bad_requirement_stays_one_where_the_index_answered_at_last(said):
    error = failure(CERTIFICATE + said)
    assert error.code == "requirements-failed"
    assert error.hint == "Mend requirements.txt, line 1: numpy."


def test_what_the_shim_needs_is_not_the_requirement_files_fault():
    said = "ERROR: No matching distribution found for flask\n"
    assert "requirements.txt" not in failure(said).hint
    assert failure(said, offline=True).hint == "Put what is missing into /given/wheels."


def test_the_last_words_of_a_pip_that_broke_are_kept():
    said = (
        'ERROR: Exception:\nTraceback (most recent call last):\n  File "numpy.py", line 1, in x\n'
        "pip._vendor.packaging.markers.InvalidMarker: Invalid marker: 'bogus == \"x\"', parse error\n"
    )
    error = failure(said, requirements='numpy\nidna; bogus == "x"\n')
    assert error.why.startswith("InvalidMarker: Invalid marker: 'bogus")
    assert "requirements.txt, line 2: idna" in error.hint


def test_wheels_of_the_function_are_not_in_the_image(builder, function):
    wheel(function / "wheels", "inside")
    (function / "requirements.txt").write_text("inside\n")
    builder()
    assert ask(builder, "import inside; print(inside.version)") == "1.0"
    assert not (builder.places.app / "wheels").exists()


def test_a_criu_is_brought_where_the_build_image_has_none(builder, tmp_path):
    places = builder.places
    (places.buildpack / "criu").mkdir(parents=True)
    (places.buildpack / "criu" / "criu").write_text("#!/bin/sh\necho Version: 4.1.1\n")
    (places.buildpack / "criu" / "criu").chmod(0o755)
    (tmp_path / "empty").mkdir()
    outcomes = builder(BP_GPUFN_CRIU="bring")
    assert "criu" in outcomes
    named = (builder.layers / "criu" / "env.launch" / "GPUFN_CRIU.default").read_text()
    assert subprocess.run([named], capture_output=True, text=True, check=True).stdout == "Version: 4.1.1\n"
    assert "criu" not in builder(BP_GPUFN_CRIU="off")
    assert not (builder.layers / "criu.toml").exists()


def test_a_criu_that_must_be_and_is_not_brought_is_an_error(builder):
    with pytest.raises(ConfigError, match="brings no CRIU"):
        builder(BP_GPUFN_CRIU="bring")


# Weights.


@pytest.fixture
def weighty(function: Path) -> Path:
    (function / "net").mkdir()
    (function / "net" / "model.safetensors").write_bytes(safetensors(a=[1.0, 2.0]))
    (function / "net" / "config.json").write_text("{}")
    (function / "gpufn.toml").write_text('[weights]\nsource = "./net"\n')
    return function


def test_weights_are_a_layer_and_not_in_the_application_as_well(builder, weighty):
    builder()
    assert (builder.layers / "weights" / "weights.safetensors").is_file()
    env = builder.layers / "weights" / "env.launch"
    assert (env / "GPUFN_WEIGHTS.default").read_text() == str(builder.layers / "weights")
    assert (env / "MODEL_DIR.default").read_text() == str(builder.layers / "weights" / "model")
    assert not list(builder.places.app.rglob("*.safetensors"))


def test_weights_are_kept_without_being_made_while_code_changes(builder, weighty):
    builder()
    builder.exported()
    (weighty / "handler.py").write_text((weighty / "handler.py").read_text() + "# changed\n")
    assert all(outcome.is_reused for outcome in builder().values())
    assert not list(builder.places.app.rglob("*.safetensors"))


def test_weights_that_are_missing_leave_no_layer(builder, weighty):
    (weighty / "gpufn.toml").write_text('[weights]\nsource = "./elsewhere"\n')
    with pytest.raises(AdapterError, match="missing"):
        builder()
    assert not (builder.layers / "weights").exists()


# Bad input.


def test_a_folder_without_handler_is_refused(builder, function):
    (function / "handler.py").unlink()
    with pytest.raises(ConfigError, match="no function"):
        builder()


def test_a_file_of_settings_without_handler_is_refused(builder, function):
    (function / "handler.py").unlink()
    (function / "gpufn.toml").write_text("")
    with pytest.raises(HandlerError, match="no function folder"):
        builder()


def test_two_handlers_are_refused(builder, function):
    (function / "function").mkdir()
    (function / "function" / "handler.py").write_text("def handle(e, c): ...\n")
    with pytest.raises(ConfigError, match=r"handler.py and function/handler.py"):
        builder()


def test_a_broken_file_of_settings_is_refused(builder, function):
    (function / "gpufn.toml").write_text("[scale\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        builder()


def test_a_link_out_of_the_folder_is_refused_before_anything_is_made(builder, function):
    (function / "secret").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="secret is a link that leads out") as caught:
        builder()
    assert "/etc/passwd" in caught.value.why
    assert not any(builder.layers.iterdir())


def test_an_unknown_setting_is_refused(builder):
    with pytest.raises(ConfigError, match="BP_GPUFN_WHEEL"):
        builder(BP_GPUFN_WHEEL="x")


def test_a_foreign_lock_alone_says_how_to_write_ours(builder, function):
    (function / "uv.lock").write_text("")
    with pytest.raises(ConfigError) as caught:
        builder()
    assert "uv export" in caught.value.hint


def test_requirements_out_of_the_folder_are_refused(builder, function):
    (function / "requirements.txt").write_text("-r ../../other.txt\n")
    with pytest.raises(ConfigError, match="out of the function folder"):
        builder()
