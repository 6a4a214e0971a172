"""What every test gets: a clean process around it, and a reason when what it needs is not here."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from tests import ports
from tests.images.machine import why_not as _without_images
from tests.stubs.build import build, why_not as why_no_stubs
from tests.stubs.simulated import Simulated
from tests.testbed.programs import why_not as _without_cluster

REPOSITORY = Path(__file__).parents[1]

# Slow machines are no bugs: nothing here measures time.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


@functools.cache
def _without_criu() -> str:
    """Why process snapshots cannot be tested here; empty when they can."""
    from adapter.errors import SnapshotError
    from adapter.snapshot.process import find_criu

    try:
        find_criu()
    except SnapshotError as exc:
        return f"{exc.message} {exc.why} {exc.hint}"
    return ""


@functools.cache
def _without_torch() -> str:
    missing = [name for name in ("torch", "numpy", "safetensors") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)} (make setup)" if missing else ""


def _without_faas_cli() -> str:
    return "" if os.environ.get("FAAS_CLI") or shutil.which("faas-cli") else "no faas-cli on the PATH, nor in FAAS_CLI"


@functools.cache
def _without_gpu() -> str:
    """A GPU is simulated where there is none: see tests/stubs."""
    return "" if has_gpu() else why_no_stubs()


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


NEEDS: dict[str, Callable[[], str]] = {
    "criu": _without_criu,
    "torch": _without_torch,
    "faas_cli": _without_faas_cli,
    "gpu": _without_gpu,
    "images": _without_images,
    "cluster": _without_cluster,
}
"""Markers of what a machine may lack, and what says why."""

REQUIRED_IN_CI = {"criu", "torch", "gpu", "images", "cluster"}
"""`make setup`, `make criu`, `make kubernetes` and .ci/run bring these, and what a GPU is simulated with: where they are missing in CI, something is broken."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, why_not in NEEDS.items():
        if item.get_closest_marker(marker) is None:
            continue
        reason = why_not()
        if reason and marker in REQUIRED_IN_CI and os.environ.get("CI"):
            pytest.fail(f"{marker} is a must in CI: {reason}", pytrace=False)
        if reason:
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch):
    """No test sees the settings of the user's shell, nor what another one did to this process."""
    environ, handlers, level, umask = dict(os.environ), logging.root.handlers[:], logging.root.level, os.umask(0o022)
    for name in environ:
        if (name.startswith("GPUFN_") and name != "GPUFN_CRIU") or name.startswith("OPENFAAS_"):
            monkeypatch.delenv(name)
    yield
    monkeypatch.undo()
    os.umask(umask)
    os.environ.clear()
    os.environ.update(environ)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def state_dir(tmp_path) -> Path:
    """A fresh state folder, private as `gpufn up` makes it."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(scope="session")
def stub_libraries(tmp_path_factory) -> Path:
    """A folder for LD_LIBRARY_PATH with the stub driver. Tests that ask for it have the marker `gpu`."""
    if why_no_stubs():  # on a machine with a real GPU
        pytest.skip(why_no_stubs())
    folder: Path = tmp_path_factory.mktemp("stub-driver")
    folder.chmod(0o755)
    return build(folder)


@pytest.fixture
def simulated(tmp_path, stub_libraries) -> Simulated:
    """A machine with one simulated GPU of 8 GiB, for processes with its `environment`."""
    return Simulated(tmp_path / "machine", stub_libraries)


@pytest.fixture
def free_port() -> int:
    """See `tests.ports`."""
    return ports.free_port()


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY
