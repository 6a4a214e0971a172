"""A real PostgreSQL for the contract: the one that is named, or a private one while the tests run."""

import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapter.ledger.store import Ledger


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl: Debian keeps it off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@pytest.fixture(scope="session")
def postgres_url():
    """A URL of a database in which schemas may be made: GPUFN_TEST_POSTGRES_URL, or a server of our own.

    It listens on a Unix socket only, in a folder of its user, and is gone with the tests.
    """
    if os.environ.get("GPUFN_TEST_POSTGRES_URL"):
        yield os.environ["GPUFN_TEST_POSTGRES_URL"]
        return
    programs = _programs()
    if programs is None:
        if os.environ.get("CI"):
            pytest.fail("PostgreSQL is a must in CI: install the package postgresql", pytrace=False)
        pytest.skip("no PostgreSQL here: install it, or name a database in GPUFN_TEST_POSTGRES_URL")
    as_user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}

    def call(program, *arguments):
        subprocess.run([programs / program, *arguments], check=True, capture_output=True, cwd="/", **as_user)

    with tempfile.TemporaryDirectory(prefix="gpufn-postgres-") as folder:
        if as_user:
            shutil.chown(folder, "postgres", "postgres")
        data = f"{folder}/data"
        call("initdb", "--auth=trust", "--encoding=UTF8", "--no-sync", "--username=gpufn", data)
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}'"
        call("pg_ctl", "-D", data, "-l", f"{folder}/log", "-o", options, "-w", "start")
        try:
            yield f"postgresql://gpufn@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'ledger.sqlite'}"
        return
    server = sa.make_url(request.getfixturevalue("postgres_url"))
    name = f"gpufn_test_{uuid.uuid4().hex}"
    engine = sa.create_engine(server.set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    query = {"options": f"-csearch_path={name}"}
    yield server.update_query_dict(query).render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")
    engine.dispose()


@pytest.fixture
def ledger(url):
    ledger = Ledger.open(url)
    yield ledger
    ledger.close()
