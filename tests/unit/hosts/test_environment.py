import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter.errors import ConfigError, Unavailable
from adapter.hosts import environment
from adapter.hosts.environment import Environments

INSTALLER = Path(__file__).parents[2] / "fakes" / "installer.py"
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The calls of a fake uv, as a function that reads them."""
    log = tmp_path / "uv.log"
    monkeypatch.setenv("FAKE_UV_LOG", str(log))
    monkeypatch.setattr(environment, "_uv", lambda: [sys.executable, str(INSTALLER)])
    return lambda verb: (
        [line for line in log.read_text().splitlines() if line.split()[1] == verb] if log.exists() else []
    )


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """A named pipe that holds installs up; `open(gate, "w")` waits until an install is there, and its close ends it."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    monkeypatch.setenv("FAKE_UV_GATE", str(path))
    return path


def function(tmp_path: Path, name: str, **files: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "handler.py").touch()
    for file, content in files.items():
        (folder / (file.replace("_", "-") + ".txt")).write_text(content)
    return folder


def test_equal_requirements_share_an_environment_and_others_do_not(tmp_path, calls):
    envs = Environments(tmp_path / "envs")
    first = envs.python_for(function(tmp_path, "a", requirements="numpy\n"))
    assert envs.python_for(function(tmp_path, "b", requirements="numpy\n")) == first
    assert envs.python_for(function(tmp_path, "c", requirements="scipy\n")) != first
    assert envs.python_for(function(tmp_path, "d", requirements="numpy\n", requirements_nodeps="x\n")) != first
    assert len(calls("venv")) == 3


def test_functions_without_requirements_share_one_with_the_shims(tmp_path, calls):
    envs = Environments(tmp_path / "envs")
    assert envs.python_for(function(tmp_path, "a")) == envs.python_for(function(tmp_path, "b"))
    (install,) = calls("pip")
    assert "flask" in install
    assert "--requirement" not in install


@pytest.mark.parametrize(
    "line", ["-r other.txt", "./wheels/x.whl", "../x", "x @ file:///x", "-e .", "/opt/x", "--constraint=c.txt"]
)
def test_requirements_that_mean_local_files_are_not_shared(tmp_path, calls, line):
    envs = Environments(tmp_path / "envs")
    first, second = (function(tmp_path, name, requirements=f"numpy\n{line}\n") for name in "ab")
    assert envs.python_for(first) != envs.python_for(second)


def test_an_index_option_does_not_make_requirements_local(tmp_path, calls):
    envs = Environments(tmp_path / "envs")
    lines = "--extra-index-url https://example.org/whl/cpu\ntorch==2.15.0 # -r is no option here\n"
    first, second = (function(tmp_path, name, requirements=lines) for name in "ab")
    assert envs.python_for(first) == envs.python_for(second)


def test_packages_without_dependencies_are_installed_last(tmp_path, calls):
    Environments(tmp_path / "envs").python_for(function(tmp_path, "a", requirements="x\n", requirements_nodeps="y\n"))
    with_deps, without = calls("pip")
    assert "--no-deps" not in with_deps
    assert "--no-deps --requirement" in without


def test_an_environment_is_built_once_for_all_who_ask_at_once(tmp_path, calls):
    folder = function(tmp_path, "a", requirements="numpy\n")
    one, other = Environments(tmp_path / "envs"), Environments(tmp_path / "envs")  # as two processes would
    with ThreadPoolExecutor(8) as pool:
        pythons = set(pool.map(lambda n: (one, other)[n % 2].python_for(folder), range(8)))
    assert len(pythons) == 1
    assert len(calls("venv")) == 1


def test_a_half_built_environment_is_built_anew(tmp_path, calls):
    envs = Environments(tmp_path / "envs")
    folder = function(tmp_path, "a")
    home = envs.python_for(folder).parent.parent
    (home / "gpufn-complete").unlink()
    (home / "rest-of-a-former-build").touch()
    envs.python_for(folder)
    assert len(calls("venv")) == 2
    assert not (home / "rest-of-a-former-build").exists()


def test_an_environment_whose_interpreter_is_gone_is_built_anew(tmp_path, calls):
    envs = Environments(tmp_path / "envs")
    folder = function(tmp_path, "a")
    python = envs.python_for(folder)
    python.unlink()
    python.symlink_to(tmp_path / "removed" / "python3")
    assert envs.python_for(folder).exists()


def test_a_failed_install_says_what_the_installer_said_and_is_tried_again(tmp_path, calls, monkeypatch):
    envs = Environments(tmp_path / "envs")
    folder = function(tmp_path, "a", requirements="no-such-thing\n")
    monkeypatch.setenv("FAKE_UV_ERROR", "Because no-such-thing was not found, your requirements are unsatisfiable.")
    with pytest.raises(ConfigError) as caught:
        envs.python_for(folder)
    assert "no-such-thing was not found" in caught.value.why
    assert str(folder / "requirements.txt") in caught.value.hint
    monkeypatch.delenv("FAKE_UV_ERROR")
    assert envs.python_for(folder).exists()


def test_the_real_installer_refuses_what_is_no_requirement(tmp_path):
    with pytest.raises(ConfigError) as caught:
        Environments(tmp_path / "envs").python_for(function(tmp_path, "a", requirements="this is !! nothing\n"))
    assert caught.value.code == "requirements-failed"
    assert "this is" in caught.value.why


def test_a_build_can_be_interrupted(tmp_path, calls, gate):
    envs = Environments(tmp_path / "envs")
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(envs.python_for, function(tmp_path, "a")) for _ in range(1)]
        with open(gate, "w"):
            envs.interrupt()
            for build in builds:
                with pytest.raises(Unavailable):
                    build.result(30)


def test_an_installer_that_outlives_its_host_keeps_others_out(tmp_path, calls, gate, monkeypatch):
    """Else the next host would build into a folder that the stray installer still writes to."""
    folder = function(tmp_path, "a")
    script = (
        "import sys; from pathlib import Path; from adapter.hosts import environment\n"
        f"environment._uv = lambda: [sys.executable, {str(INSTALLER)!r}]\n"
        f"environment.Environments(Path({str(tmp_path / 'envs')!r})).python_for(Path({str(folder)!r}))"
    )
    builder = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY)
    with open(gate, "w"):  # the install is under way
        builder.send_signal(signal.SIGKILL)
        builder.wait(30)
        monkeypatch.delenv("FAKE_UV_GATE")
        built = threading.Event()

        def build():
            Environments(tmp_path / "envs").python_for(folder)
            built.set()

        thread = threading.Thread(target=build)
        thread.start()
        assert not built.wait(0.5)
    assert built.wait(30)
    thread.join()
    assert len(calls("venv")) == 2
