"""The contract of GPU processes, kept by a real GPU where there is one and by the simulated one elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapter.gpu.client import HelperClient, HelperProcess, start_helper
from tests.conftest import has_gpu
from tests.gpu.subject import Machine, Subject, ThisMachine
from tests.stubs.simulated import Simulated


def pytest_report_header() -> str:
    return f"gpu: {'the real GPU of this machine' if has_gpu() else 'simulated (tests/stubs)'}"


@pytest.fixture
def machine(request) -> Machine:
    if has_gpu():
        return ThisMachine()
    simulated: Simulated = request.getfixturevalue("simulated")
    return simulated


@pytest.fixture
def start_subject() -> Iterator[Callable[..., Subject]]:
    """Makes subjects, and ends them with their process groups."""
    subjects: list[Subject] = []

    def start(machine: Machine, **environ: str) -> Subject:
        subjects.append(Subject(machine, environ))
        return subjects[-1]

    yield start
    for subject in subjects:
        subject.end()


@pytest.fixture
def start_client(tmp_path) -> Iterator[Callable[[Machine], tuple[HelperProcess, HelperClient]]]:
    """Makes helpers on a machine, each with a connection to it."""
    started: list[tuple[HelperProcess, HelperClient]] = []

    def start(machine: Machine) -> tuple[HelperProcess, HelperClient]:
        path: Path = tmp_path / f"helper-{len(started)}"
        helper = start_helper(str(path), environ={**os.environ, **machine.environment})
        started.append((helper, helper.connect()))
        return started[-1]

    yield start
    for helper, client in started:
        client.close()
        helper.close()


@pytest.fixture
def subject(machine, start_subject) -> Subject:
    """Running, with 4 MiB of plain device memory."""
    made: Subject = start_subject(machine).with_memory()
    return made


@pytest.fixture
def client(machine, start_client) -> HelperClient:
    made: HelperClient = start_client(machine)[1]
    return made
