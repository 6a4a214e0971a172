"""A function, wheels for what the shim requires, and a builder of both."""

import os
from pathlib import Path

import pytest

from adapter.packaging import packages
from tests.fakes.builds import HANDLER, SHIM_WHEELS, Builder, wheel


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with stand-ins for what the shim requires."""
    folder = tmp_path / "wheels"
    for name, version in SHIM_WHEELS.items():
        wheel(folder, name, version)
    return folder


@pytest.fixture
def function(tmp_path: Path) -> Path:
    """The folder of a function."""
    folder = tmp_path / "function"
    folder.mkdir()
    (folder / "handler.py").write_text(HANDLER)
    return folder


@pytest.fixture(scope="session")
def pip(tmp_path_factory) -> list[str]:
    """The command of an installer that is made once; each build would make its own where Python has none."""
    return packages._installer(tmp_path_factory.mktemp("pip"), {**os.environ})


@pytest.fixture
def builder(function: Path, wheels: Path, tmp_path: Path, pip, monkeypatch) -> Builder:
    monkeypatch.setattr(packages, "_installer", lambda work, environ: pip)
    return Builder(function, tmp_path / "build", wheels)
