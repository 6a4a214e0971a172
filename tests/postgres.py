"""A real PostgreSQL for tests: the one that is named, or a private one while they run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl: Debian keeps it off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@contextlib.contextmanager
def server(address: str = "", network: str = "") -> Iterator[str]:
    """The URL of a server of our own, which is gone after: on a Unix socket only, in a folder of its user; with `address`,
    there on a free port too, and open to `network`, whose pods have no password."""
    programs = _programs()
    if programs is None:
        if os.environ.get("CI"):
            pytest.fail("PostgreSQL is a must in CI: install the package postgresql", pytrace=False)
        pytest.skip("no PostgreSQL here: install it, or name a database in GPUFN_TEST_POSTGRES_URL")
    as_user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}

    def call(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **as_user)  # type: ignore[call-overload]

    with tempfile.TemporaryDirectory(prefix="gpufn-postgres-") as folder:
        if as_user:
            shutil.chown(folder, "postgres", "postgres")
        data = f"{folder}/data"
        call("initdb", "--auth=trust", "--encoding=UTF8", "--no-sync", "--username=gpufn", data)
        options = f"-c listen_addresses='{address}' -c unix_socket_directories='{folder}'"
        url = f"postgresql://gpufn@/postgres?host={folder}"
        if address:
            with Path(data, "pg_hba.conf").open("a") as rules:
                rules.write(f"host all gpufn {network} trust\n")
            port = free_port(address)
            options += f" -c port={port}"
            url = f"postgresql://gpufn@{address}:{port}/postgres"
        call("pg_ctl", "-D", data, "-l", f"{folder}/log", "-o", options, "-w", "start")
        try:
            yield url
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


@pytest.fixture(scope="session")
def postgres_url():
    """A URL of a database in which schemas may be made: GPUFN_TEST_POSTGRES_URL, or a server of our own."""
    if os.environ.get("GPUFN_TEST_POSTGRES_URL"):
        yield os.environ["GPUFN_TEST_POSTGRES_URL"]
        return
    with server() as url:
        yield url
